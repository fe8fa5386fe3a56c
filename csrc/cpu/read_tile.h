// Reading an exit's logits in a tile, and their maxima over channels; and what is read next, ahead of that.
#pragma once

#include "storage.h"
#include "tile.h"

namespace {

// The exit that is read next, see expect().
template <class A>
struct Ahead {
  int exit;
  const char* data;
  int64_t channel, pixel;  // strides in bytes
  int64_t distance;        // of the prefetches, in bytes
  A* max;                  // of its logits; null where they cannot be read beside another exit's
  A* scratch;              // room for them; null where they are used as they lie in memory
  const A* counted;        // weights of pixels: those of 0 are cleared; null where there are none
};

template <class A>
class TileReader {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);
  static constexpr int kBlock = TileWork<A>::kBlock;
  static constexpr int kAhead = 1024;  // bytes, see Ahead

 public:
  Ahead<A> ahead;  // of the pass at hand

  explicit TileReader(TileWork<A>& work) : w(work) {}
  void begin_tile() { seen.exit = w.N; }

  // The exit that is read next comes from memory while the exponentials of this one are computed: memory and
  // arithmetic, one after the other, would take the sum of their times. Where its numbers need no conversion its
  // maximum is taken, too. Where its pixels are not one run it is not worth the trouble; then the prefetches fall on
  // this worker's scratch.
  void expect(int e) {
    ahead = {e, reinterpret_cast<const char*>(w.z), 0, 0, 0, nullptr, nullptr, nullptr};
    const bool of_next_tile = e == w.N;
    if (of_next_tile) e = w.T ? w.L.teachers[0] : 0;
    if (w.is_resized(e) || seen.exit == e) return;
    const View& v = w.L.exits[e];
    const Runs runs = runs_of(v, w.L);
    const bool apart = shares_cache_sets(v);
    if (runs.step != 1 || !w.is_one_run(runs) || (of_next_tile && apart)) return;
    const int64_t bytes = w.L.dtype == DType::float64 ? 8 : w.L.dtype == DType::float32 ? 4 : 2;
    w.over_runs(v, runs, [&](int64_t offset, int64_t, int64_t) {
      ahead.data = static_cast<const char*>(v.data) + (offset + (of_next_tile ? w.n : 0)) * bytes;
      ahead.channel = v.stride_c * bytes, ahead.pixel = bytes;
    });
    if (of_next_tile || w.n < w.width || bytes != sizeof(A)) return;
    ahead.distance = apart ? kBlock * ahead.channel : kAhead;
    const int r = w.taught_row(e);
    begin_max(ahead.max = r < 0 ? w.next_max : w.teachers[r].max);
    if (apart || w.uncounted) ahead.scratch = r < 0 ? w.next_z : w.teachers[r].z;
    if (w.uncounted) ahead.counted = w.counted_weight();
  }
  // One step of that, beside channels [c0, c0 + CB) of pixels i.
  template <int CB>
  static SELFREG_ALWAYS void look(const Ahead<A>& next, int64_t ld, int c0, int64_t i) {
    const char* const at = next.data + c0 * next.channel + i * next.pixel;
    for (int k = 0; k < CB; ++k) __builtin_prefetch(at + k * next.channel + next.distance, 0, 2);
    if (!next.max) return;
    V x[CB], top = load<V>(next.max + i);
    for (int k = 0; k < CB; ++k) x[k] = load<V>(reinterpret_cast<const A*>(at + k * next.channel));
    if (next.counted)
      for (int k = 0; k < CB; ++k) x[k] = load<V>(next.counted + i) == A(0) ? V{} : x[k];
    if (next.scratch)
      for (int k = 0; k < CB; ++k) store(next.scratch + (c0 + k) * ld + i, x[k]);
    for (int k = 0; k < CB; ++k) top = larger(x[k], top);
    store(next.max + i, top);
  }
  void remember() {
    if (ahead.max) seen = ahead;
  }
  // Finds the maximum over channels, and the logits: in memory as they are, where they can be used so; else read into
  // scratch, and cleared at pixels that do not count (a NaN there reaches nothing).
  Rows<A> read_with_max(int e, A*& scratch, A*& m) {
    if (seen.exit == e) {
      if (m != seen.max) w.next_max = m, m = seen.max;
      if (!seen.scratch) return {reinterpret_cast<const A*>(seen.data), w.L.exits[e].stride_c};
      if (scratch != seen.scratch) w.next_z = scratch, scratch = seen.scratch;
      return {scratch, w.ld};
    }
    const View& v = w.L.exits[e];
    begin_max(m);
    const bool resized = w.is_resized(e);
    const Runs runs = runs_of(v, w.L);
    const bool row_by_row = resized || runs.step == 1, apart = !resized && shares_cache_sets(v);
    const bool in_place = row_by_row && !resized && !w.uncounted && !apart && w.is_one_run(runs) &&
                          w.L.dtype == (sizeof(A) == 4 ? DType::float32 : DType::float64);
    Rows<A> rows{scratch, w.ld};
    if (in_place) {
      w.over_runs(v, runs, [&](int64_t offset, int64_t, int64_t) {
        rows = {static_cast<const A*>(v.data) + offset, v.stride_c};
      });
    } else if (!row_by_row) {
      read(e, scratch, 0, w.C);
    }
    for (int c0 = 0; c0 < w.C; c0 += kBlock) {
      const int c1 = c0 + kBlock < w.C ? c0 + kBlock : w.C;
      if (row_by_row && apart) prefetch_rows(v, runs, c0 + 2 * kBlock, c0 + 3 * kBlock);
      if (row_by_row && !in_place) read(e, scratch, c0, c1);
      if (w.uncounted) clear_uncounted(scratch, c0, c1);
      const int64_t stride = rows.stride;
      const A* const x = rows.data + c0 * stride;
      if (c1 - c0 == kBlock) {
        w.over_pixels([&](int64_t i) {
          const V x01 = larger(load<V>(x + i), load<V>(x + stride + i));
          const V x23 = larger(load<V>(x + 2 * stride + i), load<V>(x + 3 * stride + i));
          store(m + i, larger(larger(x01, x23), load<V>(m + i)));
        });
      } else {
        for (int c = 0; c < c1 - c0; ++c)
          w.over_pixels([&](int64_t i) { store(m + i, larger(load<V>(x + c * stride + i), load<V>(m + i))); });
      }
    }
    return rows;
  }

 private:
  TileWork<A>& w;
  Ahead<A> seen;  // of a pass that is done and took a maximum

  // Planes a multiple of 4 KB apart, as those of 128 x 128 pixels: all channels of a pixel fall into the same few sets
  // of a cache, which does not hold them until they are used.
  bool shares_cache_sets(const View& v) const { return v.stride_c * int64_t(sizeof(A)) % 4096 == 0 && w.C > 8; }
  void begin_max(A* m) const {
    const V lowest = fill<V>(A(sizeof(A) == 4 ? -3.402823466e38 : -1.7976931348623157e308));
    w.over_pixels([&](int64_t i) { store(m + i, lowest); });
  }

  template <class S>
  void read_as(const View& v, A* to, int c0, int c1) {
    const S* data = static_cast<const S*>(v.data);
    const Runs runs = runs_of(v, w.L);
    w.over_runs(v, runs, [&](int64_t offset, int64_t first, int64_t count) {
      if (runs.step == 1) {
        for (int c = c0; c < c1; ++c) convert(w.row(to, c) + first, data + offset + c * v.stride_c, count);
        return;
      }
      // Channels are close together: few pixels at a time, so that a cache line is read once.
      for (int64_t i = 0; i < count; i += kLanes) {
        const S* src = data + offset + i * runs.step;
        A* dst = to + first + i;
        if (w.channels_together(v) && count - i >= kLanes) {
          w.over_channel_blocks([&](int c) {
            V pixels[kLanes];
            for (int p = 0; p < kLanes; ++p) {
              A values[kLanes];
              convert(values, src + p * runs.step + c, kLanes);
              pixels[p] = load<V>(values);
            }
            transpose<V, VInt>(pixels);
            for (int k = 0; k < kLanes; ++k) store(dst + (c + k) * w.ld, pixels[k]);
          });
          continue;
        }
        for (int64_t p = 0; p < kLanes && p < count - i; ++p)
          for (int c = c0; c < c1; ++c) convert(dst[c * w.ld + p], src[p * runs.step + c * v.stride_c]);
      }
    });
  }
  void read(int e, A* to, int c0, int c1) {
    if (w.is_resized(e)) {
      const Resizer<A>& resizer = w.resizers[e];
      if (c1 - c0 == kBlock) {
        resizer.template interpolate<kBlock>(c0, w.row(to, c0), w.ld);
      } else {
        for (int c = c0; c < c1; ++c) resizer.template interpolate<1>(c, w.row(to, c), w.ld);
      }
    } else if constexpr (sizeof(A) == 8) {
      read_as<double>(w.L.exits[e], to, c0, c1);
    } else {
      switch (w.L.dtype) {
        case DType::float32: read_as<float>(w.L.exits[e], to, c0, c1); break;
        case DType::float16: read_as<Half>(w.L.exits[e], to, c0, c1); break;
        default: read_as<BFloat>(w.L.exits[e], to, c0, c1);
      }
    }
    if (w.width > w.n)
      for (int c = c0; c < c1; ++c)
        for (int64_t i = w.n; i < w.width; ++i) w.row(to, c)[i] = 0;
  }
  // A few rows ahead of the reading, where the whole next tile cannot be fetched ahead.
  void prefetch_rows(const View& v, const Runs& runs, int c0, int c1) {
    const int64_t bytes = w.L.dtype == DType::float64 ? 8 : w.L.dtype == DType::float32 ? 4 : 2;
    w.over_runs(v, runs, [&](int64_t offset, int64_t, int64_t count) {
      for (int c = c0; c < c1 && c < w.C; ++c) {
        const char* p = static_cast<const char*>(v.data) + (offset + c * v.stride_c) * bytes;
        for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
      }
    });
  }
  void clear_uncounted(A* to, int c0, int c1) {
    const A* const weight = w.counted_weight();
    for (int c = c0; c < c1; ++c) {
      A* const x = w.row(to, c);
      w.over_pixels([&](int64_t i) { store(x + i, load<V>(weight + i) == A(0) ? V{} : load<V>(x + i)); });
    }
  }
};

}  // namespace

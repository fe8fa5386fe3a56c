// Writing a tile's gradient: from scratch to any layout and dtype, or past the caches as it is computed.
#pragma once

#include "storage.h"
#include "tile.h"

namespace {

// A gradient on its way past the caches: whole lines of memory, each out of two neighbouring vectors, for rows begin
// anywhere; the last vector of a row waits for the next tile. (A copy from scratch waits until memory has taken what
// was copied before, and a line in two parts is read from memory first.)
template <class A>
struct Stream {
  A* to;  // the tile's first pixel; null: it goes to scratch
  int64_t stride;
  A* ends;       // [C] last vectors of the tile before
  bool joins;    // with which this tile's first lines begin
  bool goes_on;  // this tile's last vectors are left to the next
};

// Channels [c0, c0 + CB) of it, of `n` pixels.
template <class A, int CB>
struct StreamedRows {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const Stream<A> lines;
  const int c0;
  const int64_t n, first, last;
  int64_t head[CB] = {};  // pixels before the first whole line
  A* line[CB] = {};       // where that of the vectors at i - kLanes and i begins, less i
  VInt lanes[CB] = {};    // which of theirs it has
  V before[CB] = {};

  SELFREG_ALWAYS StreamedRows(const Stream<A>& stream, int c0, int64_t n)
      : lines(stream), c0(c0), n(n), first(stream.joins ? 0 : kLanes), last(n / kLanes * kLanes - kLanes) {
    for (int k = 0; k < CB && lines.to; ++k) {
      A* const to = lines.to + (c0 + k) * lines.stride;
      head[k] = -int64_t(reinterpret_cast<uintptr_t>(to) / sizeof(A)) & (kLanes - 1);
      line[k] = to + head[k] - kLanes;
      for (int lane = 0; lane < kLanes; ++lane) lanes[k][lane] = typename VecOf<A>::Int(lane + head[k]);
      if (lines.joins) before[k] = load<V>(lines.ends + (c0 + k) * kLanes);
    }
  }
  // Pixels i on; in `scratch` is what cannot go yet.
  SELFREG_ALWAYS void put(int64_t i, const V (&g)[CB], A* scratch, int64_t stride) {
    if (lines.to && i >= first && i <= last)
      for (int k = 0; k < CB; ++k) stream(line[k] + i, shuffle(before[k], g[k], lanes[k]));
    if (!lines.to || i < first || i >= last)
      for (int k = 0; k < CB; ++k) store(scratch + k * stride + i, g[k]);
    for (int k = 0; k < CB; ++k) before[k] = g[k];
  }
  // What is left of both ends.
  SELFREG_ALWAYS void finish(const A* scratch, int64_t stride) const {
    for (int k = 0; k < CB && lines.to; ++k) {
      A* const to = lines.to + (c0 + k) * lines.stride;
      const A* const from = scratch + k * stride;
      const int64_t whole = last < first ? 0 : last - first + kLanes;
      const int64_t begins = lines.joins ? head[k] - kLanes : head[k], ends = begins + whole;
      for (int64_t i = 0; i < begins && i < n; ++i) to[i] = from[i];
      for (int64_t i = ends > 0 ? ends : 0; i < n && !lines.goes_on; ++i) to[i] = from[i];
      if (lines.goes_on) store(lines.ends + (c0 + k) * kLanes, before[k]);
    }
  }
};

template <class A>
class TileWriter {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

 public:
  explicit TileWriter(TileWork<A>& work) : w(work) {}
  void begin_launch() const {
    for (int e = 0; e < w.N; ++e) w.joined[e] = false;
  }
  // Writes channels [c0, c1) of the gradient, which stand in z.
  void write(const View& v, int c0, int c1) {
    if constexpr (sizeof(A) == 8) {
      write_as<double>(v, c0, c1);
    } else {
      switch (w.L.dtype) {
        case DType::float32: write_as<float>(v, c0, c1); break;
        case DType::float16: write_as<Half>(v, c0, c1); break;
        default: write_as<BFloat>(v, c0, c1);
      }
    }
  }
  // How the gradient of exit e is written past the caches. Not if vectors are too short to be put together from two.
  Stream<A> stream_of(int e) const {
    const View& v = w.L.grads[e];
    const Runs runs = runs_of(v, w.L);
    Stream<A> stream{};
    if (!w.plan.stream || kVecBytes < 32 || !w.is_one_run(runs) ||
        w.L.dtype != (sizeof(A) == 4 ? DType::float32 : DType::float64))
      return stream;
    w.over_runs(v, runs, [&](int64_t offset, int64_t, int64_t) { stream.to = static_cast<A*>(v.data) + offset; });
    stream.stride = v.stride_c;
    stream.ends = w.ends + int64_t(e) * w.C * kLanes;
    stream.joins = w.joined[e];
    const int64_t next = w.begin + w.n, left = w.plan.pixels - next;
    const int64_t next_n = left < w.plan.tile_columns ? left : w.plan.tile_columns;
    const bool one_run = next % runs.length && runs.length - next % runs.length >= next_n;
    stream.goes_on = w.more && !w.plan.resizes && one_run && next_n >= kLanes;
    return stream;
  }

 private:
  TileWork<A>& w;

  template <class S>
  void write_as(const View& v, int c0, int c1) {
    S* data = static_cast<S*>(v.data);
    const Runs runs = runs_of(v, w.L);
    w.over_runs(v, runs, [&](int64_t offset, int64_t first, int64_t count) {
      if (runs.step == 1) {
        for (int c = c0; c < c1; ++c) convert(data + offset + c * v.stride_c, w.row(w.z, c) + first, count);
        return;
      }
      for (int64_t i = 0; i < count; i += kLanes) {
        S* dst = data + offset + i * runs.step;
        const A* src = w.z + first + i;
        if (w.channels_together(v) && count - i >= kLanes) {
          w.over_channel_blocks([&](int c) {
            V pixels[kLanes];
            for (int k = 0; k < kLanes; ++k) pixels[k] = load<V>(src + (c + k) * w.ld);
            transpose<V, VInt>(pixels);
            for (int p = 0; p < kLanes; ++p) {
              A values[kLanes];
              store(values, pixels[p]);
              convert(dst + p * runs.step + c, values, kLanes);
            }
          });
          continue;
        }
        for (int64_t p = 0; p < kLanes && p < count - i; ++p)
          for (int c = c0; c < c1; ++c) convert(dst[p * runs.step + c * v.stride_c], src[c * w.ld + p]);
      }
    });
  }
};

}  // namespace

// The exit-loss matrix on the CPU, but for what small_exits.cpp does. Compiled once for each instruction set, which
// SELFREG_ISA names; everything but the entry point is in an anonymous namespace, and no inline function of another
// header that a linker might share is used.
//
// A tile is a block of pixels with all channels, channel rows contiguous, so that a vector holds pixels and no
// reduction over channels crosses lanes. Per tile:
//   phase 1  each teacher: read, maximum, exponentials; all stay in scratch, these as its unnormalised target row
//   phase 2  each exit: read and maximum, if not a teacher; exponentials with the sums of all its losses; its gradient,
//            a few rows at a time
// Reading an exit of another size is interpolating it, writing its gradient is gathering that: resize.h.
// Phase 0 (what the means divide by) comes before, the fixed-order sum over tiles (phase 3) after, in launch.cpp.
#include "cpu.h"

#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "resize.h"
#include "storage.h"
#include "vec.h"  // before pixel_math.h, whose templates call its exp2_of and log2

#include "../pixel_math.h"

namespace {

using namespace selfreg;

// ---- pixels in memory ------------------------------------------------------------------------------------------

// Pixels of an exit of the output's size come in runs of `length` at a fixed `step`: the whole batch, an image, or a
// row.
struct Runs {
  int64_t length, step;
};

Runs runs_of(const View& v, const ExitLoss& launch) {
  Runs r{1, 1};
  const int64_t sizes[] = {launch.W, launch.H, launch.B}, strides[] = {v.stride_w, v.stride_h, v.stride_b};
  for (int d = 0; d < 3; ++d) {
    if (sizes[d] == 1) continue;
    if (r.length == 1) {
      r = {sizes[d], strides[d]};
    } else if (strides[d] == r.length * r.step) {
      r.length *= sizes[d];
    } else {
      break;
    }
  }
  return r;
}

// Calls f(offset in elements, number in [0, n), number of pixels) for each run in pixels [begin, begin + n).
template <class F>
SELFREG_ALWAYS void for_runs(const View& v, const Runs& runs, const ExitLoss& launch, int64_t begin, int64_t n, F f) {
  for (int64_t i = 0; i < n;) {
    const int64_t pixel = begin + i, left = runs.length - pixel % runs.length;
    const int64_t count = left < n - i ? left : n - i;
    const int64_t row = pixel / launch.W;
    f(row / launch.H * v.stride_b + row % launch.H * v.stride_h + pixel % launch.W * v.stride_w, i, count);
    i += count;
  }
}

// ---- one thread's work -----------------------------------------------------------------------------------------

// Rows of the tile are `ld` apart: a line more than a multiple of the vector, so that rows do not share cache sets.
template <class A>
class Worker {
  using V = typename VecOf<A>::V;
  using Int = typename VecOf<A>::Int;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);
  static constexpr int kBlock = 4;     // channels whose sums stay in registers together
  static constexpr int kAhead = 1024;  // bytes, see Ahead

 public:
  Worker(const ExitLoss& launch, const Plan& plan)
      : L(launch), plan(plan), C(int(launch.C)), N(launch.N), T(launch.T), tau(A(launch.temperature)) {
    soft_two = L.target == Target::renormalized;
    gradient = L.grad_losses || L.weights;
    constexpr int64_t kLine = 64 / sizeof(A);
    ld = (plan.tile_rows * plan.tile_columns + kLine - 1) / kLine * kLine + kLine;
    teacher_learns = gradient && !L.detach_teacher;
    int64_t bytes = 0;
    lay_out([&bytes](int64_t n) -> char* { return bytes += (n + 63) / 64 * 64, nullptr; });
    memory = static_cast<char*>(aligned_alloc(64, bytes));
    if (!memory) {
      missing = bytes;
      return;
    }
    bytes = 0;
    lay_out([&bytes, this](int64_t n) { return memory + ((bytes += (n + 63) / 64 * 64) - (n + 63) / 64 * 64); });
    for (int e = 0; plan.resizes && e < N; ++e)
      if (is_resized(e)) resizers[e].begin_launch();
    class_w_sum = 0;
    smoothing = A(L.label_smoothing / C);
    for (int c = 0; smoothing != 0 && c < C; ++c) class_w_sum += class_weight(c);
    for (int64_t i = 0; i < ld; ++i) hot[i] = A(1 - L.label_smoothing);
    for (int e = 0; e < N; ++e) joined[e] = false;
  }
  Worker(const Worker&) = delete;
  ~Worker() { free(memory); }

  int64_t missing = 0;  // bytes that could not be had: then there is nothing to work with

  // Bands [first, end) of tiles, numbered over all images; the sums of each tile go to partial[tile].
  void run(int64_t first, int64_t end, double* partial) {
    for (int64_t band = first; band < end; ++band) {
      more = band + 1 < end;
      run(band, partial);
    }
  }

 private:
  void run(int64_t band, double* partial) {
    const int64_t image = band / plan.bands, number = band % plan.bands;
    const int64_t y0 = plan.begins ? plan.begins[number] : number, y1 = plan.begins ? plan.begins[number + 1] : y0 + 1;
    over_resizers([&](Resizer<A>& resizer) { resizer.begin_band(image, number); });
    partial += band * plan.tiles_down * plan.tiles_across * (T + 1) * N;
    for (int64_t y = y0; y < y1; y += plan.tile_rows) {
      const int64_t rows = y1 - y < plan.tile_rows ? y1 - y : plan.tile_rows;
      for (int64_t x = 0; x < plan.width; x += plan.tile_columns, partial += entry(T + 1, 0)) {
        const int64_t left = plan.width - x, columns = left < plan.tile_columns ? left : plan.tile_columns;
        run({image, y, x, rows, columns}, partial);
      }
      over_resizers([&](Resizer<A>& resizer) { resizer.end_tiles_across(y + rows); });
    }
  }

  void run(const Tile& tile, double* partial) {
    begin = (tile.image * plan.height + tile.y) * plan.width + tile.x;
    spans = tile.columns == plan.width ? 1 : tile.rows;  // full rows lie one after the other
    span = spans == 1 ? tile.rows * tile.columns : tile.columns;
    if (begin + span > plan.pixels) span = plan.pixels - begin;  // the last tile, where none is resized
    n = spans * span;
    width = (n + kLanes - 1) / kLanes * kLanes;
    over_resizers([&](Resizer<A>& resizer) { resizer.begin_tile(tile); });
    pixel_weights();
    seen.exit = N;
    for (int r = 0; r < T; ++r) teach(r);
    for (int e = 0; e < N; ++e) student(e, partial, !(teacher_learns && taught_row(e) >= 0));
    if (teacher_learns)  // their gradient also needs what all their students said
      for (int r = 0; r < T; ++r)
        if (L.grads[L.teachers[r]].data) student(L.teachers[r], nullptr, true);
    stream_fence();
  }

  // Points everything to memory that take(bytes) returns.
  template <class Take>
  void lay_out(Take take) {
    auto numbers = [&take](int64_t n) { return reinterpret_cast<A*>(take(n * sizeof(A))); };
    const int64_t tile = C * ld;
    z = numbers(tile);
    next_z = numbers(tile);
    z2 = T && soft_two ? numbers(tile) : nullptr;
    for (A** row : {&max, &next_max, &sum, &sum2, &log_z, &label_w, &soft_w, &label_y, &label_k, &hot, &smooth,
                    &smooth_dot, &out, &f1, &f2})
      *row = numbers(ld);
    label = reinterpret_cast<Int*>(numbers(ld));
    ends = numbers(N * C * kLanes);
    joined = reinterpret_cast<bool*>(take(N));
    teachers = reinterpret_cast<Teacher*>(take(T * sizeof(Teacher)));
    for (int r = 0; r < T; ++r) {
      Teacher layout{};
      Teacher& t = teachers ? teachers[r] : layout;
      t.z = numbers(tile);
      t.u = numbers(tile);
      t.a = teacher_learns ? numbers(tile) : nullptr;
      for (A** row : {&t.max, &t.factor, &t.P, &t.dot, &t.k, &t.y, &t.kl, &t.S, &t.scaled}) *row = numbers(ld);
      t.arg = reinterpret_cast<Int*>(numbers(ld));
    }
    resizers = plan.resizes ? reinterpret_cast<Resizer<A>*>(take(N * sizeof(Resizer<A>))) : nullptr;
    for (int e = 0; plan.resizes && e < N; ++e) {
      Resizer<A> layout{};
      if (is_resized(e)) (resizers ? resizers[e] : layout).lay_out(L, plan, e, numbers);
    }
  }
  bool is_resized(int e) const { return plan.resizes && plan.resizes[e].needed; }
  template <class F>
  SELFREG_ALWAYS void over_resizers(F f) {
    for (int e = 0; plan.resizes && e < N; ++e)
      if (is_resized(e)) f(resizers[e]);
  }

  // Planes a multiple of 4 KB apart, as those of 128 x 128 pixels: all channels of a pixel fall into the same few sets
  // of a cache, which does not hold them until they are used.
  bool shares_cache_sets(const View& v) const { return v.stride_c * int64_t(sizeof(A)) % 4096 == 0 && C > 8; }

  struct Rows {  // the tile's rows of one exit, in scratch or where they lie in memory
    const A* data;
    int64_t stride;
  };
  struct Teacher {
    A* z;       // [C] room for the logits
    A* u;       // [C] unnormalised target rows
    A* a;       // [C] sum over students of gradient * log-probability, where the teacher learns
    A* max;     // of the logits
    A* factor;  // target = factor * u
    A* P;       // sum of the target
    A* dot;     // with the student at hand: sum_c u_c y_c
    A* k;       // gradient of that loss at each pixel
    A* y;       // the student's y at this teacher's argmax
    A* kl;      // sum over students of gradient * log normaliser, where the teacher learns
    A* S;       // sum_c target_c a_c, where the teacher learns
    A* scaled;  // what multiplies u in the student's gradient
    Int* arg;   // argmax
    Rows logits;
    bool on;  // teaches the student at hand
  };

  struct Stream {  // a gradient on its way past the caches, see gradient_block()
    A* to;         // the tile's first pixel; null: it goes to z
    int64_t stride;
    A* ends;       // [C] last vectors of the tile before
    bool joins;    // with which this tile's first lines begin
    bool goes_on;  // this tile's last vectors are left to the next
  };
  struct Ahead {  // the exit that is read next, see expect()
    int exit;
    const char* data;
    int64_t channel, pixel;  // strides in bytes
    int64_t distance;        // of the prefetches, in bytes
    A* max;                  // of its logits; null where they cannot be read beside another exit's
    A* scratch;              // room for them; null where they are used as they lie in memory
    const A* counted;        // weights of pixels: those of 0 are cleared; null where there are none
  };

  const ExitLoss& L;
  const Plan& plan;
  const int C, N, T;
  const A tau;
  bool soft_two, gradient, teacher_learns;
  A class_w_sum, smoothing;
  int64_t ld;
  int64_t begin, spans, span;  // the tile's first pixel; it has `spans` times `span` consecutive ones, a row apart
  int64_t n, width;            // pixels of the tile; rounded up to vectors
  Ahead ahead, seen;           // of the pass at hand, and of one that is done and took a maximum
  bool uncounted;              // there are pixels in the tile (or beyond its end) that do not count
  char* memory;
  A *z, *next_z, *z2;
  A *max, *next_max, *sum, *sum2, *log_z, *label_w, *soft_w, *label_y, *label_k, *hot, *smooth, *smooth_dot, *out, *f1,
      *f2;
  Int* label;
  Teacher* teachers;
  Resizer<A>* resizers;  // [N], of the exits that are resized
  bool more;             // this worker's next tile follows
  A* ends;               // [N, C] see Stream
  bool* joined;          // [N]
  Rows logits;           // of the student at hand
  const A* peak;         // their maxima

  A class_weight(int c) const { return L.class_weight ? static_cast<const A*>(L.class_weight)[c] : A(1); }
  A* row(A* tile, int c) const { return tile + c * ld; }
  int taught_row(int e) const {
    for (int r = 0; r < T; ++r)
      if (L.teachers[r] == e) return r;
    return -1;
  }
  // The next exit from e on that is read as a student; N where there is none.
  int next_student(int e) const {
    while (e < N && taught_row(e) >= 0) ++e;
    return e;
  }
  int64_t entry(int r, int e) const { return int64_t(r) * N + e; }

  // Loops copy members into locals first: the compiler must assume that a store changes a member, never a local.
  template <class F>
  SELFREG_ALWAYS void over_pixels(F f) const {
    for (int64_t i = 0, end = width; i < end; i += kLanes) f(i);
  }

  // Calls f(pixel in B x H x W, first of the tile's) for each span.
  template <class F>
  SELFREG_ALWAYS void over_spans(F f) const {
    for (int64_t k = 0; k < spans; ++k) f(begin + k * plan.width, k * span);
  }
  // Calls f(offset in elements, first of the tile's pixels, number of pixels) for each run of an exit in the tile.
  template <class F>
  SELFREG_ALWAYS void over_runs(const View& v, const Runs& runs, F f) const {
    over_spans([&](int64_t pixel, int64_t first) {
      for_runs(v, runs, L, pixel, span, [&](int64_t offset, int64_t i, int64_t count) { f(offset, first + i, count); });
    });
  }
  bool is_one_run(const Runs& runs) const { return spans == 1 && runs.length - begin % runs.length >= n; }

  // The weight of every pixel in label and soft losses, and its label. Past the last pixel: weight 0, label 0.
  void pixel_weights() {
    const A* const weight = static_cast<const A*>(L.pixel_weight);
    over_spans([&](int64_t pixel, int64_t first) {
      for (int64_t i = 0; i < span; ++i) soft_w[first + i] = weight ? weight[pixel + i] : A(1);
    });
    for (int64_t i = n; i < width; ++i) soft_w[i] = label_w[i] = 0, label[i] = 0;
    if (L.labels) {
      over_spans([&](int64_t pixel, int64_t first) {
        switch (L.label_type) {
          case LabelType::uint8: read_labels(static_cast<const uint8_t*>(L.labels) + pixel, first); break;
          case LabelType::int32: read_labels(static_cast<const int32_t*>(L.labels) + pixel, first); break;
          case LabelType::int64: read_labels(static_cast<const int64_t*>(L.labels) + pixel, first); break;
        }
      });
      if (L.class_weight)
        for (int64_t i = 0; i < width; ++i) hot[i] = class_weight(int(label[i])) * A(1 - L.label_smoothing);
      if (L.mask_soft) memcpy(soft_w, label_w, n * sizeof(A));
    }
    const A* const counted = counted_weight();
    int zeros = n < width;
#pragma omp simd reduction(| : zeros)
    for (int64_t i = 0; i < n; ++i) zeros |= counted[i] == 0;
    uncounted = zeros;
  }
  template <class Label>
  void read_labels(const Label* labels, int64_t first) {
    const Label ignore = Label(L.ignore_index);
    const bool any_ignored = int64_t(ignore) == L.ignore_index;  // else no Label equals it
    const A* const weight = soft_w + first;
    A* const to = label_w + first;
    Int* const y = label + first;
#pragma omp simd
    for (int64_t i = 0; i < span; ++i) {
      const bool valid = !(any_ignored & (labels[i] == ignore));
      y[i] = valid ? Int(labels[i]) : 0;
      to[i] = valid ? weight[i] : A(0);
    }
  }
  // A pixel that counts for the labels counts for soft losses, if there are any.
  const A* counted_weight() const { return T ? soft_w : label_w; }

  // ---- reading and writing a tile ----

  // The exit that is read next comes from memory while the exponentials of this one are computed: memory and
  // arithmetic, one after the other, would take the sum of their times. Where its numbers need no conversion its
  // maximum is taken, too. Where its pixels are not one run it is not worth the trouble; then the prefetches fall on
  // this worker's scratch.
  void expect(int e) {
    ahead = {e, reinterpret_cast<const char*>(z), 0, 0, 0, nullptr, nullptr, nullptr};
    const bool of_next_tile = e == N;
    if (of_next_tile) e = T ? L.teachers[0] : 0;
    if (is_resized(e) || seen.exit == e) return;
    const View& v = L.exits[e];
    const Runs runs = runs_of(v, L);
    const bool apart = shares_cache_sets(v);
    if (runs.step != 1 || !is_one_run(runs) || (of_next_tile && apart)) return;
    const int64_t bytes = L.dtype == DType::float64 ? 8 : L.dtype == DType::float32 ? 4 : 2;
    over_runs(v, runs, [&](int64_t offset, int64_t, int64_t) {
      ahead.data = static_cast<const char*>(v.data) + (offset + (of_next_tile ? n : 0)) * bytes;
      ahead.channel = v.stride_c * bytes, ahead.pixel = bytes;
    });
    if (of_next_tile || n < width || bytes != sizeof(A)) return;
    ahead.distance = apart ? kBlock * ahead.channel : kAhead;
    const int r = taught_row(e);
    begin_max(ahead.max = r < 0 ? next_max : teachers[r].max);
    if (apart || uncounted) ahead.scratch = r < 0 ? next_z : teachers[r].z;
    if (uncounted) ahead.counted = counted_weight();
  }
  // One step of that, beside channels [c0, c0 + CB) of pixels i.
  template <int CB>
  static SELFREG_ALWAYS void look(const Ahead& next, int64_t ld, int c0, int64_t i) {
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
  void begin_max(A* m) const {
    const V lowest = fill<V>(A(sizeof(A) == 4 ? -3.402823466e38 : -1.7976931348623157e308));
    over_pixels([&](int64_t i) { store(m + i, lowest); });
  }

  template <class S>
  void read_as(const View& v, A* to, int c0, int c1) {
    const S* data = static_cast<const S*>(v.data);
    const Runs runs = runs_of(v, L);
    over_runs(v, runs, [&](int64_t offset, int64_t first, int64_t count) {
      if (runs.step == 1) {
        for (int c = c0; c < c1; ++c) convert(row(to, c) + first, data + offset + c * v.stride_c, count);
        return;
      }
      // Channels are close together: few pixels at a time, so that a cache line is read once.
      for (int64_t i = 0; i < count; i += kLanes) {
        const S* src = data + offset + i * runs.step;
        A* dst = to + first + i;
        if (channels_together(v) && count - i >= kLanes) {
          over_channel_blocks([&](int c) {
            V pixels[kLanes];
            for (int p = 0; p < kLanes; ++p) {
              A values[kLanes];
              convert(values, src + p * runs.step + c, kLanes);
              pixels[p] = load<V>(values);
            }
            transpose<V, VInt>(pixels);
            for (int k = 0; k < kLanes; ++k) store(dst + (c + k) * ld, pixels[k]);
          });
          continue;
        }
        for (int64_t p = 0; p < kLanes && p < count - i; ++p)
          for (int c = c0; c < c1; ++c) convert(dst[c * ld + p], src[p * runs.step + c * v.stride_c]);
      }
    });
  }
  // channels_last, with a vector of channels or more.
  bool channels_together(const View& v) const { return v.stride_c == 1 && C >= kLanes; }
  // All channels in blocks of a vector; the last block overlaps the one before.
  template <class F>
  SELFREG_ALWAYS void over_channel_blocks(F f) const {
    for (int c = 0; c < C; c += kLanes) f(c + kLanes <= C ? c : C - kLanes);
  }
  void read(int e, A* to, int c0, int c1) {
    if (is_resized(e)) {
      const Resizer<A>& resizer = resizers[e];
      if (c1 - c0 == kBlock) {
        resizer.template interpolate<kBlock>(c0, row(to, c0), ld);
      } else {
        for (int c = c0; c < c1; ++c) resizer.template interpolate<1>(c, row(to, c), ld);
      }
    } else if constexpr (sizeof(A) == 8) {
      read_as<double>(L.exits[e], to, c0, c1);
    } else {
      switch (L.dtype) {
        case DType::float32: read_as<float>(L.exits[e], to, c0, c1); break;
        case DType::float16: read_as<Half>(L.exits[e], to, c0, c1); break;
        default: read_as<BFloat>(L.exits[e], to, c0, c1);
      }
    }
    if (width > n)
      for (int c = c0; c < c1; ++c)
        for (int64_t i = n; i < width; ++i) row(to, c)[i] = 0;
  }
  // Finds the maximum over channels, and the logits: in memory as they are, where they can be used so; else read into
  // scratch, and cleared at pixels that do not count (a NaN there reaches nothing).
  Rows read_with_max(int e, A*& scratch, A*& m) {
    if (seen.exit == e) {
      if (m != seen.max) next_max = m, m = seen.max;
      if (!seen.scratch) return {reinterpret_cast<const A*>(seen.data), L.exits[e].stride_c};
      if (scratch != seen.scratch) next_z = scratch, scratch = seen.scratch;
      return {scratch, ld};
    }
    const View& v = L.exits[e];
    begin_max(m);
    const bool resized = is_resized(e);
    const Runs runs = runs_of(v, L);
    const bool row_by_row = resized || runs.step == 1, apart = !resized && shares_cache_sets(v);
    const bool in_place = row_by_row && !resized && !uncounted && !apart && is_one_run(runs) &&
                          L.dtype == (sizeof(A) == 4 ? DType::float32 : DType::float64);
    Rows rows{scratch, ld};
    if (in_place) {
      over_runs(v, runs,
                [&](int64_t offset, int64_t, int64_t) { rows = {static_cast<const A*>(v.data) + offset, v.stride_c}; });
    } else if (!row_by_row) {
      read(e, scratch, 0, C);
    }
    for (int c0 = 0; c0 < C; c0 += kBlock) {
      const int c1 = c0 + kBlock < C ? c0 + kBlock : C;
      if (row_by_row && apart) prefetch_rows(v, runs, c0 + 2 * kBlock, c0 + 3 * kBlock);
      if (row_by_row && !in_place) read(e, scratch, c0, c1);
      if (uncounted) clear_uncounted(scratch, c0, c1);
      const int64_t stride = rows.stride;
      const A* const x = rows.data + c0 * stride;
      if (c1 - c0 == kBlock) {
        over_pixels([&](int64_t i) {
          const V x01 = larger(load<V>(x + i), load<V>(x + stride + i));
          const V x23 = larger(load<V>(x + 2 * stride + i), load<V>(x + 3 * stride + i));
          store(m + i, larger(larger(x01, x23), load<V>(m + i)));
        });
      } else {
        for (int c = 0; c < c1 - c0; ++c)
          over_pixels([&](int64_t i) { store(m + i, larger(load<V>(x + c * stride + i), load<V>(m + i))); });
      }
    }
    return rows;
  }
  // A few rows ahead of the reading, where the whole next tile cannot be fetched ahead.
  void prefetch_rows(const View& v, const Runs& runs, int c0, int c1) {
    const int64_t bytes = L.dtype == DType::float64 ? 8 : L.dtype == DType::float32 ? 4 : 2;
    over_runs(v, runs, [&](int64_t offset, int64_t, int64_t count) {
      for (int c = c0; c < c1 && c < C; ++c) {
        const char* p = static_cast<const char*>(v.data) + (offset + c * v.stride_c) * bytes;
        for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
      }
    });
  }
  void clear_uncounted(A* to, int c0, int c1) {
    const A* const weight = counted_weight();
    for (int c = c0; c < c1; ++c) {
      A* const x = row(to, c);
      over_pixels([&](int64_t i) { store(x + i, load<V>(weight + i) == A(0) ? V{} : load<V>(x + i)); });
    }
  }

  template <class S>
  void write_as(const View& v, int c0, int c1) {
    S* data = static_cast<S*>(v.data);
    const Runs runs = runs_of(v, L);
    over_runs(v, runs, [&](int64_t offset, int64_t first, int64_t count) {
      if (runs.step == 1) {
        for (int c = c0; c < c1; ++c) convert(data + offset + c * v.stride_c, row(z, c) + first, count);
        return;
      }
      for (int64_t i = 0; i < count; i += kLanes) {
        S* dst = data + offset + i * runs.step;
        const A* src = z + first + i;
        if (channels_together(v) && count - i >= kLanes) {
          over_channel_blocks([&](int c) {
            V pixels[kLanes];
            for (int k = 0; k < kLanes; ++k) pixels[k] = load<V>(src + (c + k) * ld);
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
          for (int c = c0; c < c1; ++c) convert(dst[p * runs.step + c * v.stride_c], src[c * ld + p]);
      }
    });
  }
  // Writes channels [c0, c1) of the gradient, which stand in z.
  void write(const View& v, int c0, int c1) {
    if constexpr (sizeof(A) == 8) {
      write_as<double>(v, c0, c1);
    } else {
      switch (L.dtype) {
        case DType::float32: write_as<float>(v, c0, c1); break;
        case DType::float16: write_as<Half>(v, c0, c1); break;
        default: write_as<BFloat>(v, c0, c1);
      }
    }
  }

  // ---- phase 1 ----

  void teach(int r) {
    Teacher& t = teachers[r];
    t.logits = read_with_max(L.teachers[r], t.z, t.max);
    if (L.target == Target::argmax) {
      argmax(t);
    } else {
      expect(r + 1 < T ? L.teachers[r + 1] : next_student(0));
      switch (soft_two ? 1 : small_integer(tau)) {
        case 1: target_row<1>(t); break;
        case 2: target_row<2>(t); break;
        case 3: target_row<3>(t); break;
        case 4: target_row<4>(t); break;
        default: target_row<0>(t);
      }
      remember();
    }
    if (teacher_learns) {
      memset(t.a, 0, C * ld * sizeof(A));
      memset(t.kl, 0, ld * sizeof(A));
    }
  }

  // First of the largest, as torch.argmax; NaN counts as the largest.
  void argmax(Teacher& t) {
    over_pixels([&](int64_t i) {
      V best = load<V>(t.logits.data + i);
      VInt arg{};
      for (int c = 1; c < C; ++c) {
        V v = load<V>(t.logits.data + c * t.logits.stride + i);
        VInt better = (v > best) | ((v != v) & (best == best));
        best = better ? v : best;
        arg = better ? VInt{} + Int(c) : arg;
      }
      store(t.arg + i, arg);
    });
  }

  // POWER: exp(y) = u^POWER, so that Z needs no exponential of its own; 0: it does. 1 also stands for the renormalised
  // target, whose normaliser is sum u.
  template <int POWER>
  void target_row(Teacher& t) {
    A *const q = sum, *const z_one = sum2;
    over_pixels([&](int64_t i) {
      store(q + i, V{});
      store(z_one + i, V{});
    });
    int c = 0;
    for (; c + kBlock <= C; c += kBlock) target_block<POWER, kBlock>(t, c);
    for (; c < C; ++c) target_block<POWER, 1>(t, c);
    over_pixels([&](int64_t i) {
      const V Q = load<V>(q + i), Z = load<V>(z_one + i);
      const V factor = POWER == 1 ? A(1) / Q : raw_target_factor(Z, tau);
      store(t.factor + i, factor);
      store(t.P + i, POWER == 1 ? fill<V>(A(1)) : Q * factor);
    });
  }
  template <int POWER, int CB>
  void target_block(Teacher& t, int c0) {
    const A rate = A(kLog2e / double(tau)), rate_one = A(kLog2e);
    const int64_t stride = ld;
    const Ahead next = ahead;
    const int64_t from_stride = t.logits.stride;
    const A *const from = t.logits.data + c0 * from_stride, *const m = t.max;
    A *const to = row(t.u, c0), *const q = sum, *const z_one = sum2;
    over_pixels([&](int64_t i) {
      look<CB>(next, stride, c0, i);
      V Q = load<V>(q + i), Z = load<V>(z_one + i);
      for (int k = 0; k < CB; ++k) {
        const V y = load<V>(from + k * from_stride + i) - load<V>(m + i), u = exp2_of(y, rate);
        store(to + k * stride + i, u);
        Q += u;
        if constexpr (POWER > 1) Z += power<POWER>(u);
        if constexpr (POWER == 0) Z += exp2_of(y, rate_one);
      }
      store(q + i, Q);
      store(z_one + i, Z);
    });
  }

  // ---- phase 2 ----

  void student(int e, double* partial, bool with_gradient) {
    const int self = taught_row(e);
    const bool wanted = gradient && L.grads[e].data;
    bool soft = false;
    for (int r = 0; r < T; ++r) soft |= teachers[r].on = r != self;
    const bool learning_teacher = teacher_learns && self >= 0 && wanted && !partial;
    const bool one = L.labels || (soft && !soft_two) || (learning_teacher && !soft_two), two = soft && soft_two;
    if (!one && !two && !learning_teacher) {
      if (partial) zero_losses(e, partial);
      if (wanted && with_gradient) write_zeros(e);
      return;
    }
    if (self >= 0) {
      logits = teachers[self].logits;
      peak = teachers[self].max;
    } else {
      logits = read_with_max(e, z, max);
      peak = max;
    }
    pick();
    gradient_of_losses(e);
    expect(partial ? next_student(e + 1) : N);
    over_pixels([&](int64_t i) {
      store(sum + i, V{});
      store(sum2 + i, V{});
      store(smooth_dot + i, V{});
      for (int r = 0; r < T; ++r) store(teachers[r].dot + i, V{});
    });
    const bool say = teacher_learns && partial;
    const int power = self >= 0 && L.target == Target::raw ? small_integer(tau) : 0;
    if (one && two) {
      exponentials<true, true>(say);
    } else if (two) {
      exponentials<false, true>(say);
    } else {
      switch (power) {
        case 1: exponentials<true, false, 1>(say, self); break;
        case 2: exponentials<true, false, 2>(say, self); break;
        case 3: exponentials<true, false, 3>(say, self); break;
        case 4: exponentials<true, false, 4>(say, self); break;
        default: exponentials<true, false>(say);
      }
    }
    remember();
    if (say) add_log_normalizers();
    if (partial) losses(e, partial);
    if (!wanted || !with_gradient) return;
    if (learning_teacher) teacher_sum(teachers[self]);
    if (one && two) {
      write_gradient<true, true>(e, soft, learning_teacher ? &teachers[self] : nullptr);
    } else if (two) {
      write_gradient<false, true>(e, soft, learning_teacher ? &teachers[self] : nullptr);
    } else {
      write_gradient<true, false>(e, soft, learning_teacher ? &teachers[self] : nullptr);
    }
  }

  // The logits at the label and at the teachers' argmax, less the maximum.
  void pick() {
    if (L.labels)
      for (int64_t i = 0; i < width; ++i) label_y[i] = logits.data[label[i] * logits.stride + i] - peak[i];
    if (L.target == Target::argmax)
      for (int r = 0; r < T; ++r)
        for (int64_t i = 0; i < width; ++i)
          teachers[r].y[i] = logits.data[teachers[r].arg[i] * logits.stride + i] - peak[i];
  }

  // The gradient of every loss of exit e at every pixel: its gradient as given x the mean's divisor x the pixel weight.
  // Of these, 0 leaves out: the others may be infinite or NaN.
  void gradient_of_losses(int e) {
    if (!gradient) return;
    auto fill_row = [&](int r, A* k, const A* weight, A norm) {
      if (L.grad_losses && L.reduction == Reduction::none) {
        const A* const map = static_cast<const A*>(L.grad_losses) + entry(r, e) * plan.pixels;
        over_spans([&](int64_t pixel, int64_t first) {
          for (int64_t i = 0; i < span; ++i)
            k[first + i] = weight[first + i] == 0 ? A(0) : map[pixel + i] * weight[first + i];
        });
        for (int64_t i = n; i < width; ++i) k[i] = 0;
      } else {
        const A g = L.grad_losses ? static_cast<const A*>(L.grad_losses)[entry(r, e)] : A(L.weights[entry(r, e)]);
        const A gain = g == 0 ? A(0) : g * norm;
        over_pixels([&](int64_t i) {
          const V w = load<V>(weight + i);
          store(k + i, w == A(0) ? V{} : w * gain);
        });
      }
    };
    if (L.labels) fill_row(0, label_k, label_w, A(plan.norm[0]));
    for (int r = 0; r < T; ++r)
      if (teachers[r].on) fill_row(r + 1, teachers[r].k, soft_w, A(plan.norm[1]));
  }

  // Exponentials of the logits into z (ONE: exp(y)) and z2 (TWO: exp(y / tau)), their sums, and the dot products of
  // the target rows with y. `say`: also tell each learning teacher gradient * y. POWER > 0: this exit is teacher
  // `self`, whose u^POWER are the exponentials.
  template <bool ONE, bool TWO, int POWER = 0>
  void exponentials(bool say, int self = 0) {
    int c = 0;
    for (; c + kBlock <= C; c += kBlock) exponential_block<ONE, TWO, POWER, kBlock>(c, say, self);
    for (; c < C; ++c) exponential_block<ONE, TWO, POWER, 1>(c, say, self);
  }
  template <bool ONE, bool TWO, int POWER, int CB>
  void exponential_block(int c0, bool say, int self) {
    const A rate = A(kLog2e), rate2 = A(kLog2e / double(tau));
    const int64_t stride = ld;
    const Ahead next = ahead;
    const A* const own = POWER ? row(teachers[self].u, c0) : nullptr;
    const int64_t from_stride = logits.stride;
    const A *const from = logits.data + c0 * from_stride, *const m = peak;
    A *const x = row(z, c0), *const x2 = TWO ? row(z2, c0) : nullptr, *const s1 = sum, *const s2 = sum2;
    const bool smooth_dots = L.labels && smoothing != 0;
    const int count = L.target == Target::argmax ? 0 : T;
    const Teacher* const all = teachers;
    over_pixels([&](int64_t i) {
      look<CB>(next, stride, c0, i);
      V y[CB];
      for (int k = 0; k < CB; ++k) y[k] = load<V>(from + k * from_stride + i) - load<V>(m + i);
      if constexpr (ONE) {
        V s = load<V>(s1 + i);
        for (int k = 0; k < CB; ++k) {
          V u;
          if constexpr (POWER > 0) {
            u = power<POWER>(load<V>(own + k * stride + i));
          } else {
            u = exp2_of(y[k], rate);
          }
          store(x + k * stride + i, u);
          s += u;
        }
        store(s1 + i, s);
      }
      if constexpr (TWO) {
        V s = load<V>(s2 + i);
        for (int k = 0; k < CB; ++k) {
          const V u = exp2_of(y[k], rate2);
          store(x2 + k * stride + i, u);
          s += u;
        }
        store(s2 + i, s);
      }
      for (int r = 0; r < count; ++r) {
        if (!all[r].on) continue;
        A* const dots = all[r].dot + i;
        const A* const u = all[r].u + c0 * stride + i;
        V dot = load<V>(dots);
        for (int k = 0; k < CB; ++k) {
          const V target = load<V>(u + k * stride);
          dot += target == A(0) ? V{} : target * y[k];  // 0 log 0 = 0
        }
        store(dots, dot);
      }
      if (say) tell_teachers<CB>(c0, i, y);
      if (smooth_dots) {
        V dot = load<V>(smooth_dot + i);
        for (int k = 0; k < CB; ++k)
          if (class_weight(c0 + k) != 0) dot += y[k] * class_weight(c0 + k);
        store(smooth_dot + i, dot);
      }
    });
  }
  // To each teacher that learns: gradient * y of this student.
  template <int CB>
  void tell_teachers(int c0, int64_t i, const V (&y)[CB]) {
    for (int r = 0; r < T; ++r) {
      const Teacher& t = teachers[r];
      if (!t.on) continue;
      const V g = load<V>(t.k + i);
      for (int k = 0; k < CB; ++k) {
        A* a = row(t.a, c0 + k) + i;
        store(a, load<V>(a) + (g == A(0) ? V{} : g * y[k]));
      }
    }
  }
  void add_log_normalizers() {
    const A scale = soft_two ? tau : A(1);
    const A* normalizer = soft_two ? sum2 : sum;
    for (int r = 0; r < T; ++r)
      if (teachers[r].on)
        over_pixels([&](int64_t i) {
          const V log_normalizer = log2(load<V>(normalizer + i)) * (A(kLn2) * scale);
          store(teachers[r].kl + i, load<V>(teachers[r].kl + i) + load<V>(teachers[r].k + i) * log_normalizer);
        });
  }

  // ---- losses of one exit ----

  void losses(int e, double* partial) {
    auto logarithm_of = [&](const A* z_sum) {
      over_pixels([&](int64_t i) { store(log_z + i, log2(load<V>(z_sum + i)) * A(kLn2)); });
    };
    if (L.labels || !soft_two) logarithm_of(sum);
    if (L.labels) {
      put(0, e, label_w, partial, [&](int64_t i) {
        return label_loss(load<V>(hot + i), load<V>(label_y + i), load<V>(log_z + i), smoothing, class_w_sum,
                          load<V>(smooth_dot + i));
      });
    } else {
      put_zeros(0, e, partial);
    }
    if (soft_two) logarithm_of(sum2);
    const A z_scale = soft_two ? tau * tau : tau;
    for (int r = 0; r < T; ++r) {
      const Teacher& t = teachers[r];
      if (!t.on) {
        put_zeros(r + 1, e, partial);
      } else if (L.target == Target::argmax) {
        put(r + 1, e, soft_w, partial, [&](int64_t i) { return load<V>(log_z + i) - load<V>(t.y + i); });
      } else {
        put(r + 1, e, soft_w, partial, [&](int64_t i) {
          const V dot = load<V>(t.dot + i) * load<V>(t.factor + i);
          return soft_loss(load<V>(t.P + i), dot, load<V>(log_z + i), z_scale, tau);
        });
      }
    }
  }
  // The weighted map of a loss to its entry of the matrix.
  template <class F>
  void put(int r, int e, const A* weight, double* partial, F loss) {
    using Sums = typename VecOf<A>::Sums;
    Sums sums{};
    const bool map = L.reduction == Reduction::none;
    over_pixels([&](int64_t i) {
      const V w = load<V>(weight + i), weighted = w == A(0) ? V{} : w * loss(i);
      if (map) store(out + i, weighted);
      sums += __builtin_convertvector(weighted, Sums);
    });
    if (map) {
      A* const to = static_cast<A*>(L.losses) + entry(r, e) * plan.pixels;
      over_spans([&](int64_t pixel, int64_t first) { memcpy(to + pixel, out + first, span * sizeof(A)); });
      return;
    }
    double sum_of_lanes = 0;
    for (int k = 0; k < kLanes; ++k) sum_of_lanes += sums[k];
    partial[entry(r, e)] = sum_of_lanes;
  }
  void put_zeros(int r, int e, double* partial) {
    if (L.reduction == Reduction::none) {
      A* const to = static_cast<A*>(L.losses) + entry(r, e) * plan.pixels;
      over_spans([&](int64_t pixel, int64_t) { memset(to + pixel, 0, span * sizeof(A)); });
    } else {
      partial[entry(r, e)] = 0;
    }
  }
  void zero_losses(int e, double* partial) {
    for (int r = 0; r <= T; ++r) put_zeros(r, e, partial);
  }

  // ---- gradient of one exit ----

  // S = sum_c target_c a_c of a teacher that learns; a becomes target_c a_c.
  void teacher_sum(Teacher& t) {
    over_pixels([&](int64_t i) { store(t.S + i, V{}); });
    for (int c = 0; c < C; ++c)
      over_pixels([&](int64_t i) {
        A* a = row(t.a, c) + i;
        const V target = load<V>(row(t.u, c) + i) * load<V>(t.factor + i);
        const V said = target == A(0) ? V{} : target * (load<V>(a) - load<V>(t.kl + i));
        store(a, said);
        store(t.S + i, load<V>(t.S + i) + said);
      });
  }

  // gradient_c = exp(y_c) f1 + exp(y_c / tau) f2 - sum_r scaled_r u_rc - smooth w_c - hot[c = label] - ..., a few rows
  // after the other in place of the exponentials. `self` is this exit as a teacher that learns.
  template <bool ONE, bool TWO>
  void write_gradient(int e, bool soft, const Teacher* self) {
    const bool arg = L.target == Target::argmax;
    over_pixels([&](int64_t i) {
      V q1{}, q2{};  // sums of the targets of either softmax
      if (L.labels) {
        const V k = load<V>(label_k + i), hot_i = load<V>(hot + i);  // this may be infinite, and so may class_w_sum
        q1 += k == A(0) ? V{} : k * (hot_i + smoothing * class_w_sum);
        store(label_k + i, k == A(0) ? V{} : k * hot_i);
        store(smooth + i, k * smoothing);
      }
      for (int r = 0; r < T; ++r) {
        const Teacher& t = teachers[r];
        if (!t.on) continue;
        const V k = load<V>(t.k + i) * (arg ? A(1) : tau);
        if (!arg) store(t.scaled + i, k * load<V>(t.factor + i));
        (soft_two ? q2 : q1) += arg ? k : k * load<V>(t.P + i);
      }
      if (self && !soft_two) q1 += load<V>(self->S + i);
      if constexpr (ONE) store(f1 + i, q1 / load<V>(sum + i));
      if constexpr (TWO) store(f2 + i, q2 / load<V>(sum2 + i));
    });
    const View& v = L.grads[e];
    const bool resized = is_resized(e), row_by_row = !resized && runs_of(v, L).step == 1;
    const Stream past_caches = row_by_row ? stream_of(e) : Stream{};
    joined[e] = past_caches.goes_on;
    int gathered = 0;
    for (int c = 0; c < C; c += kBlock) {
      const int c1 = c + kBlock < C ? c + kBlock : C;
      if (c1 - c == kBlock) {
        gradient_block<ONE, TWO, kBlock>(c, soft, self, past_caches);
      } else {
        for (int k = c; k < c1; ++k) gradient_block<ONE, TWO, 1>(k, soft, self, past_caches);
      }
      if (row_by_row && !past_caches.to) write(v, c, c1);
      if (resized && (c1 - gathered >= kLanes || c1 == C)) {
        resizers[e].gather(gathered, c1, row(z, gathered), ld);
        gathered = c1;
      }
    }
    if (!resized && !row_by_row) write(v, 0, C);
  }
  // How the gradient of exit e is written past the caches. Not if vectors are too short to be put together from two.
  Stream stream_of(int e) const {
    const View& v = L.grads[e];
    const Runs runs = runs_of(v, L);
    Stream stream{};
    if (!plan.stream || kVecBytes < 32 || !is_one_run(runs) ||
        L.dtype != (sizeof(A) == 4 ? DType::float32 : DType::float64))
      return stream;
    over_runs(v, runs, [&](int64_t offset, int64_t, int64_t) { stream.to = static_cast<A*>(v.data) + offset; });
    stream.stride = v.stride_c;
    stream.ends = ends + int64_t(e) * C * kLanes;
    stream.joins = joined[e];
    const int64_t next = begin + n, left = plan.pixels - next;
    const int64_t next_n = left < plan.tile_columns ? left : plan.tile_columns;
    const bool one_run = next % runs.length && runs.length - next % runs.length >= next_n;
    stream.goes_on = more && !plan.resizes && one_run && next_n >= kLanes;
    return stream;
  }
  // To z, or past the caches: whole lines of memory, each out of two neighbouring vectors, for rows begin anywhere; the
  // last vector of a row waits for the next tile. (A copy from z waits until memory has taken what was copied before,
  // and a line in two parts is read from memory first.)
  template <bool ONE, bool TWO, int CB>
  void gradient_block(int c0, bool soft, const Teacher* self, const Stream& past_caches) {
    const bool labelled = L.labels, smooth_labels = labelled && smoothing != 0, arg = L.target == Target::argmax;
    const int count = soft ? T : 0;
    const int64_t offset = c0 * ld, stride = ld;
    A *const x = z + offset, *const x2 = TWO ? z2 + offset : nullptr;
    const A *const one = f1, *const two = f2, *const at_label = label_k;
    const Int* const y = label;
    const Teacher* const all = teachers;
    const Stream lines = past_caches;
    const int64_t first = lines.joins ? 0 : kLanes, last = n / kLanes * kLanes - kLanes;
    int64_t head[CB] = {};  // pixels before the first whole line
    A* line[CB] = {};       // where that of the vectors at i - kLanes and i begins, less i
    VInt lanes[CB] = {};    // which of theirs it has
    V before[CB] = {};
    for (int k = 0; k < CB && lines.to; ++k) {
      A* const to = lines.to + (c0 + k) * lines.stride;
      head[k] = -int64_t(reinterpret_cast<uintptr_t>(to) / sizeof(A)) & (kLanes - 1);
      line[k] = to + head[k] - kLanes;
      for (int lane = 0; lane < kLanes; ++lane) lanes[k][lane] = Int(lane + head[k]);
      if (lines.joins) before[k] = load<V>(lines.ends + (c0 + k) * kLanes);
    }
    over_pixels([&](int64_t i) {
      V g[CB] = {};
      for (int k = 0; k < CB; ++k) {
        if constexpr (ONE) g[k] = load<V>(x + k * stride + i) * load<V>(one + i);
        if constexpr (TWO) g[k] += load<V>(x2 + k * stride + i) * load<V>(two + i);
      }
      for (int r = 0; r < count; ++r) {
        const Teacher& t = all[r];
        if (!t.on) continue;
        if (arg) {
          const VInt top = load<VInt>(t.arg + i);
          for (int k = 0; k < CB; ++k) g[k] = top == Int(c0 + k) ? g[k] - load<V>(t.k + i) : g[k];
        } else {
          const V scaled = load<V>(t.scaled + i);
          const A* const u = t.u + offset + i;
          for (int k = 0; k < CB; ++k) g[k] -= scaled * load<V>(u + k * stride);
        }
      }
      if (labelled) {
        const VInt class_of = load<VInt>(y + i);
        const V hot_k = load<V>(at_label + i);
        for (int k = 0; k < CB; ++k) g[k] = class_of == Int(c0 + k) ? g[k] - hot_k : g[k];
      }
      if (smooth_labels) {
        const V smooth_k = load<V>(smooth + i);
        for (int k = 0; k < CB; ++k) g[k] -= smooth_k == A(0) ? V{} : smooth_k * class_weight(c0 + k);
      }
      if (self) {
        for (int k = 0; k < CB; ++k) g[k] -= load<V>(self->a + offset + k * stride + i);
        if (soft_two) {
          const V S = load<V>(self->factor + i) * load<V>(self->S + i);
          for (int k = 0; k < CB; ++k) g[k] += load<V>(self->u + offset + k * stride + i) * S;
        }
      }
      if (lines.to && i >= first && i <= last)
        for (int k = 0; k < CB; ++k) stream(line[k] + i, shuffle(before[k], g[k], lanes[k]));
      if (!lines.to || i < first || i >= last)
        for (int k = 0; k < CB; ++k) store(x + k * stride + i, g[k]);
      for (int k = 0; k < CB; ++k) before[k] = g[k];
    });
    if (!lines.to) return;
    for (int k = 0; k < CB; ++k) {  // what is left of both ends
      A* const to = lines.to + (c0 + k) * lines.stride;
      const A* const from = x + k * stride;
      const int64_t whole = last < first ? 0 : last - first + kLanes;
      const int64_t begins = lines.joins ? head[k] - kLanes : head[k], ends = begins + whole;
      for (int64_t i = 0; i < begins && i < n; ++i) to[i] = from[i];
      for (int64_t i = ends > 0 ? ends : 0; i < n && !lines.goes_on; ++i) to[i] = from[i];
      if (lines.goes_on) store(lines.ends + (c0 + k) * kLanes, before[k]);
    }
  }
  void write_zeros(int e) {
    if (is_resized(e)) return;  // nothing is added to its sums
    memset(z, 0, C * ld * sizeof(A));
    write(L.grads[e], 0, C);
  }
};

// ---- entry points ----------------------------------------------------------------------------------------------

template <class A, class Label>
PixelCounts count_as(const ExitLoss& L, const Label* labels, int64_t begin, int64_t end) {
  const A* weight = static_cast<const A*>(L.pixel_weight);
  const A* class_weight = static_cast<const A*>(L.class_weight);
  PixelCounts counts{0, 0, -1};
  if (labels && !weight && !class_weight) {  // the usual case, without a branch
    const Label ignore = Label(L.ignore_index), classes = Label(L.C);
    const bool any_ignored = int64_t(ignore) == L.ignore_index, any_large = int64_t(classes) == L.C;
    int64_t valid = 0, bad = 0;
#pragma omp simd reduction(+ : valid, bad)
    for (int64_t i = begin; i < end; ++i) {
      const bool counted = !(any_ignored & (labels[i] == ignore));
      valid += counted;
      bad += counted & ((labels[i] < 0) | (any_large & (labels[i] >= classes)));
    }
    counts.label = double(valid);
    counts.soft = double(L.mask_soft ? valid : end - begin);
    if (!bad) return counts;
    counts = {0, 0, -1};
  }
  for (int64_t i = begin; i < end; ++i) {
    const double w = weight ? double(weight[i]) : 1.0;
    const bool valid = labels && int64_t(labels[i]) != L.ignore_index;
    if (valid) {
      const int64_t y = int64_t(labels[i]);
      if (y < 0 || y >= L.C) {
        if (counts.bad_label < 0) counts.bad_label = i;
        continue;
      }
      if (w != 0) counts.label += class_weight ? w * double(class_weight[y]) : w;
    }
    if (valid || !L.mask_soft) counts.soft += w;
  }
  return counts;
}

template <class A>
PixelCounts count(const ExitLoss& L, int64_t begin, int64_t end) {
  switch (L.label_type) {
    case LabelType::uint8: return count_as<A>(L, static_cast<const uint8_t*>(L.labels), begin, end);
    case LabelType::int32: return count_as<A>(L, static_cast<const int32_t*>(L.labels), begin, end);
    default: return count_as<A>(L, static_cast<const int64_t*>(L.labels), begin, end);
  }
}

template <class A>
int64_t run_tiles(const ExitLoss& L, const Plan& plan, int64_t begin, int64_t end, double* partial) {
  Worker<A> worker(L, plan);
  if (!worker.missing) worker.run(begin, end, partial);
  return worker.missing;
}

PixelCounts count_any(const ExitLoss& L, int64_t begin, int64_t end) {
  return L.dtype == DType::float64 ? count<double>(L, begin, end) : count<float>(L, begin, end);
}

int64_t run_any(const ExitLoss& L, const Plan& plan, int64_t begin, int64_t end, double* partial) {
  return L.dtype == DType::float64 ? run_tiles<double>(L, plan, begin, end, partial)
                                   : run_tiles<float>(L, plan, begin, end, partial);
}

void join_any(const ExitLoss& L, const Plan& plan, int e, int64_t begin, int64_t end) {
  for (int64_t border = begin; border < end; ++border) {
    const int64_t image = border / (plan.bands - 1), below = border % (plan.bands - 1) + 1;
    L.dtype == DType::float64 ? join_rows<double>(L, plan, e, image, below)
                              : join_rows<float>(L, plan, e, image, below);
  }
}

}  // namespace

#define SELFREG_TEXT(a) #a
#define SELFREG_STRING(a) SELFREG_TEXT(a)

namespace selfreg {

const CpuKernels& SELFREG_NAME(cpu_kernels_, SELFREG_ISA)() {
  static constexpr CpuKernels kernels{SELFREG_STRING(SELFREG_ISA), count_any, run_any,
                                      SELFREG_NAME(run_small_exits_, SELFREG_ISA), join_any};
  return kernels;
}

}  // namespace selfreg

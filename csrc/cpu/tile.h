// What a worker of full_size.cpp holds of the tile at hand. A tile is a block of pixels with all channels; rows of a
// channel are contiguous, so that a vector holds pixels and no sum over channels crosses lanes.
#pragma once

#include "cpu.h"
#include "memory.h"
#include "resize.h"
#include "vec.h"

namespace {

using namespace selfreg;

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

// The tile's rows of one exit, in scratch or where they lie in memory.
template <class A>
struct Rows {
  const A* data;
  int64_t stride;
};

// Of an exit that teaches: [C] rows, then single ones.
template <class A>
struct Teacher {
  A* z;                         // [C] room for the logits
  A* u;                         // [C] unnormalised target rows
  A* a;                         // [C] sum over students of gradient * log-probability, where the teacher learns
  A* max;                       // of the logits
  A* factor;                    // target = factor * u
  A* P;                         // sum of the target
  A* dot;                       // with the student at hand: sum_c u_c y_c
  A* k;                         // gradient of that loss at each pixel
  A* y;                         // the student's y at this teacher's argmax
  A* kl;                        // sum over students of gradient * log normaliser, where the teacher learns
  A* S;                         // sum_c target_c a_c, where the teacher learns
  A* scaled;                    // what multiplies u in the student's gradient
  typename VecOf<A>::Int* arg;  // argmax
  Rows<A> logits;
  bool on;  // teaches the student at hand
};

template <class A>
struct TileWork {
  using V = typename VecOf<A>::V;
  using Int = typename VecOf<A>::Int;
  static constexpr int kLanes = sizeof(V) / sizeof(A);
  static constexpr int kBlock = 4;  // channels whose sums stay in registers together

  const ExitLoss& L;
  const Plan& plan;
  const int C, N, T;
  const A tau;
  const bool soft_two, gradient, teacher_learns;  // soft losses have exp(y / tau), not exp(y); one is wanted
  A class_w_sum, smoothing;  // the sum of the weights of classes; what label smoothing gives to one of weight 1
  int64_t ld;  // from a row to the next: a line more than a multiple of the vector, so that rows share no cache sets
  int64_t begin, spans, span;  // the tile's first pixel; it has `spans` times `span` consecutive ones, a row apart
  int64_t n, width;            // pixels of the tile; rounded up to vectors
  bool more;                   // this worker's next tile follows

  // Of pixels: their label, and what they weigh; see TileWeights.
  Int* label;
  A *label_w, *soft_w, *hot;
  bool uncounted;  // there are pixels in the tile (or beyond its end) that do not count

  // Of the student at hand: room for its logits, which become exp(y), and for the next one's; exp(y / tau).
  A *z, *next_z, *z2;
  A *max, *next_max, *sum, *sum2, *log_z;  // of the logits; of z and of z2; the logarithm of one of these
  A *label_y, *smooth_dot, *label_k;       // y at the label; sum_c w_c y_c; the label loss's gradient
  A *smooth, *f1, *f2;                     // of the gradient, what multiplies w_c, z and z2
  A* out;                                  // a map of losses
  Rows<A> logits;
  const A* peak;  // their maxima

  Teacher<A>* teachers;
  Resizer<A>* resizers;  // [N], of the exits that are resized
  A* ends;               // [N, C] see Stream
  bool* joined;          // [N]

  TileWork(const ExitLoss& launch, const Plan& plan)
      : L(launch),
        plan(plan),
        C(int(launch.C)),
        N(launch.N),
        T(launch.T),
        tau(A(launch.temperature)),
        soft_two(launch.target == Target::renormalized),
        gradient(launch.grad_losses || launch.weights),
        teacher_learns(gradient && !launch.detach_teacher) {
    constexpr int64_t kLine = 64 / sizeof(A);
    ld = (plan.tile_rows * plan.tile_columns + kLine - 1) / kLine * kLine + kLine;
    class_w_sum = 0;
    smoothing = A(L.label_smoothing / C);
    for (int c = 0; smoothing != 0 && c < C; ++c) class_w_sum += class_weight(c);
  }

  void lay_out(Memory& m) {
    const int64_t tile = C * ld;
    z = m.take<A>(tile);
    next_z = m.take<A>(tile);
    z2 = T && soft_two ? m.take<A>(tile) : nullptr;
    for (A** row : {&max, &next_max, &sum, &sum2, &log_z, &label_w, &soft_w, &label_y, &label_k, &hot, &smooth,
                    &smooth_dot, &out, &f1, &f2})
      *row = m.take<A>(ld);
    label = m.take<Int>(ld);
    ends = m.take<A>(N * C * kLanes);
    joined = m.take<bool>(N);
    teachers = m.take<Teacher<A>>(T);
    for (int r = 0; r < T; ++r) {
      Teacher<A> layout{};
      Teacher<A>& t = teachers ? teachers[r] : layout;
      t.z = m.take<A>(tile);
      t.u = m.take<A>(tile);
      t.a = teacher_learns ? m.take<A>(tile) : nullptr;
      for (A** row : {&t.max, &t.factor, &t.P, &t.dot, &t.k, &t.y, &t.kl, &t.S, &t.scaled}) *row = m.take<A>(ld);
      t.arg = m.take<Int>(ld);
    }
    resizers = plan.resizes ? m.take<Resizer<A>>(N) : nullptr;
    for (int e = 0; plan.resizes && e < N; ++e) {
      Resizer<A> layout{};
      if (is_resized(e)) (resizers ? resizers[e] : layout).lay_out(m, L, plan, e);
    }
  }

  void place(const Tile& tile) {
    begin = (tile.image * plan.height + tile.y) * plan.width + tile.x;
    spans = tile.columns == plan.width ? 1 : tile.rows;  // full rows lie one after the other
    span = spans == 1 ? tile.rows * tile.columns : tile.columns;
    if (begin + span > plan.pixels) span = plan.pixels - begin;  // the last tile, where none is resized
    n = spans * span;
    width = (n + kLanes - 1) / kLanes * kLanes;
  }

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
  bool is_resized(int e) const { return plan.resizes && plan.resizes[e].needed; }
  template <class F>
  SELFREG_ALWAYS void over_resizers(F f) {
    for (int e = 0; plan.resizes && e < N; ++e)
      if (is_resized(e)) f(resizers[e]);
  }

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
  // A pixel that counts for the labels counts for soft losses, if there are any.
  const A* counted_weight() const { return T ? soft_w : label_w; }
  // channels_last, with a vector of channels or more.
  bool channels_together(const View& v) const { return v.stride_c == 1 && C >= kLanes; }
  // All channels in blocks of a vector; the last block overlaps the one before.
  template <class F>
  SELFREG_ALWAYS void over_channel_blocks(F f) const {
    for (int c = 0; c < C; c += kLanes) f(c + kLanes <= C ? c : C - kLanes);
  }
};

}  // namespace

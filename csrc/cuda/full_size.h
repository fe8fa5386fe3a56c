// Exits of the output's size, of rows that stay in registers: the exit-loss matrix, phases 1 and 2, in one kernel. How
// threads hold, read and write a row is Access's: planes.h, staged.h or lanes.h, and access.h about its members.
// Forward, forward with gradients and the recomputing backward are all this kernel: gradients are written where there
// is room.
//
// A block takes tiles of pixels in turn. What a thread shares with nobody (targets, sums) has its own column in shared
// memory, which needs no barrier. Per tile:
//   phase 1  each teacher: read, maximum, exponentials and their sums; its target row goes to shared memory
//   phase 2  each exit: read and maximum, if not just done; sums of exponentials; each loss; its gradient
// Phase 0 (what the means divide by) comes before, the fixed-order sum over blocks (phase 3) after, in launch.cu.
#pragma once

#include "access.h"
#include "phases.h"

namespace selfreg {

// A thread's target row in shared memory: an odd number of accesses, so that a warp's threads meet in no bank.
template <class Access>
constexpr int kTargetAccess = Access::I * Access::V % 4 == 0 ? 4 : 2;
template <class Access>
constexpr int kTargetRow = (Access::I * Access::V / kTargetAccess<Access> | 1) * kTargetAccess<Access>;

// A tile: what a thread holds of it, how an exit is read, and the teachers' targets.
template <class Access>
struct FullSizeTeaching {
  using A = float;
  static constexpr int I = Access::I, V = Access::V, P = Access::P, kVector = kTargetAccess<Access>;
  static constexpr A kNoChannel = A(-1e30);  // the y of channels that do not exist: exp(y) = 0, and 0 y = 0

  Access io;
  const Args<A>& a;
  const FullSizeLayout& at;
  A* const shared;
  A *const my_targets, *const my_scalars, *const my_sums;  // the thread's columns in shared memory
  const bool leads;  // of the threads that share its pixels, the one whose losses count
  A all_class_weights = 0;

  // What the tile's pixels of this thread count, and their labels: where a label is in a target row, and its `hot` if
  // it is there; else any place, and 0.
  bool all_count;
  A label_w[P], soft_w[P], hot[P], hot_in_row[P];
  int label[P], place_in_row[P];

  // The exit at hand: its maxima, logits at the labels, and y, its logits less the maxima.
  A m[P], label_z[P], y[I][V];

  __device__ FullSizeTeaching(const FullSizeArgs& args, A* numbers)
      : io(args, numbers),
        a(args.all),
        at(args.at),
        shared(numbers),
        my_targets(kept_shared(shared + at.targets + thread_of_block() * kTargetRow<Access>)),
        my_scalars(kept_shared(shared + at.scalars + thread_of_block() * P)),
        my_sums(kept_shared(shared + at.sums + thread_of_block())),
        leads(Access::group() == 0) {}

  // ---- helpers ----

  SELFREG_DEVICE static constexpr int pixel_of(int v) { return Access::pixel_of(v); }
  // f(access, element) for all numbers of a row.
  template <class F>
  SELFREG_DEVICE static void each(F f) {
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) f(i, v);
  }
  SELFREG_DEVICE void sum_across(A (&x)[P]) {
    io.across(x, [](A u, A v) { return u + v; });
  }

  SELFREG_DEVICE A* target(int r) const { return my_targets + r * threads_of_block() * kTargetRow<Access>; }  // [I][V]
  enum Scalar { kSum, kArgmax };
  SELFREG_DEVICE A* scalars(int r, Scalar s) const {  // [P]
    return my_scalars + (r * 2 + s) * threads_of_block() * P;
  }
  SELFREG_DEVICE bool teaches(int r, int e) const { return a.teachers[r] != e; }
  SELFREG_DEVICE int entry(int r, int e) const { return e * (a.T + 1) + r; }  // so an exit's lie side by side
  SELFREG_DEVICE A gain(int r, int e) const { return shared[at.gains + entry(r, e)]; }
  SELFREG_DEVICE bool argmax(bool is_plain) const { return !is_plain && a.target == Target::argmax; }
  SELFREG_DEVICE bool smoothed(bool is_plain) const { return !is_plain && a.smoothing != 0; }
  // A pixel that counts for the labels counts for soft losses, if there are any.
  SELFREG_DEVICE bool counted(int p) const { return (a.T ? soft_w[p] : label_w[p]) != 0; }

  SELFREG_DEVICE void begin_tile(int64_t first) {
    io.begin_tile(first + int64_t(Access::slot()) * P);
    all_count = true;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const PixelWeights<A> w = weigh_pixel(a, io.inside, io.pixel + p);
      soft_w[p] = w.soft, label_w[p] = w.label, hot[p] = w.hot, label[p] = w.label_class;
      const int place = io.place_of(label[p]);
      const bool here = uint32_t(place) < uint32_t(P == 1 ? I * V : I);
      place_in_row[p] = !here ? 0 : P == 1 ? place : place * V + p;
      hot_in_row[p] = here ? hot[p] : A(0);
      all_count = all_count && counted(p);
    }
  }

  // y and m of exit e. The logits of a pixel that does not count are taken as zeros. `again`: it will be read once
  // more.
  SELFREG_DEVICE void read(int e, bool again, bool with_labels) {
#pragma unroll
    for (int p = 0; p < P; ++p) label_z[p] = 0;
    if (with_labels && leads) {
#pragma unroll
      for (int p = 0; p < P; ++p) label_z[p] = io.number(e, p, label[p]);
    }
    io.load(e, again, y, m);
    if (__builtin_expect(!all_count, false)) {
      each([&](int i, int v) { y[i][v] = counted(pixel_of(v)) ? y[i][v] : A(0); });
#pragma unroll
      for (int p = 0; p < P; ++p) m[p] = counted(p) ? m[p] : A(0);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) m[p] = larger(m[p], kLowest<A>);
    io.across(m, [](A u, A v) { return larger(u, v); });
    each([&](int i, int v) { y[i][v] = io.exists(i) ? y[i][v] - m[pixel_of(v)] : kNoChannel; });
  }

  // f(access, element, target_rc) for every number of a row.
  template <class F>
  SELFREG_DEVICE void each_target(int r, F f) const {
    const A* const row = target(r);
#pragma unroll
    for (int j = 0; j < I * V; j += kVector) {
      A q[kVector];
      load_shared(row + j, q);
#pragma unroll
      for (int k = 0; k < kVector; ++k) f((j + k) / V, (j + k) % V, q[k]);
    }
  }

  // ---- phase 1 ----

  // Of the exit at hand.
  template <bool kPlain>
  SELFREG_DEVICE void teach(std::bool_constant<kPlain>, int r) {
    if (argmax(kPlain)) return find_argmax(r);
    // Beside u = sum exp(y / tau), a raw power of tau != 1 needs Z = sum exp(y); at tau = 2 that is a sum of squares.
    const bool two = a.target == Target::raw && a.tau != A(1), squares = two && a.tau == A(2);
    A row[I][V], u[P] = {}, Z[P] = {};
    each([&](int i, int v) { u[pixel_of(v)] += row[i][v] = exp2_of(y[i][v], a.rate_tau); });
    if (squares) {
      each([&](int i, int v) { Z[pixel_of(v)] += power<2>(row[i][v]); });
    } else if (two) {
      each([&](int i, int v) { Z[pixel_of(v)] += exp2_of(y[i][v], A(kLog2e)); });
    }
    sum_across(u);
    if (two) sum_across(Z);
    A factor[P], sum[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      factor[p] = exp2_fast(two ? log2_fast(Z[p]) * (a.rate_tau * A(-kLn2)) : -log2_fast(u[p]));
      sum[p] = two ? u[p] * factor[p] : A(1);
    }
    store_shared(scalars(r, kSum), sum);
#pragma unroll
    for (int j = 0; j < I * V; j += kVector) {
      A q[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) q[k] = row[(j + k) / V][(j + k) % V] * factor[pixel_of((j + k) % V)];
      store_shared(target(r) + j, q);
    }
  }

  SELFREG_DEVICE void find_argmax(int r) {
    A top[P], first[P], sum[P];
#pragma unroll
    for (int p = 0; p < P; ++p) top[p] = kLowest<A>, first[p] = A(a.C), sum[p] = 1;
    each([&](int i, int v) {
      if (io.exists(i)) top[pixel_of(v)] = larger_or_nan(top[pixel_of(v)], y[i][v]);
    });
    io.across(top, [](A u, A v) { return larger_or_nan(u, v); });
    each([&](int i, int v) {
      const int p = pixel_of(v);
      const A c = A(io.channel(i, v));
      if (io.exists(i) && is_largest(y[i][v], top[p]) && c < first[p]) first[p] = c;
    });
    io.across(first, [](A u, A v) { return u < v ? u : v; });
    store_shared(scalars(r, kArgmax), first);
    store_shared(scalars(r, kSum), sum);
  }
};

template <class Access>
struct FullSize : FullSizeTeaching<Access> {
  using Base = FullSizeTeaching<Access>;
  using Base::Base, Base::argmax, Base::smoothed, Base::teach;
  using Base::I, Base::P, Base::V, Base::a, Base::all_class_weights, Base::at, Base::begin_tile, Base::each,
      Base::each_target, Base::entry, Base::gain, Base::hot, Base::hot_in_row, Base::io, Base::kArgmax, Base::kSum,
      Base::label, Base::label_w, Base::label_z, Base::m, Base::my_sums, Base::pixel_of, Base::place_in_row, Base::read,
      Base::scalars, Base::shared, Base::soft_w, Base::sum_across, Base::target, Base::teaches, Base::y;
  using typename Base::A;

  // ---- phase 2 ----

  SELFREG_DEVICE void gradient_of_loss(int r, int e, A (&k)[P]) const {
    const A g = gain(r, e);
#pragma unroll
    for (int p = 0; p < P; ++p) k[p] = product(r == 0 ? label_w[p] : soft_w[p], g);
  }
  SELFREG_DEVICE void put_loss(int r, int e, const A (&loss)[P]) const {
    A sum = loss[0];
#pragma unroll
    for (int p = 1; p < P; ++p) sum += loss[p];
    my_sums[entry(r, e) * threads_of_block()] += sum;  // those of threads that lead will count
  }

  // Losses of the exit at hand, e, and its gradient.
  template <bool kPlain>
  SELFREG_DEVICE void learn(int e) {
    // 1. Sums of exponentials. All losses share exp(y), or exp(y / tau); only label losses beside renormalised ones
    // need both, of which the second is computed again for the gradient.
    const bool both = !kPlain && a.two_rates();
    A u[I][V], Z[P] = {}, soft_Z[P] = {}, smooth_dot[P] = {};
    if (smoothed(kPlain)) {  // before there are exponentials, for which registers are left
      each([&](int i, int v) {
        if (io.exists(i)) smooth_dot[pixel_of(v)] += product(class_weight(a, io.channel(i, v)), y[i][v]);
      });
      sum_across(smooth_dot);
    }
    each([&](int i, int v) { Z[pixel_of(v)] += u[i][v] = exp2_of(y[i][v], a.rate); });
    sum_across(Z);
    if (both) {
      each([&](int i, int v) { soft_Z[pixel_of(v)] += exp2_of(y[i][v], a.rate_tau); });
      sum_across(soft_Z);
    }

    // 2. Losses, and the sums of the targets times what multiplies them in the gradient.
    A label_k[P], soft_q[P] = {}, soft_log_z[P], loss[P];
    gradient_of_loss(0, e, label_k);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const A log_z = log_normalizer(Z[p]), label_y = label_w[p] != 0 ? label_z[p] - m[p] : A(0);
      soft_log_z[p] = both ? log_normalizer(soft_Z[p]) : log_z;
      loss[p] = smoothed(kPlain) ? label_loss(hot[p], label_y, log_z, a.smoothing, all_class_weights, smooth_dot[p])
                                 : hot[p] * (log_z - label_y);
      loss[p] = label_w[p] != 0 ? label_w[p] * loss[p] : A(0);  // ignored, but counted for soft losses: may be NaN
    }
    put_loss(0, e, loss);
    for (int r = 0; r < a.T; ++r) {
      if (!teaches(r, e)) continue;
      A sum[P], k[P], dot[P];
      load_shared(scalars(r, kSum), sum);
      dot_with_target<kPlain>(r, e, dot);
#pragma unroll
      for (int p = 0; p < P; ++p)
        loss[p] = soft_w[p] * soft_loss(sum[p], dot[p], soft_log_z[p], a.log_z_scale, a.dot_scale);
      put_loss(r + 1, e, loss);
      gradient_of_loss(r + 1, e, k);
#pragma unroll
      for (int p = 0; p < P; ++p) soft_q[p] += k[p] * sum[p];
    }
    if (!a.grads[e].data) return;

    // 3. gradient_c = exp(y_c) f + exp(y_c / tau) soft_f - sum_r k_r target_rc - ..., in place of y.
    A f[P], soft_f[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      A q = product(label_k[p], smoothed(kPlain) ? hot[p] + a.smoothing * all_class_weights : hot[p]);
      if (!both) q += soft_q[p];
      f[p] = q * reciprocal(Z[p]);
      soft_f[p] = both ? soft_q[p] * reciprocal(soft_Z[p]) : A(0);
    }
    if (both) {
      each([&](int i, int v) {
        y[i][v] = u[i][v] * f[pixel_of(v)] + exp2_of(y[i][v], a.rate_tau) * soft_f[pixel_of(v)];
      });
    } else {
      each([&](int i, int v) { y[i][v] = u[i][v] * f[pixel_of(v)]; });
    }
    const bool with_label = subtract_targets<kPlain>(e);
    subtract_hot<kPlain>(e, label_k, a.labels && !with_label && gain(0, e) != 0);
    io.store(e, y);
  }

  // The dot product of teacher r's target and exit e's y: for argmax, the y at that place.
  template <bool kPlain>
  SELFREG_DEVICE void dot_with_target(int r, int e, A (&dot)[P]) {
    if (argmax(kPlain)) {
      A c[P];
      load_shared(scalars(r, kArgmax), c);
#pragma unroll
      for (int p = 0; p < P; ++p) dot[p] = soft_w[p] != 0 ? io.number(e, p, int(c[p])) - m[p] : A(0);
      return;
    }
    bool good = true;
#pragma unroll
    for (int p = 0; p < P; ++p) dot[p] = 0;
    each_target(r, [&](int i, int v, A q) { dot[pixel_of(v)] += q * y[i][v]; });
#pragma unroll
    for (int p = 0; p < P; ++p) good = good && dot[p] == dot[p];
    if (__builtin_expect(!good, false)) {
#pragma unroll
      for (int p = 0; p < P; ++p)
        if (dot[p] != dot[p]) dot[p] = dot_of_nonzero(r, e, p);
    }
    sum_across(dot);
  }
  // With 0 log 0 = 0. Rarely needed: a test for every number would cost more.
  SELFREG_DEVICE A dot_of_nonzero(int r, int e, int p) const {
    A dot = 0;
#pragma unroll 1
    for (int j = 0; j < I * V; ++j) {
      const int i = j / V, v = j % V, c = io.channel(i, v);
      if (pixel_of(v) != p || c >= a.C) continue;
      const A q = target(r)[j];
      if (q != 0) dot += q * (io.number(e, p, c) - m[p]);
    }
    return dot;
  }

  // Takes the teachers' targets from the row; and with them the labels', where that can be: says whether it was.
  template <bool kPlain>
  SELFREG_DEVICE bool subtract_targets(int e) {
    if (argmax(kPlain)) return false;
    // For the time being the label's target goes to its place in the row of a teacher, in units of that one's gain: a
    // few instructions for a pixel, not a comparison for every channel.
    const A ratio = a.labels ? shared[at.ratios + e] : A(0);
    A* const row = target(teaches(0, e) ? 0 : 1);
    A kept[P];
    if (ratio != 0) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        kept[p] = row[place_in_row[p]];
        row[place_in_row[p]] = kept[p] + hot_in_row[p] * ratio;
      }
    }
    for (int r = 0; r < a.T; ++r) {
      if (!teaches(r, e)) continue;
      A k[P];
      gradient_of_loss(r + 1, e, k);
      each_target(r, [&](int i, int v, A q) { y[i][v] -= k[pixel_of(v)] * q; });
    }
    if (ratio != 0) {
#pragma unroll
      for (int p = P; p-- > 0;) row[place_in_row[p]] = kept[p];  // backwards: pixels without a label here share a place
    }
    return ratio != 0;
  }

  // What stands at single channels: the label, the teachers' argmax; and what smoothing gives to every class.
  template <bool kPlain>
  SELFREG_DEVICE void subtract_hot(int e, const A (&label_k)[P], bool with_labels) {
    if (with_labels) {
      A k[P];
#pragma unroll
      for (int p = 0; p < P; ++p) k[p] = product(label_k[p], hot[p]);
      subtract_at(label, k);
    }
    for (int r = 0; argmax(kPlain) && r < a.T; ++r) {
      if (!teaches(r, e)) continue;
      A k[P], c[P];
      int place[P];
      gradient_of_loss(r + 1, e, k);
      load_shared(scalars(r, kArgmax), c);
#pragma unroll
      for (int p = 0; p < P; ++p) place[p] = int(c[p]);
      subtract_at(place, k);
    }
    if (smoothed(kPlain)) {
      each([&](int i, int v) {
        if (io.exists(i)) y[i][v] -= product(label_k[pixel_of(v)] * a.smoothing, class_weight(a, io.channel(i, v)));
      });
    }
  }
  SELFREG_DEVICE void subtract_at(const int (&c)[P], const A (&k)[P]) {
    int place[P];
#pragma unroll
    for (int p = 0; p < P; ++p) place[p] = io.place_of(c[p]);
    each([&](int i, int v) {
      if (Access::place(i, v) == place[pixel_of(v)]) y[i][v] -= k[pixel_of(v)];
    });
  }

  // ---- the block ----

  SELFREG_DEVICE void run() {
    const Norms norms = find_norms(a);
    all_class_weights = sum_class_weights(a);
    const int entries = (a.T + 1) * a.N;
#pragma unroll 1
    for (int i = thread_of_block(); i < entries; i += threads_of_block())
      shared[at.gains + entry(i / a.N, i % a.N)] = gain_of(a, i, norms);
#pragma unroll 1
    for (int i = 0; i < entries; ++i) my_sums[i * threads_of_block()] = 0;
    __syncthreads();
#pragma unroll 1
    for (int e = thread_of_block(); e < a.N; e += threads_of_block()) {
      // Pixels weigh the same for labels and teachers. 0: the exit has no teacher, or one of no gain; or there is one
      // channel alone, and the gradient is to be exactly 0.
      const int r = a.T > 0 && !teaches(0, e) ? 1 : 0;
      const A ratio = r < a.T && a.C > 1 ? gain(0, e) / gain(r + 1, e) : A(0);
      shared[at.ratios + e] = ratio - ratio == 0 ? ratio : A(0);
    }
    __syncthreads();

    const bool is_plain = !Access::kRare || a.plain();
    const int64_t tile = int64_t(Access::slots()) * P;
    for (int64_t first = blockIdx.x * tile; first < a.pixels; first += gridDim.x * tile) {
      begin_tile(first);
      for (int r = 0; r < a.T; ++r) {
        read(a.teachers[r], true, r == a.T - 1);
        is_plain ? teach(std::true_type(), r) : teach(std::bool_constant<!Access::kRare>(), r);
      }
      for (int step = 0; step < a.N; ++step) {
        const int e = a.order[step];
        if (step > 0 || a.T == 0) read(e, false, true);  // the last teacher is the first student, and at hand
        is_plain ? learn<true>(e) : learn<!Access::kRare>(e);
      }
    }
    write_partial_sums(a, shared + at.sums, threads_of_block(), Access::slots(), Access::kLanes,
                       [&](int i) { return entry(i / a.N, i % a.N); });
  }
};

template <class Access>
__global__ void __launch_bounds__(Access::kMaxThreads, Access::kMinBlocks)
    full_size_kernel(const __grid_constant__ FullSizeArgs args) {
  SELFREG_DYNAMIC_SHARED(shared);
  FullSize<Access>(args, reinterpret_cast<float*>(shared)).run();
}

}  // namespace selfreg

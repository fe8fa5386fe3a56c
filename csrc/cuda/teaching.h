// Small exits: targets, and the losses' parts that are sums over pixels.
#pragma once

#include "scatter.h"

namespace selfreg {

template <class Shape>
struct Teaching : Scatter<Shape> {
  using Base = Scatter<Shape>;
  using Base::K, Base::P, Base::a, Base::across_groups, Base::args, Base::channel, Base::counted, Base::each,
      Base::exists, Base::exponentials, Base::gain, Base::mixed, Base::put_loss, Base::scatter_labels, Base::shared,
      Base::sum_across_groups, Base::teaches, Base::thread, Base::threads, Base::weights;
  using typename Base::A;

  using Base::Base;

  enum Kept { kFactor, kMax, kArgmax = kMax };  // log2 of what its exponentials are taken times; of a full-size teacher
  SELFREG_DEVICE A* kept(int r, Kept k) const {
    return shared + args.at.kept + (((r - 1) * 2 + k) * threads() + thread()) * P;
  }
  SELFREG_DEVICE static bool ignored(A x) { return x == 0 && copysign(A(1), x) < 0; }

  // Beside u = sum exp(y / tau), a raw power of tau != 1 needs Z = sum exp(y); at tau = 2 that is a sum of squares.
  SELFREG_DEVICE bool two_sums() const { return a.target == Target::raw && a.tau != A(1); }
  SELFREG_DEVICE bool squares() const { return two_sums() && a.tau == A(2); }

  // y: exponentials of y / tau, of teacher r, and u their sum; which becomes that of exp(y) if it is another. What y is
  // to be taken times to be the target, and the pixel's weight.
  SELFREG_DEVICE void teach(int r, const A (&y)[K][P], const A (&shift)[P], A (&u)[P], A (&times)[P]) {
    A Z[P] = {}, sum[P], log_factor[P];
    if (squares()) {
      each([&](int i, int p) { Z[p] += power<2>(y[i][p]); });
    } else if (two_sums()) {
      each([&](int i, int p) { Z[p] += exp2_fast(log2_fast(y[i][p]) * a.tau); });
    }
    if (two_sums()) sum_across_groups(Z);
    load_shared(weights(), times);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      sum[p] = times[p];
      log_factor[p] = two_sums() ? log2_fast(Z[p]) * (a.rate_tau * A(-kLn2)) : -log2_fast(u[p]);
      times[p] *= exp2_fast(log_factor[p]);
      log_factor[p] -= shift[p] * a.rate_tau;
      if (two_sums()) sum[p] = u[p] * times[p], u[p] = Z[p];
    }
    store_shared(counted(r), sum);
    if (mixed()) store_shared(kept(r, kFactor), log_factor);
  }

  // Of teacher r, its most likely classes: the target is a hard label.
  SELFREG_DEVICE void teach_argmax(int r, const A (&y)[K][P]) {
    A top[P], first[P], weight[P], none[P] = {};
    int c[P];
#pragma unroll
    for (int p = 0; p < P; ++p) top[p] = kLowest<A>, first[p] = A(a.C);
    each([&](int i, int p) {
      if (exists(i)) top[p] = larger_or_nan(top[p], y[i][p]);
    });
    across_groups(top, [](A u, A v) { return larger_or_nan(u, v); });
    each([&](int i, int p) {
      if (exists(i) && is_largest(y[i][p], top[p]) && A(channel(i)) < first[p]) first[p] = A(channel(i));
    });
    across_groups(first, [](A u, A v) { return u < v ? u : v; });
    load_shared(weights(), weight);
    store_shared(counted(r), weight);
    if (mixed()) store_shared(kept(r, kArgmax), first);
#pragma unroll
    for (int p = 0; p < P; ++p) c[p] = int(first[p]);
#pragma unroll 1
    for (int s = 0; s < args.sizes; ++s) scatter_labels(s, r, c, weight, none);
  }

  // Of exit e, the parts of losses that are sums over pixels: of the losses that take logarithms of Z, and what its
  // exponentials are to be taken times for the gradient. Label losses are the first, soft losses the others.
  SELFREG_DEVICE void learn(int e, int first, int end, A rate, const A (&Z)[P], const A (&shift)[P],
                            A (&times)[P]) const {
    A log_z[P];
#pragma unroll
    for (int p = 0; p < P; ++p) log_z[p] = log_normalizer(Z[p]) + shift[p] * (rate * A(kLn2)), times[p] = 0;
#pragma unroll 1
    for (int r = first; r < end; ++r) {
      if (!teaches(r, e)) continue;
      const A g = gain(r, e);
      A sum[P], loss = 0;
      load_shared(counted(r), sum);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        loss += ignored(sum[p]) ? A(0) : sum[p] * log_z[p];
        if (g != 0 && sum[p] != 0) times[p] += sum[p] * g;  // else what the other is, be it infinite, is left out
      }
      put_loss(r, e, r == 0 ? loss : loss * a.log_z_scale);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) times[p] *= reciprocal(Z[p]);
  }

  // Label losses take exp(y), soft ones exp(y / tau): y becomes what both make of the gradient.
  SELFREG_DEVICE void learn_at_two_rates(int e, A (&y)[K][P], A (&times)[P]) {
    const A rate = A(kLog2e), to_soft = a.rate_tau / rate;
    A Z[P], soft_Z[P] = {}, shift[P], soft_times[P];
    exponentials(std::true_type(), e, rate, y, Z, shift);
    each([&](int i, int p) { soft_Z[p] += exp2_fast(y[i][p] * to_soft); });
    sum_across_groups(soft_Z);
    learn(e, 0, 1, rate, Z, shift, times);
    learn(e, 1, a.T + 1, a.rate_tau, soft_Z, shift, soft_times);
    each([&](int i, int p) { y[i][p] = exp2_fast(y[i][p]) * times[p] + exp2_fast(y[i][p] * to_soft) * soft_times[p]; });
#pragma unroll
    for (int p = 0; p < P; ++p) times[p] = 1;
  }
};

}  // namespace selfreg

// Exits of the output's size beside small ones. They have no vectors: what a teacher's target is at their pixels is
// computed again, from what is kept of it.
#pragma once

#include <type_traits>

#include "teaching.h"

namespace selfreg {

template <class Shape>
struct Beside : Teaching<Shape> {
  using Base = Teaching<Shape>;
  using Base::K, Base::a, Base::across_groups, Base::all_class_weights, Base::argmax, Base::channel, Base::channels,
      Base::column_lows, Base::column_weights, Base::counted, Base::draw_lines, Base::exists, Base::full, Base::gain,
      Base::group, Base::groups, Base::interpolated, Base::kFactor, Base::kMax, Base::kept, Base::line_at,
      Base::put_loss, Base::row, Base::size_of, Base::slot, Base::smoothed, Base::sum_across_groups, Base::teaches,
      Base::two_rates, Base::under, Base::weights;
  using typename Base::A;
  using typename Base::S;

  using Base::Base;

  SELFREG_DEVICE int64_t pixel_of(int p) const {
    const Under& u = under(0);
    return (int64_t(u.image) * a.cut.height + row + min(p, u.rows - 1)) * a.cut.width + u.begin +
           (slot() < u.width ? slot() : 0);
  }
  SELFREG_DEVICE S* full_at(const PixelView& view, int p) const {
    const Under& u = under(0);
    const int64_t x = u.begin + (slot() < u.width ? slot() : 0);
    return static_cast<S*>(view.data) + u.image * view.step[0] + (row + min(p, u.rows - 1)) * view.step[1] +
           x * view.step[2] + group() * view.channel;
  }
  // Rows first, first + 1, ... of exit e at the thread's column, less their maxima. What does not count is taken as
  // zeros.
  template <int n>
  SELFREG_DEVICE void read_full(int e, int first, A (&y)[K][n], A (&most)[n]) {
    const PixelView& view = a.exits[e];
#pragma unroll
    for (int p = 0; p < n; ++p) {
      const S* from = full_at(view, first + p);
      const bool counts = weights()[first + p] != 0;
      most[p] = kLowest<A>;
#pragma unroll
      for (int i = 0; i < K; ++i, from += groups() * view.channel) {
        y[i][p] = !exists(i) ? kLowest<A> : !counts ? A(0) : to_number(__ldg(from));
        most[p] = larger(most[p], y[i][p]);
      }
    }
    across_groups(most, [](A u, A v) { return larger(u, v); });
#pragma unroll
    for (int p = 0; p < n; ++p)
#pragma unroll
      for (int i = 0; i < K; ++i) y[i][p] = exists(i) ? y[i][p] - most[p] : A(-1e30);
  }

  // f(i, target_rc) for every channel of the thread, in row p.
  template <class F>
  SELFREG_DEVICE void each_target(int r, int p, F f) {
    const int e = a.teachers[r - 1];
    const A factor = kept(r, kFactor)[p], most = kept(r, kMax)[p];
    const bool counts = weights()[p] != 0;
    if (argmax()) {
#pragma unroll
      for (int i = 0; i < K; ++i) f(i, exists(i) && A(channel(i)) == most ? A(1) : A(0));
      return;
    }
    auto target = [&](int i, A exponent) { f(i, exists(i) ? exp2_fast((counts ? exponent : A(0)) + factor) : A(0)); };
    if (full(e)) {
      const S* from = full_at(a.exits[e], p);
#pragma unroll
      for (int i = 0; i < K; ++i, from += groups() * a.exits[e].channel)
        target(i, exists(i) ? (to_number(__ldg(from)) - most) * a.rate_tau : A(0));
      return;
    }
    const int s = size_of(e);
    const Under& u = under(s);
    int span = 0;
    while (u.end[span] <= p) span = u.end[span];
    __syncthreads();  // all have read the last lines
    const bool odd = __syncthreads_or(draw_lines(e, span, a.rate_tau));
    if (__builtin_expect(odd, false)) {  // something is not finite
#pragma unroll 1
      for (int k = 0; k < channels; ++k) {
        const A number = interpolated(e, p, channel(k)) * a.rate_tau;
#pragma unroll
        for (int i = 0; i < K; ++i)
          if (i == k) target(i, number);
      }
      return;
    }
    const A weight = column_weights(s)[slot()], below = u.weight[p];
    const A* const line = kept_shared(line_at(channel(0), column_lows(s)[slot()]));
#pragma unroll
    for (int i = 0; i < K; ++i) {
      A x[4] = {};
      if (exists(i)) load_shared(line + i * 4, x);
      target(i, x[0] + weight * x[1] + below * (x[2] + weight * x[3]));
    }
  }

  // Losses and gradient of a full-size exit in row p: a thread has registers for its numbers and their gradient.
  SELFREG_DEVICE void learn_full(int e, int p) {
    const bool both = two_rates(), inside = slot() < under(0).width && p < under(0).rows;
    A y[K][1], g[K], m[1], Z[1] = {}, soft_Z[1] = {}, smooth_dot[1] = {};
    read_full(e, p, y, m);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      g[i] = 0;
      Z[0] += exp2_of(y[i][0], a.rate);
      if (both) soft_Z[0] += exp2_of(y[i][0], a.rate_tau);
      if (smoothed() && exists(i)) smooth_dot[0] += product(class_weight(a, channel(i)), y[i][0]);
    }
    sum_across_groups(Z);
    if (both) sum_across_groups(soft_Z);
    if (smoothed()) sum_across_groups(smooth_dot);

    const PixelWeights<A> w = weigh_pixel(a, inside, pixel_of(p));
    const A log_z = log_normalizer(Z[0]), soft_log_z = both ? log_normalizer(soft_Z[0]) : log_z;
    const A label_k = product(w.label, gain(0, e)), soft_w = weights()[p];
    A f = product(label_k, w.hot + a.smoothing * all_class_weights), soft_f = 0, loss = 0;
    if (w.label != 0) {
      const A z = to_number(__ldg(full_at(a.exits[e], p) + (w.label_class - group()) * a.exits[e].channel));
      loss = w.label * label_loss(w.hot, z - m[0], log_z, a.smoothing, all_class_weights, smooth_dot[0]);
    }
    put_loss(0, e, loss);
#pragma unroll 1
    for (int r = 1; r <= a.T; ++r) {
      if (!teaches(r, e)) continue;
      const A k = gain(r, e), sum = counted(r)[p];
      A dot[1] = {};
      each_target(r, p, [&](int i, A q) {
        dot[0] += product(q, y[i][0]);
        g[i] += product(product(soft_w, k), q);
      });
      sum_across_groups(dot);
      put_loss(r, e, sum * soft_log_z * a.log_z_scale - product(soft_w, dot[0]) * a.dot_scale);
      if (k != 0) (both ? soft_f : f) += product(sum, k);
    }
    if (!a.grads[e].data || !inside) return;
    const PixelView& grad = a.grads[e];
    f *= reciprocal(Z[0]);
    if (both) soft_f *= reciprocal(soft_Z[0]);
    S* to = full_at(grad, p);
#pragma unroll
    for (int i = 0; i < K; ++i, to += groups() * grad.channel) {
      if (!exists(i)) continue;
      A x = exp2_of(y[i][0], a.rate) * f - g[i];
      if (both) x += exp2_of(y[i][0], a.rate_tau) * soft_f;
      if (a.labels && channel(i) == w.label_class) x -= product(label_k, w.hot);
      if (smoothed()) x -= product(label_k * a.smoothing, class_weight(a, channel(i)));
      *to = to_storage<S>(x);
    }
  }
};

}  // namespace selfreg

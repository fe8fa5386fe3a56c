// The losses of the student at hand in a tile, and the gradient of each at every pixel.
#pragma once

#include "tile.h"  // and with it vec.h: before pixel_math.h, whose templates call its exp2_of and log2

#include "../pixel_math.h"

namespace {

template <class A>
class Losses {
  using V = typename VecOf<A>::V;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

 public:
  explicit Losses(TileWork<A>& work) : w(work) {}

  // The gradient of every loss of exit e at every pixel: its gradient as given x the mean's divisor x the pixel weight.
  // Of these, 0 leaves out: the others may be infinite or NaN.
  void read_gradient(int e) {
    if (!w.gradient) return;
    auto fill_row = [&](int r, A* k, const A* weight, A norm) {
      if (w.L.grad_losses && w.L.reduction == Reduction::none) {
        const A* const map = static_cast<const A*>(w.L.grad_losses) + w.entry(r, e) * w.plan.pixels;
        w.over_spans([&](int64_t pixel, int64_t first) {
          for (int64_t i = 0; i < w.span; ++i)
            k[first + i] = weight[first + i] == 0 ? A(0) : map[pixel + i] * weight[first + i];
        });
        for (int64_t i = w.n; i < w.width; ++i) k[i] = 0;
      } else {
        const A g =
            w.L.grad_losses ? static_cast<const A*>(w.L.grad_losses)[w.entry(r, e)] : A(w.L.weights[w.entry(r, e)]);
        const A gain = g == 0 ? A(0) : g * norm;
        w.over_pixels([&](int64_t i) {
          const V counted = load<V>(weight + i);
          store(k + i, counted == A(0) ? V{} : counted * gain);
        });
      }
    };
    if (w.L.labels) fill_row(0, w.label_k, w.label_w, A(w.plan.norm[0]));
    for (int r = 0; r < w.T; ++r)
      if (w.teachers[r].on) fill_row(r + 1, w.teachers[r].k, w.soft_w, A(w.plan.norm[1]));
  }

  void write(int e, double* partial) {
    auto logarithm_of = [&](const A* z_sum) {
      w.over_pixels([&](int64_t i) { store(w.log_z + i, log2(load<V>(z_sum + i)) * A(kLn2)); });
    };
    if (w.L.labels || !w.soft_two) logarithm_of(w.sum);
    if (w.L.labels) {
      put(0, e, w.label_w, partial, [&](int64_t i) {
        return label_loss(load<V>(w.hot + i), load<V>(w.label_y + i), load<V>(w.log_z + i), w.smoothing, w.class_w_sum,
                          load<V>(w.smooth_dot + i));
      });
    } else {
      put_zeros(0, e, partial);
    }
    if (w.soft_two) logarithm_of(w.sum2);
    const A z_scale = w.soft_two ? w.tau * w.tau : w.tau;
    for (int r = 0; r < w.T; ++r) {
      const Teacher<A>& t = w.teachers[r];
      if (!t.on) {
        put_zeros(r + 1, e, partial);
      } else if (w.L.target == Target::argmax) {
        put(r + 1, e, w.soft_w, partial, [&](int64_t i) { return load<V>(w.log_z + i) - load<V>(t.y + i); });
      } else {
        put(r + 1, e, w.soft_w, partial, [&](int64_t i) {
          const V dot = load<V>(t.dot + i) * load<V>(t.factor + i);
          return soft_loss(load<V>(t.P + i), dot, load<V>(w.log_z + i), z_scale, w.tau);
        });
      }
    }
  }
  void write_zeros(int e, double* partial) {
    for (int r = 0; r <= w.T; ++r) put_zeros(r, e, partial);
  }

 private:
  TileWork<A>& w;

  // The weighted map of a loss to its entry of the matrix.
  template <class F>
  void put(int r, int e, const A* weight, double* partial, F loss) {
    using Sums = typename VecOf<A>::Sums;
    Sums sums{};
    const bool map = w.L.reduction == Reduction::none;
    w.over_pixels([&](int64_t i) {
      const V counted = load<V>(weight + i), weighted = counted == A(0) ? V{} : counted * loss(i);
      if (map) store(w.out + i, weighted);
      sums += __builtin_convertvector(weighted, Sums);
    });
    if (map) {
      A* const to = static_cast<A*>(w.L.losses) + w.entry(r, e) * w.plan.pixels;
      w.over_spans([&](int64_t pixel, int64_t first) { memcpy(to + pixel, w.out + first, w.span * sizeof(A)); });
      return;
    }
    double sum_of_lanes = 0;
    for (int k = 0; k < kLanes; ++k) sum_of_lanes += sums[k];
    partial[w.entry(r, e)] = sum_of_lanes;
  }
  void put_zeros(int r, int e, double* partial) {
    if (w.L.reduction == Reduction::none) {
      A* const to = static_cast<A*>(w.L.losses) + w.entry(r, e) * w.plan.pixels;
      w.over_spans([&](int64_t pixel, int64_t) { memset(to + pixel, 0, w.span * sizeof(A)); });
    } else {
      partial[w.entry(r, e)] = 0;
    }
  }
};

}  // namespace

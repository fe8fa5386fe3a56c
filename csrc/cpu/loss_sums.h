// The losses of small exits in a band: entries (r, e), r = 0 of the labels, else of teacher r - 1, and exit e.
#pragma once

#include "frame.h"

#include "../pixel_math.h"

namespace {

// A loss is a sum of logarithms of normalisers, over pixels, less one of targets times y, at the exit's resolution.
template <class A>
struct LossSums {
  using V = typename VecOf<A>::V;
  using Sums = typename VecOf<A>::Sums;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const ExitLoss& L;
  const int entries;
  A* gains;      // what multiplies a loss's terms in the gradient, but for the pixel's weight
  Sums* logs;    // sums of the logarithms
  double* dots;  // and of the others, in units of ln 2

  explicit LossSums(const ExitLoss& launch) : L(launch), entries((launch.T + 1) * launch.N) {}
  void lay_out(Memory& m) {
    gains = m.template take<A>(entries);
    logs = m.template take<Sums>(entries);
    dots = m.template take<double>(entries);
  }
  int entry(int r, int e) const { return r * L.N + e; }
  bool taught(int r, int e) const { return r == 0 ? L.labels != nullptr : L.teachers[r - 1] != e; }
  A gain(int r, int e) const { return gains[entry(r, e)]; }

  // A gain of 0 leaves a loss out: the other numbers may be infinite or NaN.
  void begin_launch(const double (&norm)[2]) {
    for (int r = 0; r <= L.T; ++r)
      for (int e = 0; e < L.N; ++e) {
        A g = 0;
        if (L.grad_losses) g = static_cast<const A*>(L.grad_losses)[entry(r, e)];
        if (!L.grad_losses && L.weights) g = A(L.weights[entry(r, e)]);
        gains[entry(r, e)] = g == 0 || !taught(r, e) ? A(0) : g * A(norm[r > 0]) * A(r > 0 ? L.temperature : 1);
      }
  }
  void begin_band() {
    memset(logs, 0, entries * sizeof(Sums));
    memset(dots, 0, entries * sizeof(double));
  }

  // A block's logarithms, and what the loss adds to what multiplies the exponentials in the gradient, if that is
  // wanted. Pixels where `counts` is 0 do not: what else they have may be infinite or NaN.
  void add(int r, int e, int rows, const V* weight, const V* counts, const V* logarithm, bool gradient, V* factor) {
    const A g = gradient ? gain(r, e) : A(0);
    V sum{};
    for (int i = 0; i < rows; ++i) {
      sum += counts[i] == A(0) ? V{} : weight[i] * logarithm[i];
      if (g != 0) factor[i] += counts[i] == A(0) ? V{} : weight[i] * g;
    }
    logs[entry(r, e)] += __builtin_convertvector(sum, Sums);
  }

  // Of soft losses, logarithms are times `log_scale`, the others times tau: see soft_loss in pixel_math.h.
  void end_band(double log_scale, double* partial) const {
    for (int i = 0; i < entries; ++i) {
      double sum = 0;
      for (int k = 0; k < kLanes; ++k) sum += logs[i][k];
      partial[i] = i < L.N ? sum - dots[i] * kLn2 : log_scale * sum - L.temperature * dots[i] * kLn2;
    }
  }
};

}  // namespace

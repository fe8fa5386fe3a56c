// The losses of a band: entries (r, e), r = 0 of the labels, else of teacher r - 1, and exit e.
#pragma once

#include "targets.h"

namespace {

// A loss is the logarithm of a normaliser times the target's sum, less the sum of target times y. The latter is taken
// at the output's resolution, or, of small exits, at their own.
template <class A>
struct Losses {
  using V = typename VecOf<A>::V;
  using Sums = typename VecOf<A>::Sums;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const ExitLoss& L;
  const Frame<A>& frame;
  const Targets<A>& targets;
  const int entries;
  A* gains;      // what multiplies a loss's terms in the gradient, but for the pixel's weight
  Sums* sums;    // of what is known at the output's resolution
  double* dots;  // the other sums of target times y, in units of ln 2
  V* at_target;  // [T + 1, kMostRows] of the student at hand: what multiplies a target in its gradient

  Losses(const ExitLoss& launch, const Frame<A>& frame, const Targets<A>& targets)
      : L(launch), frame(frame), targets(targets), entries((launch.T + 1) * launch.N) {}
  void lay_out(Memory& m) {
    gains = m.template take<A>(entries);
    sums = m.template take<Sums>(entries);
    dots = m.template take<double>(entries);
    at_target = m.template take<V>((L.T + 1) * kMostRows);
  }
  int entry(int r, int e) const { return r * L.N + e; }
  bool taught(int r, int e) const { return r == 0 ? L.labels != nullptr : L.teachers[r - 1] != e; }
  A gain(int r, int e) const { return gains[entry(r, e)]; }
  A dot_scale(int r) const { return r == 0 || targets.argmax ? A(1) : targets.tau; }  // see soft_loss in pixel_math.h
  A log_scale(int r) const { return r > 0 && targets.two ? targets.tau * targets.tau : dot_scale(r); }

  // A gain of 0 leaves a loss out: the other numbers may be infinite or NaN.
  void begin_launch() {
    const bool maps = L.reduction == Reduction::none;
    for (int r = 0; r <= L.T; ++r)
      for (int e = 0; e < L.N; ++e) {
        A g = 0;
        if (L.grad_losses && !maps) g = static_cast<const A*>(L.grad_losses)[entry(r, e)];
        if (!L.grad_losses && L.weights) g = A(L.weights[entry(r, e)]);
        gains[entry(r, e)] = g == 0 || !taught(r, e) ? A(0) : g * A(frame.plan.norm[r > 0]) * dot_scale(r);
      }
  }
  void begin_band() {
    memset(sums, 0, entries * sizeof(Sums));
    memset(dots, 0, entries * sizeof(double));
  }

  // A block's share, of which `dot` is null where that comes later.
  void add(int r, int e, int64_t b, const V* logarithm, const V* dot) const {
    const V *const weight = targets.weight(r), *const mass = targets.mass(r), *const counted = targets.counted(r);
    const A log_scale = this->log_scale(r), scale = dot_scale(r) * A(kLn2);
    V sum{}, loss[kMostRows];
    for (int i = 0; i < frame.rows; ++i) {
      loss[i] = mass[i] * logarithm[i] * log_scale;
      if (dot) loss[i] -= weight[i] * dot[i] * scale;
      loss[i] = counted[i] == A(0) ? V{} : loss[i];  // the others may be infinite or NaN
      sum += loss[i];
    }
    sums[entry(r, e)] += __builtin_convertvector(sum, Sums);
    if (L.reduction == Reduction::none) write_map(r, e, b, loss);
  }
  void write_map(int r, int e, int64_t b, const V* loss) const {
    const V zero{};
    A* const map = static_cast<A*>(L.losses) + entry(r, e) * frame.plan.pixels;
    for (int i = 0; i < frame.rows; ++i)
      memcpy(map + frame.pixel(i, b), loss ? loss + i : &zero, frame.columns(i, b) * sizeof(A));
  }

  // What its gradient has: of exponentials, added to `factor`; of the target, to at_target, if that is `kept`.
  void add_gradient(int r, int e, int64_t b, V* factor, bool kept) const {
    const V *const weight = targets.weight(r), *const mass = targets.mass(r), *const counted = targets.counted(r);
    V* const of_target = at_target + r * kMostRows;
    const bool maps = L.grad_losses && L.reduction == Reduction::none;
    V g = fill<V>(gain(r, e));
    if (!maps && gain(r, e) == 0) {
      for (int i = 0; i < frame.rows && kept; ++i) of_target[i] = V{};
      return;
    }
    for (int i = 0; i < frame.rows; ++i) {
      if (maps) g = gain_of_pixels(r, e, i, b);
      const auto left_out = maps ? (counted[i] == A(0)) | (g == A(0)) : counted[i] == A(0);
      factor[i] += left_out ? V{} : mass[i] * g;
      if (kept) of_target[i] = left_out ? V{} : weight[i] * g;
    }
  }
  // Whether all of exit e's losses have a gradient, at every pixel.
  bool leave_none_out(int e) const {
    bool all = !L.grad_losses || L.reduction != Reduction::none;
    for (int r = 0; r <= L.T; ++r) all &= !taught(r, e) || gain(r, e) != 0;
    return all;
  }
  V gain_of_pixels(int r, int e, int row, int64_t b) const {
    if (!L.grad_losses || L.reduction != Reduction::none) return fill<V>(gain(r, e));
    V g{};
    const A* const map = static_cast<const A*>(L.grad_losses) + entry(r, e) * frame.plan.pixels;
    memcpy(&g, map + frame.pixel(row, b), frame.columns(row, b) * sizeof(A));
    return g * dot_scale(r);
  }

  void end_band(double* partial) const {
    for (int i = 0; i < entries; ++i) {
      double sum = 0;
      for (int k = 0; k < kLanes; ++k) sum += sums[i][k];
      partial[i] = sum - dots[i] * kLn2 * double(dot_scale(i / L.N));
    }
  }
};

}  // namespace

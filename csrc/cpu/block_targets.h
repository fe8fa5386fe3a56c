// What small_exits.cpp teaches in a block: the labels' target and the teachers'.
#pragma once

#include "exit_sums.h"
#include "frame.h"
#include "pixel_weights.h"

#include "../pixel_math.h"

namespace {

template <class V>
struct Teacher {
  V* u;  // [C, frame.apart] exp(y / tau); times what it is multiplied by, the target
  V Z[kMostRows], Q[kMostRows], less[kMostRows];  // sums of exp(y), of u; what y is taken less of
  V q[kMostRows], weighted[kMostRows];            // the pixel's weight times what makes u the target; times its sum
};

template <class A>
struct BlockTargets {
  using V = typename VecOf<A>::V;

  const ExitLoss& L;
  const Frame<A>& frame;
  const A tau;
  const bool two;   // whether soft losses have exp(y / tau), and not exp(y)
  const int power;  // exp(y) is that power of a teacher's u; 0: of none
  PixelWeights<A> pixels;
  Teacher<V>* teachers;  // [T]
  A *hot, *rest;         // [C] the labels' target: of a pixel of that class, of one of another

  BlockTargets(const ExitLoss& launch, const Frame<A>& frame)
      : L(launch),
        frame(frame),
        tau(A(launch.temperature)),
        two(launch.T && launch.target == Target::renormalized && launch.temperature != 1),
        power(two ? 1 : small_integer(launch.temperature)) {}
  void lay_out(Memory& m) {
    hot = m.template take<A>(frame.C);
    rest = m.template take<A>(frame.C);
    teachers = m.template take<Teacher<V>>(L.T);
    for (int r = 0; r < L.T; ++r) {
      V* const u = m.template take<V>(frame.C * frame.apart);
      if (teachers) teachers[r].u = u;
    }
  }
  void begin_launch() {
    for (int c = 0; c < frame.C; ++c) {
      const A weight = frame.class_weight(c);
      rest[c] = frame.smoothing == 0 ? A(0) : weight * frame.smoothing;
      hot[c] = weight * A(1 - L.label_smoothing) + rest[c];
    }
  }

  int teacher_number(int e) const {
    for (int r = 0; r < L.T; ++r)
      if (L.teachers[r] == e) return r;
    return -1;
  }
  int vector_of(int r) const { return r - (L.labels ? 0 : 1); }  // Q of the labels, r = 0, or of teacher r - 1

  // Calls f(the target of the labels, r = 0, or of teacher r - 1; its weights in the block's rows).
  template <class F>
  void with_target(int r, F f) const {
    if (r > 0) {
      f(PowerOf<1, V>{teachers[r - 1].u, frame.apart}, teachers[r - 1].q);
    } else if (L.labels && frame.smoothing != 0) {
      f(OfLabels<true, A>(pixels.label, hot, rest), pixels.labelled);
    } else if (L.labels) {
      f(OfLabels<false, A>(pixels.label, hot, rest), pixels.labelled);
    }
  }

  // Once a teacher's exponentials and their sums are there.
  void weigh(Teacher<V>& t) const {
    for (int i = 0; i < frame.rows; ++i) {
      if (power == 1) t.Z[i] = t.Q[i];
      const V w = pixels.soft[i];
      const V factor = power == 1 ? A(1) / t.Q[i] : raw_target_factor(t.Z[i], tau);
      t.weighted[i] = w == A(0) ? V{} : w * (power == 1 ? fill<V>(A(1)) : t.Q[i] * factor);
      t.q[i] = w == A(0) ? V{} : w * factor;
    }
  }
};

}  // namespace

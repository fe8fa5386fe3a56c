// What is taught in a block: the labels' target and the teachers'.
#pragma once

#include "frame.h"
#include "pixel_weights.h"

namespace {

// Targets as functions of channel and row. One of a single channel of each pixel (none, where negative): the labels',
// or an argmax.
template <class A>
struct OneHot {
  using V = typename VecOf<A>::V;
  using Int = typename VecOf<A>::Int;
  const typename VecOf<A>::VInt* channel;  // [rows]
  SELFREG_ALWAYS V operator()(int c, int r) const { return channel[r] == Int(c) ? fill<V>(A(1)) : V{}; }
};
// The labels' with smoothing.
template <class A>
struct Smoothed {
  using V = typename VecOf<A>::V;
  using Int = typename VecOf<A>::Int;
  const typename VecOf<A>::VInt* channel;  // [rows]
  const A *own, *others;                   // [C] what a class has of pixels of its own, and of the others
  SELFREG_ALWAYS V operator()(int c, int r) const {
    const V other = channel[r] < 0 ? V{} : fill<V>(others[c]);
    return channel[r] == Int(c) ? fill<V>(own[c]) : other;
  }
};
// Or u^POWER of a block's exponentials u [C, apart].
template <int POWER, class V>
struct PowerOf {
  const V* u;
  int64_t apart;
  SELFREG_ALWAYS V operator()(int c, int r) const { return selfreg::power<POWER>(u[c * apart + r]); }
};

// Blocks are [C, frame.apart].
template <class A>
struct Teacher {
  using V = typename VecOf<A>::V;
  V* u;                                                     // exp(y / tau); times `factor`, the target
  Logits<A> logits;                                         // unless it is small
  V* said;                                                  // of one that learns: what its students said, see `tell`
  V Z[kMostRows], Q[kMostRows], less[kMostRows];            // sums of exp(y), of u; what y is taken less of
  V factor[kMostRows], weight[kMostRows], mass[kMostRows];  // weight: the pixel's times factor; mass: times Q, too
  typename VecOf<A>::VInt top[kMostRows];                   // argmax
};

template <class A>
struct Targets {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  using Int = typename VecOf<A>::Int;

  const ExitLoss& L;
  const Frame<A>& frame;
  const A tau;
  const bool argmax;
  const bool two;   // whether soft losses have exp(y / tau), and not exp(y)
  const int power;  // exp(y) is that power of a teacher's u; 0: of none
  PixelWeights<A> pixels;
  Teacher<A>* teachers;  // [T]
  A *own, *others;       // [C] see Smoothed

  Targets(const ExitLoss& launch, const Frame<A>& frame)
      : L(launch),
        frame(frame),
        tau(A(launch.temperature)),
        argmax(launch.target == Target::argmax),
        two(launch.T && launch.target == Target::renormalized && launch.temperature != 1),
        power(argmax ? 0
              : two  ? 1
                     : small_integer(launch.temperature)) {}
  void lay_out(Memory& m) {
    for (A** of_channels : {&own, &others}) *of_channels = m.template take<A>(frame.C);
    teachers = m.template take<Teacher<A>>(L.T);
    for (int r = 0; r < L.T; ++r) {
      Teacher<A> layout;
      Teacher<A>& t = teachers ? teachers[r] : layout;
      auto block = [&](bool needed) { return needed ? m.template take<V>(frame.C * frame.apart) : nullptr; };
      t.u = block(!argmax);
      t.logits.block = block(!frame.plan.resizes[L.teachers[r]].small);
      t.said = block(learns(r));
    }
  }
  void begin_launch() {
    for (int c = 0; c < frame.C && frame.smoothing != 0; ++c) {
      others[c] = frame.class_weight(c) * frame.smoothing;
      own[c] = frame.class_weight(c) * A(1 - L.label_smoothing) + others[c];
    }
  }

  bool learns(int r) const { return !L.detach_teacher && L.grads[L.teachers[r]].data; }
  int teacher_number(int e) const {
    for (int r = 0; r < L.T; ++r)
      if (L.teachers[r] == e) return r;
    return -1;
  }
  int vector_of(int r) const { return r - (L.labels ? 0 : 1); }  // Q of the labels, r = 0, or of teacher r - 1
  // Whether the target of the labels, r = 0, or of teacher r - 1 is one-hot.
  bool one_hot(int r) const { return r > 0 ? argmax : L.labels && frame.smoothing == 0; }
  // What a target is to be multiplied by; and that times its sum.
  const V* weight(int r) const { return one_hot(r) ? mass(r) : r > 0 ? teachers[r - 1].weight : pixels.labelled; }
  const V* counted(int r) const { return r > 0 ? mass(r) : pixels.labelled; }  // 0 where a pixel is left out
  const V* mass(int r) const { return r > 0 ? teachers[r - 1].mass : pixels.mass; }

  const VInt* channel(int r) const { return r > 0 ? teachers[r - 1].top : pixels.label; }  // of one that is one-hot
  // Calls f(the target of the labels, r = 0, or of teacher r - 1).
  template <class F>
  void with_target(int r, F f) const {
    if (one_hot(r)) {
      f(OneHot<A>{channel(r)});
    } else if (r > 0) {
      f(PowerOf<1, V>{teachers[r - 1].u, frame.apart});
    } else if (L.labels) {
      f(Smoothed<A>{pixels.label, own, others});
    }
  }

  // Once a teacher's exponentials and their sums are there.
  void weigh(Teacher<A>& t) const {
    for (int i = 0; i < frame.rows; ++i) {
      if (power == 1) t.Z[i] = t.Q[i];
      const V w = pixels.soft[i], one = fill<V>(A(1));
      t.factor[i] = argmax ? one : power == 1 ? A(1) / t.Q[i] : raw_target_factor(t.Z[i], tau);
      t.mass[i] = w == A(0) ? V{} : w * (argmax || power == 1 ? one : t.Q[i] * t.factor[i]);
      t.weight[i] = w == A(0) ? V{} : w * t.factor[i];
    }
  }
  // The first of the largest, as torch.argmax; NaN counts as the largest.
  void find_top(Teacher<A>& t) const {
    for (int i = 0; i < frame.rows; ++i) {
      V best = t.logits(0, i);
      t.top[i] = VInt{};
      for (int c = 1; c < frame.C; ++c) {
        const V z = t.logits(c, i);
        const VInt better = (z > best) | ((z != z) & (best == best));
        best = better ? z : best;
        t.top[i] = better ? VInt{} + Int(c) : t.top[i];
      }
    }
  }

  // ---- teachers that learn: dL/dt_j = said_j - softmax(t)_j sum_c said_c, and said_c = target_c times the sum over
  // students of gradient * log-probability

  void begin_block() const {
    for (int r = 0; r < L.T; ++r)
      if (learns(r)) memset(teachers[r].said, 0, frame.C * frame.apart * sizeof(V));
  }
  // A student's log-probabilities, times the gradient of its loss.
  void tell(int r, const Logits<A>& logits, const V* logarithm, const V* gradient) const {
    for (int i = 0; i < frame.rows; ++i)
      for (int c = 0; c < frame.C; ++c) {
        const V log_p = (logits(c, i) - logits.most[i]) * (logits.unit * A(kLn2)) - logarithm[i];
        teachers[r].said[c * frame.apart + i] += gradient[i] == A(0) ? V{} : gradient[i] * log_p;
      }
  }
  // Once all have spoken; `sum` over channels.
  void add_up_said(const Teacher<A>& t, V* sum) const {
    for (int i = 0; i < frame.rows; ++i) {
      sum[i] = V{};
      for (int64_t at = i; at < frame.C * frame.apart; at += frame.apart) {
        const V target = t.u[at] * t.factor[i];
        t.said[at] = target == A(0) ? V{} : target * t.said[at];
        sum[i] += t.said[at];
      }
    }
  }
};

}  // namespace

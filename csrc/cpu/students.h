// Phase 2: an exit's exponentials in a block, its losses, and their gradient.
#pragma once

#include <initializer_list>

#include "exits.h"
#include "losses.h"

namespace {

// Two kinds of exponentials, each times a factor of its own: what of them is in a gradient.
template <class V>
struct SumOfBoth {
  const V *e1, *e2, *f1, *f2;
  int64_t apart;
  SELFREG_ALWAYS V operator()(int c, int r) const { return e1[c * apart + r] * f1[r] + e2[c * apart + r] * f2[r]; }
};

// Of a teacher that learns, the gradient comes in a second pass: it also has what all of its students said.
enum class Pass { all, losses, gradient };

template <class A>
class Students {
  using V = typename VecOf<A>::V;

 public:
  Students(const Frame<A>& frame, const Exits<A>& exits, const Targets<A>& targets, const Losses<A>& losses)
      : L(frame.L), frame(frame), exits(exits), targets(targets), losses(losses), full(frame) {}
  void lay_out(Memory& m) {
    for (V** block : {&own.block, &e1, &e2}) *block = m.template take<V>(frame.C * frame.apart);
    for (V& one : ones) one = fill<V>(A(1));
  }

  void learn(int e, int64_t b, Pass pass) {
    self = targets.teacher_number(e);
    small = exits.is_small(e);
    gradient = L.grads[e].data && pass != Pass::losses;
    const bool soft = L.T > (self >= 0 ? 1 : 0), learner = pass == Pass::gradient;
    first = L.labels || (!targets.two && (soft || learner));
    second = targets.two && soft;
    if (!L.labels && !soft && !learner) {
      for (int r = 0; r <= L.T && L.reduction == Reduction::none; ++r) losses.write_map(r, e, b, nullptr);
      if (!gradient || small) return;
      memset(e1, 0, frame.C * frame.apart * sizeof(V));
      return exits.write(e, b, e1);
    }
    // Teachers have been read.
    logits = self >= 0 ? &targets.teachers[self].logits : &own;
    if (!small && self < 0) exits.read(e, b, targets.pixels.counted(L), own);
    choose_beside(e);
    take_exponentials(e, b);
    V f1[kMostRows], f2[kMostRows], said[kMostRows];
    for (int i = 0; i < frame.rows; ++i) f1[i] = f2[i] = V{};
    take_losses(e, b, pass, f1, f2);
    if (!gradient) return;
    if (learner) targets.add_up_said(targets.teachers[self], said);
    for (int i = 0; i < frame.rows; ++i) {
      if (learner && !targets.two) f1[i] += said[i];
      if (first) f1[i] /= Z1[i];
      if (second) f2[i] /= Z2[i];
    }
    small ? add_gradient(e, b, f1, f2) : write_gradient(e, b, f1, f2, learner ? said : nullptr);
  }

 private:
  const ExitLoss& L;
  const Frame<A>& frame;
  const Exits<A>& exits;
  const Targets<A>& targets;
  const Losses<A>& losses;
  const FullSize<A> full;
  Logits<A> own;
  V *e1, *e2;  // [C, frame.apart] exp(y), and then the gradient; exp(y / tau)
  V ones[kMostRows];
  // Of the exit at hand.
  int self;                        // its number as a teacher, or -1
  bool small, gradient;            // one is wanted
  bool first, second;              // which exponentials its losses have
  const Logits<A>* logits;         // unless it is small
  V Z1[kMostRows], Z2[kMostRows];  // sums of the exponentials
  V less[kMostRows];               // what y is taken less of
  // Those of its teachers whose targets are read beside its exponentials, and beside them in its gradient.
  int beside, teacher_beside[kBeside];
  const V* target_beside[kBeside];
  V dot_beside[kBeside][kMostRows];

  void choose_beside(int e) {
    beside = 0;
    if (small || targets.argmax) return;
    for (int r = 1; r <= L.T && beside < kBeside; ++r)
      if (losses.taught(r, e)) teacher_beside[beside] = r, target_beside[beside++] = targets.teachers[r - 1].u;
  }
  bool is_beside(int r) const {
    return (beside > 0 && teacher_beside[0] == r) || (beside > 1 && teacher_beside[1] == r);
  }

  // A teacher's exp(y) is a power of its u.
  int raised() const { return self >= 0 && !targets.two ? targets.power : 0; }

  void take_exponentials(int e, int64_t b) {
    if (raised()) {
      const Teacher<A>& t = targets.teachers[self];
      for (int i = 0; i < frame.rows && small; ++i) Z1[i] = t.Z[i], less[i] = t.less[i];
      if (!small) raise(e, b, t.u);
    } else if (first && second) {
      take(e, b, A(1), Student<V, A, true, true>{e1, e2, 1 / targets.tau});
    } else if (second) {
      take(e, b, 1 / targets.tau, Student<V, A, false, true>{e1, e2, A(1)});
    } else if (first) {
      take(e, b, A(1), Student<V, A, true, false>{e1, e2, A(1)});
    } else {
      memset(e1, 0, frame.C * frame.apart * sizeof(V));  // of a teacher that learns, and is not taught
    }
  }
  void raise(int e, int64_t b, const V* u) {
    switch (raised()) {
      case 1: return take(e, b, A(1), Raising<V, A, 1>{e1, u});
      case 2: return take(e, b, A(1), Raising<V, A, 2>{e1, u});
      case 3: return take(e, b, A(1), Raising<V, A, 3>{e1, u});
      default: return take(e, b, A(1), Raising<V, A, 4>{e1, u});
    }
  }
  template <class Job>
  void take(int e, int64_t b, A scale, const Job job) {
    if (small) return exits.exponentials.take(exits.lines[e], b, targets.pixels.counted(L), scale, job, Z1, Z2, less);
    for (int i = 0; i < frame.rows; ++i) less[i] = V{};
    with_beside([&](auto count) {
      full.template exponentials<count.value>(*logits, scale, job, target_beside, Z1, Z2, dot_beside,
                                              exits.ahead(e, b));
    });
    for (int t = 0; t < beside && scale != 1; ++t)
      for (int i = 0; i < frame.rows; ++i) dot_beside[t][i] /= scale;
  }
  template <class F>
  SELFREG_ALWAYS void with_beside(F f) const {
    switch (beside) {
      case 0: return f(Number<0>{});
      case 1: return f(Number<1>{});
      default: return f(Number<2>{});
    }
  }

  void take_losses(int e, int64_t b, Pass pass, V* f1, V* f2) {
    V log1[kMostRows], log2_of[kMostRows], dot[kMostRows];
    for (int i = 0; i < frame.rows; ++i) {
      if (first) log1[i] = log2(Z1[i]) * A(kLn2) + less[i];
      if (second) log2_of[i] = log2(Z2[i]) * A(kLn2) + less[i] / targets.tau;
    }
    for (int r = 0; r <= L.T; ++r) {
      const bool of_second = r > 0 && targets.two;
      const V* const logarithm = of_second ? log2_of : log1;
      if (!losses.taught(r, e)) {
        if (L.reduction == Reduction::none && pass != Pass::gradient) losses.write_map(r, e, b, nullptr);
        continue;
      }
      if (pass != Pass::gradient) {
        const V* product = small ? nullptr : dot;
        for (int t = 0; t < beside; ++t)
          if (teacher_beside[t] == r) product = dot_beside[t];
        if (product == dot) targets.with_target(r, [&](auto target) { full.dot(*logits, target, dot); });
        losses.add(r, e, b, logarithm, product);
        if (r > 0 && targets.learns(r - 1)) tell(r, e, b, logarithm);
      }
      if (gradient) losses.add_gradient(r, e, b, of_second ? f2 : f1, !small);
    }
  }
  void tell(int r, int e, int64_t b, const V* logarithm) const {
    V scaled[kMostRows], factor[kMostRows];
    for (int i = 0; i < frame.rows; ++i) {
      const V g = losses.gain_of_pixels(r, e, i, b), weight = targets.pixels.soft[i];
      scaled[i] = logarithm[i] * (targets.two ? targets.tau : A(1));
      factor[i] = (weight == A(0)) | (g == A(0)) ? V{} : weight * g / targets.tau;
    }
    targets.tell(r - 1, *logits, scaled, factor);
  }

  // `said` is null unless this is a teacher that learns.
  void write_gradient(int e, int64_t b, const V* f1, const V* f2, const V* said) {
    if (!losses.leave_none_out(e)) beside = 0;
    const V* of_target[kBeside];
    for (int t = 0; t < beside; ++t) of_target[t] = losses.at_target + teacher_beside[t] * kMostRows;
    const bool labels_are = targets.one_hot(0);
    auto is_left = [&](int r) { return losses.taught(r, e) && !is_beside(r) && !(r == 0 && labels_are); };
    bool left = said != nullptr;
    for (int r = 0; r <= L.T; ++r) left |= is_left(r);
    const Rows<A> rows = exits.memory.rows(e, e1, !left && !exits.is_resized(e));
    with_beside([&](auto count) {
      auto gradient = [&](auto from, const V* factor) {
        full.template gradient<count.value>(from, factor, target_beside, of_target,
                                            labels_are ? targets.channel(0) : nullptr, losses.at_target, rows);
      };
      if (first && second) {
        gradient(SumOfBoth<V>{e1, e2, f1, f2, frame.apart}, ones);
      } else {
        gradient(PowerOf<1, V>{second ? e2 : e1, frame.apart}, second ? f2 : f1);
      }
    });
    if (rows.to) return;
    for (int r = 0; r <= L.T; ++r)
      if (is_left(r))
        targets.with_target(r, [&](auto target) { full.subtract(target, losses.at_target + r * kMostRows, e1); });
    if (said) full.add_said(targets.teachers[self], said, targets.two, e1);
    exits.write(e, b, e1);
  }

  // To the sums of a small exit.
  void add_gradient(int e, int64_t b, const V* f1, const V* f2) const {
    const int64_t apart = frame.apart;
    const ExitLines<A>& lines = exits.lines[e];
    auto add = [&](auto from, const V* factor) { lines.size->add(lines.vector, b, from, factor); };
    if (first && second) return add(SumOfBoth<V>{e1, e2, f1, f2, apart}, ones);
    if (second) return add(PowerOf<1, V>{e2, apart}, f2);
    const V* const u = raised() ? targets.teachers[self].u : e1;
    switch (raised()) {
      case 2: return add(PowerOf<2, V>{u, apart}, f1);
      case 3: return add(PowerOf<3, V>{u, apart}, f1);
      case 4: return add(PowerOf<4, V>{u, apart}, f1);
      default: return add(PowerOf<1, V>{u, apart}, f1);
    }
  }
};

}  // namespace

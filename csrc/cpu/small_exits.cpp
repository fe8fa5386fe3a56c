// Exits smaller than the output: the exit-loss matrix, phases 1 and 2. Compiled once for each instruction set, like
// full_size.cpp, which has what is rare; launch.cpp chooses.
//
// Interpolation is linear, y_c(p) = sum_k a_kp y_kc over an exit's positions k, so that at the exit's own resolution
//   sum_p w_p sum_c target_rc(p) y_c(p) = sum_kc y_kc Q_rkc          with Q_rkc = sum_p a_kp w_p target_rc(p)
//   gradient_kc                         = S_kc - sum_r gain_r Q_rkc  with S_kc = sum_p a_kp f_p exp(y_c(p))
// Q is the same for all exits of a size, and labels are one more teacher. At the output's resolution there remain an
// exit's exponentials, their sum, and S: no targets, no dot products, no gradient.
//
// A block is a vector of columns, up to eight rows and all channels: its exponentials stay in the first-level cache. A
// span is those of its rows that lie between the same two rows of an exit. For each block:
//   phase 1  each teacher: exponentials and their sums; its target's part of Q
//   phase 2  each exit: exponentials and their sums, the logarithms in its losses; its part of S
// When the blocks have passed a row of an exit, its Q and S give the rest of the losses, and the gradient.
// A part of Q or S is summed over a span's rows first, at the output's columns, for the exit's row above and the one
// below; then it is transposed, so that a vector holds channels, and summed over the columns between the same two.
//
// Positions are taken less their own maximum over channels, so that no y_kc is above 0, nor what is interpolated from
// them. Where maxima are of other channels, all exponentials of a pixel may be small; then, and where a number is not
// finite, a block is done with care: less its pixels' own maxima, and without pixels that do not count.
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "exit_lines.h"
#include "exit_sums.h"
#include "exponentials.h"
#include "frame.h"
#include "loss_sums.h"
#include "pixel_weights.h"

namespace {

// A teacher's block.
template <class V>
struct Teacher {
  V* u;  // [C, frame.apart] exp(y / tau); times what it is multiplied by, the target
  V Z[kMostRows], Q[kMostRows], less[kMostRows];  // sums of exp(y), of u; what y is taken less of
  V weighted[kMostRows];                          // the pixel's weight times the sum of the target
};

template <class A>
class SmallExits {
  using V = typename VecOf<A>::V;
  using Sums = typename VecOf<A>::Sums;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

 public:
  SmallExits(const ExitLoss& launch, const Plan& plan)
      : L(launch),
        plan(plan),
        N(launch.N),
        T(launch.T),
        tau(A(launch.temperature)),
        frame(launch, plan),
        losses(launch) {
    two = T && L.target == Target::renormalized && tau != 1;
    power = two ? 1 : small_integer(L.temperature);
    Memory counted{nullptr, 0};
    lay_out(counted);
    memory = static_cast<char*>(aligned_alloc(64, counted.used));
    missing = memory ? 0 : counted.used;
    if (!memory) return;
    Memory taken{memory, 0};
    lay_out(taken);
    over_sizes([&](ExitSums<A>& size) { size.place_columns(frame); });
    for (int c = 0; c < frame.C; ++c) {
      const A weight = frame.class_weight(c);
      rest[c] = frame.smoothing == 0 ? A(0) : weight * frame.smoothing;
      hot[c] = weight * A(1 - L.label_smoothing) + rest[c];
    }
    losses.begin_launch(plan.norm);
  }
  SmallExits(const SmallExits&) = delete;
  ~SmallExits() { free(memory); }

  int64_t missing;  // bytes that could not be had: then there is nothing to work with

  // Bands [begin, end) of all images; the sums of each go to partial[band].
  void run(int64_t begin, int64_t end, double* partial) {
    for (int64_t number = begin; number < end; ++number) run_band(number, partial + number * losses.entries);
  }

 private:
  const ExitLoss& L;
  const Plan& plan;
  const int N, T;
  const A tau;
  bool two;   // whether soft losses have exp(y / tau), and not exp(y)
  int power;  // exp(y) is that power of a teacher's u; 0: of none
  char* memory;
  Frame<A> frame;
  LossSums<A> losses;
  PixelWeights<A> pixels;
  Exponentials<A> exponentials;
  ExitLines<A>* lines;   // [N]
  ExitSums<A>* sizes;    // [N], of which those are in use that are an exit's number and the first of their size
  Teacher<V>* teachers;  // [T]
  A *hot, *rest;         // [C] the labels' target: of a pixel of that class, of one of another
  V *e1, *e2;            // [C, frame.apart] exp(y) and exp(y / tau) of the student at hand
  A* across;             // [width, pitch] a row of an exit, channels together

  int teacher_number(int e) const {
    for (int r = 0; r < T; ++r)
      if (L.teachers[r] == e) return r;
    return -1;
  }
  int vector_of(int r) const { return r - (L.labels ? 0 : 1); }  // Q of the labels, r = 0, or of teacher r - 1
  template <class F>
  void over_sizes(F f) {
    for (int e = 0; e < N; ++e)
      if (lines[e].size == &sizes[e]) f(sizes[e]);
  }

  void lay_out(Memory& m) {
    const int64_t block = frame.C * frame.apart;
    lines = m.template take<ExitLines<A>>(N);
    sizes = m.template take<ExitSums<A>>(N);
    teachers = m.template take<Teacher<V>>(T);
    hot = m.template take<A>(frame.C);
    rest = m.template take<A>(frame.C);
    losses.lay_out(m);
    exponentials.lay_out(m, frame);
    for (V** of_block : {&e1, &e2}) *of_block = m.template take<V>(block);
    for (int r = 0; r < T; ++r) {
      V* const u = m.template take<V>(block);
      if (teachers) teachers[r].u = u;
    }
    int64_t widest = 0;
    for (int e = 0; e < N; ++e) {
      ExitLines<A> a{};
      ExitSums<A> b{};
      (lines ? lines[e] : a).lay_out(m, frame, e);
      widest = widest < L.exits[e].W ? L.exits[e].W : widest;
      if (lines) lines[e].size = &sizes[frame.first_of_size(e)];
      if (frame.first_of_size(e) != e) continue;
      int wanted = 0;
      for (int other = e; other < N; ++other) {
        if (frame.first_of_size(other) != e) continue;
        const bool has_gradient = L.grads[other].data;
        if (lines) lines[other].vector = has_gradient ? ExitSums<A>::targets(L) + wanted : -1;
        wanted += has_gradient;
      }
      (sizes ? sizes[e] : b).lay_out(m, frame, plan.resizes[e], wanted);
    }
    across = m.template take<A>((widest + kLanes) * frame.pitch);
  }

  // ---- bands and tiles ----

  void run_band(int64_t number, double* partial) {
    frame.image = number / plan.bands;
    frame.band = number % plan.bands;
    frame.y0 = plan.begins[frame.band], frame.y1 = plan.begins[frame.band + 1];
    losses.begin_band();
    over_sizes([&](ExitSums<A>& size) { size.begin_band(frame.y0); });
    for (frame.top = frame.y0; frame.top < frame.y1; frame.top += frame.rows) {
      begin_tile();
      for (int64_t b = 0; b < frame.blocks; ++b) {
        pixels.read(frame, b);
        for (int r = 0; r < T; ++r) teach(r, b);
        if (L.labels) frame.smoothing != 0 ? add_labels<true>(b) : add_labels<false>(b);
        for (int r = T; r-- > 0;) learn(L.teachers[r], b);  // while what they taught is in cache
        for (int e = 0; e < N; ++e)
          if (teacher_number(e) < 0) learn(e, b);
      }
      over_sizes([&](ExitSums<A>& size) {
        const int64_t until = rows_until(L, *size.resize, frame.top + frame.rows, frame.y1);
        for (; size.done < until; ++size.done) {
          if (size.done == size.opened) size.add_carried();  // the band ends
          finish(size, size.done);
        }
      });
    }
    losses.end_band(two ? L.temperature * L.temperature : L.temperature, partial);
  }

  void begin_tile() {
    const int64_t top = frame.top;
    frame.rows = int(rows_of_tile(plan, top, frame.y1));
    over_sizes([&](ExitSums<A>& size) { size.cut(top, frame.rows); });
    for (int e = 0; e < N; ++e) lines[e].draw(frame);
  }

  // ---- phase 1 ----

  void teach(int r, int64_t b) {
    Teacher<V>& t = teachers[r];
    switch (power) {
      case 1: target<1>(t, L.teachers[r], b); break;
      case 2: target<2>(t, L.teachers[r], b); break;
      case 3: target<3>(t, L.teachers[r], b); break;
      case 4: target<4>(t, L.teachers[r], b); break;
      default: target<0>(t, L.teachers[r], b);
    }
    V q[kMostRows];
    for (int i = 0; i < frame.rows; ++i) {
      if (power == 1) t.Z[i] = t.Q[i];
      const V w = pixels.soft[i];
      const V factor = power == 1 ? A(1) / t.Q[i] : raw_target_factor(t.Z[i], tau);
      t.weighted[i] = w == A(0) ? V{} : w * (power == 1 ? fill<V>(A(1)) : t.Q[i] * factor);
      q[i] = w == A(0) ? V{} : w * factor;
    }
    over_sizes([&](ExitSums<A>& size) {
      bool needed = false;
      for (int e = 0; e < N; ++e) needed |= lines[e].size == &size && losses.taught(r + 1, e);
      if (needed) size.add(vector_of(r + 1), b, PowerOf<1, V>{t.u, frame.apart}, q);
    });
  }
  template <int POWER>
  void target(Teacher<V>& t, int e, int64_t b) {
    exponentials.take(frame, pixels, lines[e], b, 1 / tau, Teaching<V, A, POWER>{t.u, tau}, t.Z, t.Q, t.less);
  }

  template <bool SMOOTH>
  void add_labels(int64_t b) {
    OfLabels<SMOOTH, A> target;
    target.hot = hot, target.rest = rest;
    memcpy(target.label, pixels.label, sizeof target.label);
    over_sizes([&](ExitSums<A>& size) { size.add(0, b, target, pixels.labelled); });
  }

  // ---- phase 2 ----

  void learn(int e, int64_t b) {
    const int self = teacher_number(e);
    const bool soft = T > (self >= 0 ? 1 : 0);
    if (!L.labels && !soft) return;
    const bool first = L.labels || !two, second = two && soft;  // which exponentials its losses have
    const int raised = self >= 0 && !two ? power : 0;           // a teacher's exp(y) is that power of its u
    V Z1[kMostRows], Z2[kMostRows], log1[kMostRows], log2_of[kMostRows], f1[kMostRows] = {}, f2[kMostRows] = {};
    V less[kMostRows];
    if (raised) {
      memcpy(Z1, teachers[self].Z, sizeof Z1);
      memcpy(less, teachers[self].less, sizeof less);
    } else if (first && second) {
      exponentials.take(frame, pixels, lines[e], b, A(1), Student<V, A, true, true>{e1, e2, 1 / tau}, Z1, Z2, less);
    } else if (second) {
      exponentials.take(frame, pixels, lines[e], b, 1 / tau, Student<V, A, false, true>{e1, e2, A(1)}, Z1, Z2, less);
    } else {
      exponentials.take(frame, pixels, lines[e], b, A(1), Student<V, A, true, false>{e1, e2, A(1)}, Z1, Z2, less);
    }
    for (int i = 0; i < frame.rows; ++i) {
      if (first) log1[i] = log2(Z1[i]) * A(kLn2) + less[i];
      if (second) log2_of[i] = log2(Z2[i]) * A(kLn2) + less[i] / tau;
    }
    const int vector = lines[e].vector, rows = frame.rows;
    const bool gradient = vector >= 0;
    if (L.labels) losses.add(0, e, rows, pixels.mass, pixels.labelled, log1, gradient, f1);
    for (int r = 1; r <= T; ++r) {
      const V* const weight = teachers[r - 1].weighted;
      if (losses.taught(r, e)) losses.add(r, e, rows, weight, weight, two ? log2_of : log1, gradient, two ? f2 : f1);
    }
    if (!gradient) return;
    ExitSums<A>& size = *lines[e].size;
    for (int i = 0; i < frame.rows; ++i) {
      if (first) f1[i] /= Z1[i];
      if (second) f2[i] /= Z2[i];
    }
    if (first && second) {
      V ones[kMostRows];
      for (V& one : ones) one = fill<V>(A(1));
      size.add(vector, b, SumOfBoth<V>{e1, e2, f1, f2, frame.apart}, ones);
    } else if (second) {
      size.add(vector, b, PowerOf<1, V>{e2, frame.apart}, f2);
    } else {
      const V* const u = raised ? teachers[self].u : e1;
      switch (raised) {
        case 2: size.add(vector, b, PowerOf<2, V>{u, frame.apart}, f1); break;
        case 3: size.add(vector, b, PowerOf<3, V>{u, frame.apart}, f1); break;
        case 4: size.add(vector, b, PowerOf<4, V>{u, frame.apart}, f1); break;
        default: size.add(vector, b, PowerOf<1, V>{u, frame.apart}, f1);
      }
    }
  }

  // ---- what is left when the blocks have passed row i of the exits of a size ----

  void finish(ExitSums<A>& size, int64_t i) {
    const bool touched = i < size.opened && i >= size.resize->rows.low[frame.y0];
    for (int e = 0; e < N; ++e) {
      if (lines[e].size != &size) continue;
      if (touched) lines[e].turn(i, frame.pitch, across);
      for (int r = 0; r <= T && touched; ++r)
        if (losses.taught(r, e)) losses.dots[losses.entry(r, e)] += size.dot(vector_of(r), i, across);
      if (lines[e].vector < 0) continue;
      for (int r = 0; r <= T && touched; ++r)
        if (losses.gain(r, e) != 0) size.subtract(vector_of(r), losses.gain(r, e), lines[e].vector, i);
      const A* const row = touched ? size.row(lines[e].vector, i) : nullptr;
      write_gradient(L, plan, e, frame.image, frame.band, i, row, frame.pitch);
    }
  }
};

template <class A>
int64_t run_bands(const ExitLoss& L, const Plan& plan, int64_t begin, int64_t end, double* partial) {
  SmallExits<A> worker(L, plan);
  if (!worker.missing) worker.run(begin, end, partial);
  return worker.missing;
}

}  // namespace

namespace selfreg {

int64_t SELFREG_NAME(run_small_exits_, SELFREG_ISA)(const ExitLoss& L, const Plan& plan, int64_t begin, int64_t end,
                                                    double* partial) {
  return L.dtype == DType::float64 ? run_bands<double>(L, plan, begin, end, partial)
                                   : run_bands<float>(L, plan, begin, end, partial);
}

}  // namespace selfreg

// Exits smaller than the output, with others of its size among them: the exit-loss matrix, phases 1 and 2. Compiled
// once for each instruction set, like full_size.cpp, which has what is rare; launch.cpp chooses.
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
// below; this goes on with the next span, of which it is the row above. A row that is complete is transposed, so that a
// vector holds channels, and summed over the columns between the same two. (full_exit.h has the exits of the output's
// size: for them all of it stays in the block.)
//
// Positions are taken less their own maximum over channels, so that no y_kc is above 0, nor what is interpolated from
// them. Where maxima are of other channels, all exponentials of a pixel may be small; then, and where a number is not
// finite, a block is done with care: less its pixels' own maxima, and without pixels that do not count.
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "block_targets.h"
#include "exit_lines.h"
#include "exit_sums.h"
#include "exponentials.h"
#include "frame.h"
#include "full_exit.h"
#include "loss_sums.h"
#include "pixel_weights.h"

namespace {

template <class A>
class SmallExits {
  using V = typename VecOf<A>::V;
  using Sums = typename VecOf<A>::Sums;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

 public:
  SmallExits(const ExitLoss& launch, const Plan& plan)
      : L(launch), plan(plan), N(launch.N), T(launch.T), frame(launch, plan), targets(launch, frame), losses(launch) {
    Memory counted{nullptr, 0};
    lay_out(counted);
    memory = static_cast<char*>(aligned_alloc(64, counted.used));
    missing = memory ? 0 : counted.used;
    if (!memory) return;
    Memory taken{memory, 0};
    lay_out(taken);
    over_sizes([&](ExitSums<A>& size) { size.place_columns(frame); });
    targets.begin_launch();
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
  char* memory;
  Frame<A> frame;
  BlockTargets<A> targets;
  LossSums<A> losses;
  Exponentials<A> exponentials;
  ExitLines<A>* lines;  // [N]
  FullExit<A>* fulls;   // [N], of which those are in use that say so
  ExitSums<A>* sizes;   // [N], of which those are in use that are an exit's number and the first of their size
  V *e1, *e2;           // [C, frame.apart] exp(y) and exp(y / tau) of the student at hand
  A* across;            // [width, pitch] a row of an exit, channels together

  template <class F>
  void over_sizes(F f) {
    for (int e = 0; e < N; ++e)
      if (lines[e].size == &sizes[e]) f(sizes[e]);
  }

  void lay_out(Memory& m) {
    lines = m.template take<ExitLines<A>>(N);
    fulls = m.template take<FullExit<A>>(N);
    sizes = m.template take<ExitSums<A>>(N);
    targets.lay_out(m);
    losses.lay_out(m);
    exponentials.lay_out(m, frame);
    for (V** of_block : {&e1, &e2}) *of_block = m.template take<V>(frame.C * frame.apart);
    int64_t widest = 0;
    for (int e = 0; e < N; ++e) {
      ExitLines<A> a{};
      ExitSums<A> b{};
      FullExit<A> c{};
      (fulls ? fulls[e] : c).lay_out(m, frame, e);
      if (!plan.resizes[e].needed) {
        if (lines) lines[e].size = nullptr;
        continue;
      }
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
    frame.image = number / plan.bands, frame.band = number % plan.bands;
    frame.y0 = plan.begins[frame.band], frame.y1 = plan.begins[frame.band + 1];
    losses.begin_band();
    over_sizes([&](ExitSums<A>& size) { size.begin_band(frame.y0); });
    for (frame.top = frame.y0; frame.top < frame.y1; frame.top += frame.rows) {
      begin_tile();
      for (int64_t b = 0; b < frame.blocks; ++b) {
        targets.pixels.read(frame, b);
        for (int e = 0; e < N; ++e)
          if (fulls[e].here) fulls[e].read(frame, targets.pixels, b);
        for (int r = 0; r < T; ++r) teach(r, b);
        if (L.labels) add_target(0, b);
        for (int r = T; r-- > 0;) learn(L.teachers[r], b);  // while what they taught is in cache
        for (int e = 0; e < N; ++e)
          if (targets.teacher_number(e) < 0) learn(e, b);
      }
      over_sizes([&](ExitSums<A>& size) {
        const int64_t until = rows_until(L, *size.resize, frame.top + frame.rows, frame.y1);
        for (; size.done < until; ++size.done) {
          if (size.done == size.opened) size.add_carried();  // the band ends
          finish(size, size.done);
        }
      });
    }
    losses.end_band(targets.two ? L.temperature * L.temperature : L.temperature, partial);
  }

  void begin_tile() {
    frame.rows = int(rows_of_tile(plan, frame.top, frame.y1));
    over_sizes([&](ExitSums<A>& size) { size.cut(frame.top, frame.rows); });
    for (int e = 0; e < N; ++e)
      if (!fulls[e].here) lines[e].draw(frame);
  }

  // ---- phase 1 ----

  void teach(int r, int64_t b) {
    Teacher<V>& t = targets.teachers[r];
    switch (targets.power) {
      case 1: target<1>(t, L.teachers[r], b); break;
      case 2: target<2>(t, L.teachers[r], b); break;
      case 3: target<3>(t, L.teachers[r], b); break;
      case 4: target<4>(t, L.teachers[r], b); break;
      default: target<0>(t, L.teachers[r], b);
    }
    targets.weigh(t);
    add_target(r + 1, b);
  }
  template <int POWER>
  void target(Teacher<V>& t, int e, int64_t b) {
    take(e, b, 1 / targets.tau, Teaching<V, A, POWER>{t.u, targets.tau}, t.Z, t.Q, t.less);
  }
  template <class Job>
  void take(int e, int64_t b, A scale, const Job job, V* Z1, V* Z2, V* less) {
    if (!fulls[e].here) return exponentials.take(frame, targets.pixels, lines[e], b, scale, job, Z1, Z2, less);
    fulls[e].take(frame.rows, scale, job, Z1, Z2);
    for (int i = 0; i < frame.rows; ++i) less[i] = V{};
  }
  // To Q, of all sizes of which exits learn it.
  void add_target(int r, int64_t b) {
    targets.with_target(r, [&](const auto& target, const V* weight) {
      over_sizes([&](ExitSums<A>& size) {
        bool needed = false;
        for (int e = 0; e < N; ++e) needed |= lines[e].size == &size && losses.taught(r, e);
        if (needed) size.add(targets.vector_of(r), b, target, weight);
      });
    });
  }

  // ---- phase 2 ----

  void learn(int e, int64_t b) {
    const int self = targets.teacher_number(e);
    const bool soft = T > (self >= 0 ? 1 : 0);
    if (!L.labels && !soft) {
      if (fulls[e].here && L.grads[e].data) fulls[e].write_zeros(frame, b, e1);
      return;
    }
    const bool first = L.labels || !targets.two, second = targets.two && soft;  // which exponentials its losses have
    const int raised = self >= 0 && !targets.two ? targets.power : 0;  // a teacher's exp(y) is that power of its u
    V Z1[kMostRows], Z2[kMostRows], log1[kMostRows], log2_of[kMostRows], f1[kMostRows] = {}, f2[kMostRows] = {};
    V less[kMostRows];
    if (raised) {
      memcpy(Z1, targets.teachers[self].Z, sizeof Z1);
      memcpy(less, targets.teachers[self].less, sizeof less);
    } else if (first && second) {
      take(e, b, A(1), Student<V, A, true, true>{e1, e2, 1 / targets.tau}, Z1, Z2, less);
    } else if (second) {
      take(e, b, 1 / targets.tau, Student<V, A, false, true>{e1, e2, A(1)}, Z1, Z2, less);
    } else {
      take(e, b, A(1), Student<V, A, true, false>{e1, e2, A(1)}, Z1, Z2, less);
    }
    for (int i = 0; i < frame.rows; ++i) {
      if (first) log1[i] = log2(Z1[i]) * A(kLn2) + less[i];
      if (second) log2_of[i] = log2(Z2[i]) * A(kLn2) + less[i] / targets.tau;
    }
    const int vector = lines[e].vector, rows = frame.rows;
    const bool gradient = L.grads[e].data;
    if (L.labels) losses.add(0, e, rows, targets.pixels.mass, targets.pixels.labelled, log1, gradient, f1);
    for (int r = 1; r <= T; ++r) {
      const V* const weight = targets.teachers[r - 1].weighted;
      if (losses.taught(r, e))
        losses.add(r, e, rows, weight, weight, targets.two ? log2_of : log1, gradient, targets.two ? f2 : f1);
    }
    const FullExit<A>& full = fulls[e];
    if (full.here) add_dots(e);
    if (!gradient) return;
    for (int i = 0; i < rows; ++i) {
      if (first) f1[i] /= Z1[i];
      if (second) f2[i] /= Z2[i];
    }
    auto put = [&](const auto& from, const V* factor) {
      full.here ? full.set(rows, from, factor, e1) : lines[e].size->add(vector, b, from, factor);
    };
    if (first && second) {
      V ones[kMostRows];
      for (V& one : ones) one = fill<V>(A(1));
      put(SumOfBoth<V>{e1, e2, f1, f2, frame.apart}, ones);
    } else if (second) {
      put(PowerOf<1, V>{e2, frame.apart}, f2);
    } else {
      const V* const u = raised ? targets.teachers[self].u : e1;
      switch (raised) {
        case 2: put(PowerOf<2, V>{u, frame.apart}, f1); break;
        case 3: put(PowerOf<3, V>{u, frame.apart}, f1); break;
        case 4: put(PowerOf<4, V>{u, frame.apart}, f1); break;
        default: put(PowerOf<1, V>{u, frame.apart}, f1);
      }
    }
    if (full.here) finish_block(e, b, e1);
  }
  // Of an exit of the output's size: what is taught it, in the losses, and in its gradient g.
  void add_dots(int e) {
    for (int r = 0; r <= T; ++r)
      if (losses.taught(r, e))
        targets.with_target(r, [&](const auto& target, const V* weight) {
          losses.dots[losses.entry(r, e)] += fulls[e].dot(frame.rows, target, weight);
        });
  }
  void finish_block(int e, int64_t b, V* g) const {
    for (int r = 0; r <= T; ++r)
      targets.with_target(r, [&](const auto& target, const V* weight) {
        fulls[e].subtract(frame.rows, target, losses.gain(r, e), weight, g);
      });
    fulls[e].write(frame, b, g);
  }

  // ---- what is left when the blocks have passed row i of the exits of a size ----

  void finish(ExitSums<A>& size, int64_t i) {
    const bool touched = i < size.opened && i >= size.resize->rows.low[frame.y0];
    for (int e = 0; e < N; ++e) {
      if (lines[e].size != &size) continue;
      if (touched) lines[e].turn(i, frame.pitch, across);
      for (int r = 0; r <= T && touched; ++r)
        if (losses.taught(r, e)) losses.dots[losses.entry(r, e)] += size.dot(targets.vector_of(r), i, across);
      if (lines[e].vector < 0) continue;
      for (int r = 0; r <= T && touched; ++r)
        if (losses.gain(r, e) != 0) size.subtract(targets.vector_of(r), losses.gain(r, e), lines[e].vector, i);
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

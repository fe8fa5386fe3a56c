// The exit-loss matrix and its gradient on the CPU: phases 1 and 2. Compiled once for each instruction set, which
// SELFREG_ISA names; everything but the entry point is in an anonymous namespace, and no inline function of another
// header that a linker might share is used. Phase 0 (what the means divide by; count.h) comes before, phase 3 (the
// fixed-order sum over bands) after: launch.cpp.
//
// A block is a vector of columns, a few rows and all channels: a vector holds pixels, and no sum over channels crosses
// lanes. With up to eight rows its exponentials stay in the first-level cache; where launch.cpp has laid pixels in rows
// of one vector there are more, in the second. For each block:
//   phase 1  each teacher: exponentials and their sums; what makes them its target (targets.h)
//   phase 2  each exit: exponentials and their sums, its losses, its gradient (students.h, losses.h)
// Exits of the output's size are read, and their gradients written, a block at a time (full_size.h, read_write.h).
//
// For small exits most of that is done at their own resolution. Interpolation is linear, y_c(p) = sum_k a_kp y_kc over
// an exit's positions k, so that
//   sum_p w_p sum_c target_rc(p) y_c(p) = sum_kc y_kc Q_rkc          with Q_rkc = sum_p a_kp w_p target_rc(p)
//   gradient_kc                         = S_kc - sum_r gain_r Q_rkc  with S_kc = sum_p a_kp f_p exp(y_c(p))
// Q is the same for all exits of a size, and labels are one more teacher. At the output's resolution there remain an
// exit's exponentials, their sum, and S: no targets, no dot products, no gradient. When the blocks have passed a row of
// an exit, its Q and S give the rest of the losses, and the gradient.
// A part of Q or S is summed over a span's rows first, at the output's columns, for the exit's row above and the one
// below; this goes on with the next span, of which it is the row above. (A span is those rows of a block that lie
// between the same two rows of an exit.) A row that is complete is transposed, so that a vector holds channels, and
// summed over the columns between the same two (exit_sums.h).
//
// Positions are taken less their own maximum over channels, so that no y_kc is above 0, nor what is interpolated from
// them. Where maxima are of other channels, all exponentials of a pixel may be small; then, and where a number is not
// finite, a block is done with care: less its pixels' own maxima, and without pixels that do not count.
//
// Resized exits that are not small (launch.cpp says which) are interpolated into the block, and are from there on like
// those of the output's size; their gradients are summed as S is.
#include "cpu.h"

#include <stdlib.h>

#include "count.h"
#include "exits.h"
#include "losses.h"
#include "students.h"
#include "targets.h"

namespace {

template <class A>
class Worker {
  using V = typename VecOf<A>::V;

 public:
  Worker(const ExitLoss& launch, const Plan& plan)
      : L(launch),
        N(launch.N),
        T(launch.T),
        frame(launch, plan),
        exits(frame),
        targets(launch, frame),
        losses(launch, frame, targets),
        students(frame, exits, targets, losses) {
    Memory counted{nullptr, 0};
    lay_out(counted);
    memory = static_cast<char*>(aligned_alloc(64, counted.used));
    missing = memory ? 0 : counted.used;
    if (!memory) return;
    Memory taken{memory, 0};
    lay_out(taken);
    exits.begin_launch();
    targets.begin_launch();
    losses.begin_launch();
  }
  Worker(const Worker&) = delete;
  ~Worker() { free(memory); }

  int64_t missing;  // bytes that could not be had: then there is nothing to work with

  // Bands [begin, end) of all images; the sums of each go to partial[band].
  void run(int64_t begin, int64_t end, double* partial) {
    for (int64_t number = begin; number < end; ++number) run_band(number, partial + number * losses.entries);
    stream_fence();
  }

 private:
  const ExitLoss& L;
  const int N, T;
  char* memory;
  Frame<A> frame;
  Exits<A> exits;
  Targets<A> targets;
  Losses<A> losses;
  Students<A> students;

  void lay_out(Memory& m) {
    exits.lay_out(m);
    targets.lay_out(m);
    losses.lay_out(m);
    students.lay_out(m);
  }

  void run_band(int64_t number, double* partial) {
    const Plan& plan = frame.plan;
    frame.image = number / plan.bands, frame.band = number % plan.bands;
    frame.y0 = plan.begins[frame.band], frame.y1 = plan.begins[frame.band + 1];
    losses.begin_band();
    exits.begin_band();
    for (frame.top = frame.y0; frame.top < frame.y1; frame.top += frame.rows) {
      frame.rows = int(rows_of_tile(plan, frame.top, frame.y1));
      exits.begin_tile();
      for (int64_t b = 0; b < frame.blocks; ++b) run_block(b);
      exits.over_sizes([&](ExitSums<A>& size) {
        const int64_t until = rows_until(L, *size.resize, frame.top + frame.rows, frame.y1);
        for (; size.done < until; ++size.done) {
          if (size.done == size.opened && size.carries) size.add_carried();
          finish(size, size.done);
        }
      });
    }
    losses.end_band(partial);
  }

  void run_block(int64_t b) {
    targets.pixels.read(frame, b);
    targets.begin_block();
    for (int r = 0; r < T; ++r) teach(targets.teachers[r], L.teachers[r], b);
    for (int r = 0; r <= T; ++r) add_target(r, b);
    for (int r = T; r-- > 0;)  // while what they taught is in cache
      students.learn(L.teachers[r], b, targets.learns(r) ? Pass::losses : Pass::all);
    for (int e = 0; e < N; ++e)
      if (targets.teacher_number(e) < 0) students.learn(e, b, Pass::all);
    for (int r = 0; r < T; ++r)
      if (targets.learns(r)) students.learn(L.teachers[r], b, Pass::gradient);
  }

  void teach(Teacher<A>& t, int e, int64_t b) const {
    if (!exits.is_small(e)) exits.read(e, b, targets.pixels.counted(L), t.logits);
    if (targets.argmax) {
      targets.find_top(t);
    } else {
      switch (targets.power) {
        case 1: target<1>(t, e, b); break;
        case 2: target<2>(t, e, b); break;
        case 3: target<3>(t, e, b); break;
        case 4: target<4>(t, e, b); break;
        default: target<0>(t, e, b);
      }
    }
    targets.weigh(t);
  }
  template <int POWER>
  void target(Teacher<A>& t, int e, int64_t b) const {
    const Teaching<V, A, POWER> job{t.u, targets.tau};
    const A scale = 1 / targets.tau;
    if (exits.is_small(e)) {
      exits.exponentials.take(exits.lines[e], b, targets.pixels.counted(L), scale, job, t.Z, t.Q, t.less);
    } else {
      FullSize<A>(frame).template exponentials<0>(t.logits, scale, job, nullptr, t.Z, t.Q, nullptr, exits.ahead(e, b));
      for (int i = 0; i < frame.rows; ++i) t.less[i] = V{};
    }
  }
  // To Q, of all sizes of which small exits learn it.
  void add_target(int r, int64_t b) const {
    exits.over_sizes([&](ExitSums<A>& size) {
      bool needed = false;
      for (int e = 0; e < N; ++e) needed |= exits.is_small(e) && exits.lines[e].size == &size && losses.taught(r, e);
      if (!needed) return;
      targets.with_target(r, [&](auto target) { size.add(targets.vector_of(r), b, target, targets.weight(r)); });
    });
  }

  // What is left when the blocks have passed row i of the exits of a size.
  void finish(ExitSums<A>& size, int64_t i) const {
    const bool touched = i < size.opened && i >= size.resize->rows.low[frame.y0];
    for (int e = 0; e < N; ++e) {
      const ExitLines<A>& lines = exits.lines[e];
      if (lines.size != &size) continue;
      const bool sums = touched && exits.is_small(e);
      if (sums) lines.turn(i, frame.pitch, exits.across);
      for (int r = 0; r <= T && sums; ++r)
        if (losses.taught(r, e)) losses.dots[losses.entry(r, e)] += size.dot(targets.vector_of(r), i, exits.across);
      if (lines.vector < 0) continue;
      for (int r = 0; r <= T && sums; ++r)
        if (losses.gain(r, e) != 0) size.subtract(targets.vector_of(r), losses.gain(r, e), lines.vector, i);
      const A* const row = touched ? size.row(lines.vector, i) : nullptr;
      write_gradient(L, frame.plan, e, frame.image, frame.band, i, row, frame.pitch);
    }
  }
};

// ---- entry points ----------------------------------------------------------------------------------------------

template <class A>
int64_t run_bands(const ExitLoss& L, const Plan& plan, int64_t begin, int64_t end, double* partial) {
  Worker<A> worker(L, plan);
  if (!worker.missing) worker.run(begin, end, partial);
  return worker.missing;
}

int64_t run_any(const ExitLoss& L, const Plan& plan, int64_t begin, int64_t end, double* partial) {
  return L.dtype == DType::float64 ? run_bands<double>(L, plan, begin, end, partial)
                                   : run_bands<float>(L, plan, begin, end, partial);
}

PixelCounts count_any(const ExitLoss& L, int64_t begin, int64_t end) {
  return L.dtype == DType::float64 ? count<double>(L, begin, end) : count<float>(L, begin, end);
}

void join_any(const ExitLoss& L, const Plan& plan, int e, int64_t begin, int64_t end) {
  for (int64_t border = begin; border < end; ++border) {
    const int64_t image = border / (plan.bands - 1), below = border % (plan.bands - 1) + 1;
    L.dtype == DType::float64 ? join_rows<double>(L, plan, e, image, below)
                              : join_rows<float>(L, plan, e, image, below);
  }
}

}  // namespace

#define SELFREG_TEXT(a) #a
#define SELFREG_STRING(a) SELFREG_TEXT(a)

namespace selfreg {

const CpuKernels& SELFREG_NAME(cpu_kernels_, SELFREG_ISA)() {
  static constexpr CpuKernels kernels{SELFREG_STRING(SELFREG_ISA), kVecBytes, count_any, run_any, join_any};
  return kernels;
}

}  // namespace selfreg

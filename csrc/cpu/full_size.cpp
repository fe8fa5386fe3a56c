// The exit-loss matrix on the CPU, but for what small_exits.cpp does: exits of the output's size, and what is rare.
// Compiled once for each instruction set, which SELFREG_ISA names; everything but the entry point is in an anonymous
// namespace, and no inline function of another header that a linker might share is used.
//
// Per tile of pixels, with all channels:
//   phase 1  each teacher: read, maximum, exponentials (targets.h)
//   phase 2  each exit: read and maximum, if not a teacher; exponentials with the sums of all its losses (students.h,
//            losses.h); its gradient, a few rows at a time (gradients.h)
// Reading an exit of another size is interpolating it, writing its gradient is gathering that: resize.h.
// Phase 0 (what the means divide by; count.h) comes before, the fixed-order sum over tiles (phase 3) after: launch.cpp.
#include "cpu.h"

#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "count.h"
#include "gradients.h"
#include "losses.h"
#include "read_tile.h"
#include "students.h"
#include "targets.h"
#include "tile_weights.h"
#include "write_tile.h"

namespace {

template <class A>
class FullSize {
 public:
  FullSize(const ExitLoss& launch, const Plan& plan)
      : w(launch, plan),
        weights(w),
        reader(w),
        writer(w),
        targets(w, reader),
        students(w, reader),
        losses(w),
        gradients(w, writer) {
    Memory counted{nullptr, 0};
    w.lay_out(counted);
    memory = static_cast<char*>(aligned_alloc(64, counted.used));
    missing = memory ? 0 : counted.used;
    if (!memory) return;
    Memory taken{memory, 0};
    w.lay_out(taken);
    w.over_resizers([&](Resizer<A>& resizer) { resizer.begin_launch(); });
    weights.begin_launch();
    writer.begin_launch();
  }
  FullSize(const FullSize&) = delete;
  ~FullSize() { free(memory); }

  int64_t missing;  // bytes that could not be had: then there is nothing to work with

  // Bands [first, end) of tiles, numbered over all images; the sums of each tile go to partial[tile].
  void run(int64_t first, int64_t end, double* partial) {
    for (int64_t band = first; band < end; ++band) {
      w.more = band + 1 < end;
      run(band, partial);
    }
  }

 private:
  TileWork<A> w;
  TileWeights<A> weights;
  TileReader<A> reader;
  TileWriter<A> writer;
  Targets<A> targets;
  Students<A> students;
  Losses<A> losses;
  Gradients<A> gradients;
  char* memory;

  void run(int64_t band, double* partial) {
    const int64_t image = band / w.plan.bands, number = band % w.plan.bands;
    const int64_t* const begins = w.plan.begins;
    const int64_t y0 = begins ? begins[number] : number, y1 = begins ? begins[number + 1] : y0 + 1;
    w.over_resizers([&](Resizer<A>& resizer) { resizer.begin_band(image, number); });
    partial += band * w.plan.tiles_down * w.plan.tiles_across * (w.T + 1) * w.N;
    for (int64_t y = y0; y < y1; y += w.plan.tile_rows) {
      const int64_t rows = y1 - y < w.plan.tile_rows ? y1 - y : w.plan.tile_rows;
      for (int64_t x = 0; x < w.plan.width; x += w.plan.tile_columns, partial += w.entry(w.T + 1, 0)) {
        const int64_t left = w.plan.width - x, columns = left < w.plan.tile_columns ? left : w.plan.tile_columns;
        run({image, y, x, rows, columns}, partial);
      }
      w.over_resizers([&](Resizer<A>& resizer) { resizer.end_tiles_across(y + rows); });
    }
  }

  void run(const Tile& tile, double* partial) {
    w.place(tile);
    w.over_resizers([&](Resizer<A>& resizer) { resizer.begin_tile(tile); });
    weights.read();
    reader.begin_tile();
    for (int r = 0; r < w.T; ++r) targets.teach(r);
    for (int e = 0; e < w.N; ++e) student(e, partial, !(w.teacher_learns && w.taught_row(e) >= 0));
    if (w.teacher_learns)  // their gradient also needs what all their students said
      for (int r = 0; r < w.T; ++r)
        if (w.L.grads[w.L.teachers[r]].data) student(w.L.teachers[r], nullptr, true);
    stream_fence();
  }

  void student(int e, double* partial, bool with_gradient) {
    const int self = w.taught_row(e);
    const bool wanted = w.gradient && w.L.grads[e].data;
    bool soft = false;
    for (int r = 0; r < w.T; ++r) soft |= w.teachers[r].on = r != self;
    const bool learning_teacher = w.teacher_learns && self >= 0 && wanted && !partial;
    const bool one = w.L.labels || (soft && !w.soft_two) || (learning_teacher && !w.soft_two), two = soft && w.soft_two;
    if (!one && !two && !learning_teacher) {
      if (partial) losses.write_zeros(e, partial);
      if (wanted && with_gradient) gradients.write_zeros(e);
      return;
    }
    if (self >= 0) {
      w.logits = w.teachers[self].logits;
      w.peak = w.teachers[self].max;
    } else {
      w.logits = reader.read_with_max(e, w.z, w.max);
      w.peak = w.max;
    }
    students.pick();
    losses.read_gradient(e);
    reader.expect(partial ? w.next_student(e + 1) : w.N);
    students.clear_sums();
    const bool say = w.teacher_learns && partial;
    const int power = self >= 0 && w.L.target == Target::raw ? small_integer(w.tau) : 0;
    if (one && two) {
      students.template exponentials<true, true>(say);
    } else if (two) {
      students.template exponentials<false, true>(say);
    } else {
      switch (power) {
        case 1: students.template exponentials<true, false, 1>(say, self); break;
        case 2: students.template exponentials<true, false, 2>(say, self); break;
        case 3: students.template exponentials<true, false, 3>(say, self); break;
        case 4: students.template exponentials<true, false, 4>(say, self); break;
        default: students.template exponentials<true, false>(say);
      }
    }
    reader.remember();
    if (say) students.add_log_normalizers();
    if (partial) losses.write(e, partial);
    if (!wanted || !with_gradient) return;
    if (learning_teacher) targets.add_up_said(w.teachers[self]);
    if (one && two) {
      gradients.template write<true, true>(e, soft, learning_teacher ? &w.teachers[self] : nullptr);
    } else if (two) {
      gradients.template write<false, true>(e, soft, learning_teacher ? &w.teachers[self] : nullptr);
    } else {
      gradients.template write<true, false>(e, soft, learning_teacher ? &w.teachers[self] : nullptr);
    }
  }
};

// ---- entry points ----------------------------------------------------------------------------------------------

template <class A>
int64_t run_tiles(const ExitLoss& L, const Plan& plan, int64_t begin, int64_t end, double* partial) {
  FullSize<A> worker(L, plan);
  if (!worker.missing) worker.run(begin, end, partial);
  return worker.missing;
}

PixelCounts count_any(const ExitLoss& L, int64_t begin, int64_t end) {
  return L.dtype == DType::float64 ? count<double>(L, begin, end) : count<float>(L, begin, end);
}

int64_t run_any(const ExitLoss& L, const Plan& plan, int64_t begin, int64_t end, double* partial) {
  return L.dtype == DType::float64 ? run_tiles<double>(L, plan, begin, end, partial)
                                   : run_tiles<float>(L, plan, begin, end, partial);
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
  static constexpr CpuKernels kernels{SELFREG_STRING(SELFREG_ISA), count_any, run_any,
                                      SELFREG_NAME(run_small_exits_, SELFREG_ISA), join_any};
  return kernels;
}

}  // namespace selfreg

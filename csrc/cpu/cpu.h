// The CPU backend's inner interface: launch.cpp plans and splits the work; exit_loss.cpp, compiled once for each
// instruction set, does it.
#pragma once

#include <cstdint>

#include "../exit_loss.h"

// Into every caller: a copy for one instruction set must not serve another's.
#define SELFREG_CPU_INLINE inline __attribute__((always_inline))
// NAME_avx2 and the like.
#define SELFREG_PASTE(a, b) a##b
#define SELFREG_NAME(a, b) SELFREG_PASTE(a, b)

namespace selfreg {

// One dimension of an exit that is resized, as ../axis.h has it: output position o lies between low[o] and low[o] + 1,
// the latter of weight weight[o] (0 where there is none).
struct AxisTable {
  int64_t size;          // of the exit
  const int32_t* low;    // [of the output]
  const double* weight;  // [of the output]
  SELFREG_CPU_INLINE int64_t high(int64_t o) const { return low[o] + 1 < size ? low[o] + 1 : low[o]; }
};

// How an exit of another size than the output's is resized, and where its gradient is gathered.
struct Resize {
  bool needed;
  bool small;  // see exit_loss.cpp: sums at its own resolution will do
  AxisTable rows, columns;
  int64_t held_rows;    // the most rows of the exit that a tile lies on
  int64_t upper_rows;   // the most of them that are the row above one of the output's
  int64_t shared_rows;  // the most that the bands at a border share, at most two
  void* shared;         // [B, bands - 1, shared_rows, shared_sides, C, w] of A
};

// What the band below adds to a row that it shares has a place of its own; what the band above adds, only where the
// gradient itself would round it.
static SELFREG_CPU_INLINE int64_t shared_sides(const ExitLoss& launch) {
  return launch.dtype == DType::float32 || launch.dtype == DType::float64 ? 1 : 2;
}

// How a launch is cut, whatever the number of threads, so that results are the same bit for bit. A band of rows is one
// thread's work, in tiles of a few rows from top to bottom: so the gradient of a resized exit is complete, row by row.
// Where none is resized and pixels lie one after the other, rows are not those of the output: launch.cpp lays its
// pixels, or those of all images, in rows of one vector.
struct Plan {
  int64_t pixels, image_pixels;   // in all; of an image, of which the last row may have fewer than the others
  int64_t images, height, width;  // of what is cut
  int64_t bands;                  // of an image
  const int64_t* begins;          // [bands + 1] where they begin
  int64_t tile_rows;              // at most; kMostRows at most
  const AxisTable* finest;        // rows of a resized exit that has the most; null where there is none
  bool stream;                    // write gradients past the caches
  double norm[2];                 // of label losses, of soft losses: 1 / divisor of the mean, 0 where nothing counts
  const Resize* resizes;          // [N]
};

// Rows of the tile that begins at `top`, in a band that ends before `end`. It ends with a span of the finest exits
// (rows between the same two of theirs) if one ends within it: then fewer tiles have two.
static SELFREG_CPU_INLINE int64_t rows_of_tile(const Plan& plan, int64_t top, int64_t end) {
  const int64_t left = end - top, most = left < plan.tile_rows ? left : plan.tile_rows;
  if (!plan.finest) return most;
  const int32_t* const low = plan.finest->low;
  int64_t rows = most;
  while (rows > 1 && rows < left && low[top + rows] == low[top + rows - 1]) --rows;
  return rows > 1 ? rows : most;
}

constexpr int kMostRows = 32;  // of any tile

struct CpuKernels {
  const char* isa;
  int vector_bytes;
  // Phase 0 over pixels [begin, end).
  PixelCounts (*count)(const ExitLoss&, int64_t begin, int64_t end);
  // Phases 1 and 2 over bands [begin, end) of all images; each band's sums go to partial[band][T + 1][N]. Returns how
  // many bytes of scratch could not be had, for it may throw nothing: 0, or nothing is done.
  int64_t (*run)(const ExitLoss&, const Plan&, int64_t begin, int64_t end, double* partial);
  // Adds up the rows of exit e's gradient that bands share, at borders [begin, end) of all images.
  void (*join)(const ExitLoss&, const Plan&, int e, int64_t begin, int64_t end);
};

// The power of exp(y / tau) that exp(y) is, where it is small; else 0.
SELFREG_CPU_INLINE int small_integer(double tau) {
  return tau == 1 ? 1 : tau == 2 ? 2 : tau == 3 ? 3 : tau == 4 ? 4 : 0;
}

const CpuKernels& cpu_kernels_baseline();
const CpuKernels& cpu_kernels_avx2();
const CpuKernels& cpu_kernels_avx512();

}  // namespace selfreg

// The CPU backend's inner interface: launch.cpp plans and splits the work; small_exits.cpp or, where that does not have
// what is asked for, full_size.cpp does it, both compiled once for each instruction set.
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
  AxisTable rows, columns;
  // Of a tile's columns, one after the other: where low[x] is among the exit's columns that the tile needs.
  const int32_t* place;  // [W]
  const int32_t* taken;  // [segments, 2 tile_columns]: those columns, ascending
  const int32_t* count;  // [segments]: how many
  int64_t most_columns;  // the most of them
  int64_t held_rows;     // the most rows of the exit that a row of tiles lies on
  int64_t upper_rows;    // the most of them that are the row above one of the output's
  int64_t shared_rows;   // the most that the bands at a border share, at most two
  void* shared;          // [B, bands - 1, shared_rows, shared_sides, C, w] of A
};

// What the band below adds to a row that it shares has a place of its own; what the band above adds, only where the
// gradient itself would round it.
static SELFREG_CPU_INLINE int64_t shared_sides(const ExitLoss& launch) {
  return launch.dtype == DType::float32 || launch.dtype == DType::float64 ? 1 : 2;
}

// A rectangle of pixels of an image.
struct Tile {
  int64_t image, y, x, rows, columns;
};

// How a launch is cut, whatever the number of threads, so that results are the same bit for bit. Tiles are numbered
// image by image, band by band (of rows), from top to bottom and from left to right. A band is one thread's work: the
// gradient of a resized exit is complete, row by row, as its tiles go down. Without resized exits, the pixels of all
// images are laid in rows as wide as a tile, and each is a band.
struct Plan {
  int64_t pixels;
  int64_t images, height, width;                   // of what is cut
  int64_t tile_rows, tile_columns;                 // at most
  int64_t bands, tiles_down, tiles_across, tiles;  // bands of an image, tiles of a band, tiles in all
  const int64_t* begins;                           // [bands + 1] where bands of an image begin; null: at each tile
  int64_t block_rows;                              // of small_exits.cpp; 0: full_size.cpp does it
  const AxisTable* finest;                         // rows of those of small_exits.cpp that have the most
  bool stream;                                     // write gradients past the caches
  double norm[2];         // of label losses, of soft losses: 1 / divisor of the mean, 0 where nothing counts
  const Resize* resizes;  // [N], or null: no exit is resized
};

// Rows of the tile of small_exits.cpp that begins at `top`, in a band that ends before `end`. It ends with a span of
// the finest exits (rows between the same two of theirs) if one ends within it: then fewer tiles have two.
static SELFREG_CPU_INLINE int64_t rows_of_tile(const Plan& plan, int64_t top, int64_t end) {
  const int32_t* const low = plan.finest->low;
  const int64_t left = end - top, most = left < plan.block_rows ? left : plan.block_rows;
  int64_t rows = most;
  while (rows > 1 && rows < left && low[top + rows] == low[top + rows - 1]) --rows;
  return rows > 1 ? rows : most;
}

struct CpuKernels {
  const char* isa;
  // Phase 0 over pixels [begin, end).
  PixelCounts (*count)(const ExitLoss&, int64_t begin, int64_t end);
  // These two may throw nothing. They return how many bytes of scratch could not be had: 0, or nothing is done.
  // Phases 1 and 2 over bands [begin, end) of all images; each tile's sums go to partial[tile][T + 1][N].
  int64_t (*run)(const ExitLoss&, const Plan&, int64_t begin, int64_t end, double* partial);
  int64_t (*run_small_exits)(const ExitLoss&, const Plan&, int64_t begin, int64_t end, double* partial);
  // Adds up the rows of exit e's gradient that bands share, at borders [begin, end) of all images.
  void (*join)(const ExitLoss&, const Plan&, int e, int64_t begin, int64_t end);
};

// The power of exp(y / tau) that exp(y) is, where it is small; else 0.
SELFREG_CPU_INLINE int small_integer(double tau) {
  return tau == 1 ? 1 : tau == 2 ? 2 : tau == 3 ? 3 : tau == 4 ? 4 : 0;
}

#define SELFREG_RUN(isa) \
  int64_t SELFREG_NAME(run_small_exits_, isa)(const ExitLoss&, const Plan&, int64_t, int64_t, double*)
SELFREG_RUN(baseline);
SELFREG_RUN(avx2);
SELFREG_RUN(avx512);
#undef SELFREG_RUN

const CpuKernels& cpu_kernels_baseline();
const CpuKernels& cpu_kernels_avx2();
const CpuKernels& cpu_kernels_avx512();

}  // namespace selfreg

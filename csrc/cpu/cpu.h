// The CPU backend's inner interface: cpu_launch.cpp plans and splits the work, cpu/exit_loss.cpp, compiled once for
// each instruction set, does it.
#pragma once

#include <cstdint>

#include "../exit_loss.h"

namespace selfreg {

// How a launch is cut: tiles of `tile_pixels` consecutive pixels of B x H x W, whatever the number of threads, so that
// results are the same bit for bit.
struct Plan {
  int64_t pixels, tile_pixels, tiles;
  bool stream;     // write gradients past the caches
  double norm[2];  // of label losses, of soft losses: 1 / divisor of the mean, 0 where nothing counts
};

struct CpuKernels {
  const char* isa;
  // Phase 0 over pixels [begin, end).
  PixelCounts (*count)(const ExitLoss&, int64_t begin, int64_t end);
  // Phases 1 and 2 over tiles [begin, end); each tile's sums go to partial[tile][T + 1][N].
  void (*run)(const ExitLoss&, const Plan&, int64_t begin, int64_t end, double* partial);
};

const CpuKernels& cpu_kernels_baseline();
const CpuKernels& cpu_kernels_avx2();
const CpuKernels& cpu_kernels_avx512();

}  // namespace selfreg

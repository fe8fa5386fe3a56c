// The CPU backend's launch: phase 0 over the labels, tiles to threads, phase 3 in a fixed order. No torch type in here
// but parallel_for.
#include "cpu_launch.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/cpu.h"

namespace selfreg {
namespace {

// Pixels a tile: its rows (one exit's, and each teacher's logits and targets) should stay in a core's L2 cache.
int64_t tile_pixels(const ExitLoss& launch, int64_t pixels) {
  const int64_t number = launch.dtype == DType::float64 ? 8 : 4;
  const int64_t rows =
      launch.C * (1 + launch.T * (launch.detach_teacher ? 2 : 3) + (launch.target == Target::renormalized ? 1 : 0));
  const int64_t budget = 512 * 1024 / (rows * number);
  // At least 16 tiles, to share; at least a few vectors a row.
  return std::clamp<int64_t>(std::min(budget, pixels / 16) / 64 * 64, 64, 1024);
}

// The best instruction set of this CPU, or a lesser one that SELFREG_FAST_ISA names.
const CpuKernels& choose_kernels() {
  const char* const names[] = {"baseline", "avx2", "avx512"};
  int best = 0;
#ifdef SELFREG_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c"))
    best = 1;
  if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
  if (const char* wanted = std::getenv("SELFREG_FAST_ISA")) {
    const auto* found = std::find_if(names, names + 3, [&](const char* name) { return !std::strcmp(name, wanted); });
    if (found == names + 3)
      throw std::invalid_argument(std::string("SELFREG_FAST_ISA: expected baseline, avx2 or avx512, got ") + wanted);
    best = std::min(best, int(found - names));
  }
#ifdef SELFREG_X86_ISAS
  if (best == 2) return cpu_kernels_avx512();
  if (best == 1) return cpu_kernels_avx2();
#endif
  return cpu_kernels_baseline();
}

const CpuKernels& kernels() {
  static const CpuKernels& chosen = choose_kernels();
  return chosen;
}

// Phase 0, in chunks of a fixed size that are added in order.
PixelCounts count_pixels(const ExitLoss& launch, int64_t pixels) {
  if (!launch.labels && !launch.pixel_weight) return {0, double(pixels), -1};
  constexpr int64_t kChunk = 1 << 16;
  const int64_t chunks = (pixels + kChunk - 1) / kChunk;
  std::vector<PixelCounts> parts(chunks);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[i] = kernels().count(launch, i * kChunk, std::min(pixels, (i + 1) * kChunk));
  });
  PixelCounts all{0, 0, -1};
  for (const PixelCounts& part : parts) {
    all.label += part.label;
    all.soft += part.soft;
    if (all.bad_label < 0) all.bad_label = part.bad_label;
  }
  return all;
}

template <class A>
void write_sums(const ExitLoss& launch, const Plan& plan, const std::vector<double>& partial) {
  const int64_t entries = int64_t(launch.T + 1) * launch.N;
  for (int64_t entry = 0; entry < entries; ++entry) {
    double sum = 0;
    for (int64_t tile = 0; tile < plan.tiles; ++tile) sum += partial[tile * entries + entry];
    static_cast<A*>(launch.losses)[entry] = A(sum * plan.norm[entry < launch.N ? 0 : 1]);
  }
}

template <class A>
void write_total(const ExitLoss& launch) {
  double total = 0;
  for (int64_t entry = 0; launch.total_weights && entry < int64_t(launch.T + 1) * launch.N; ++entry)
    if (launch.total_weights[entry] != 0)
      total += launch.total_weights[entry] * double(static_cast<const A*>(launch.losses)[entry]);
  *static_cast<A*>(launch.total) = A(total);
}

}  // namespace

const char* cpu_isa() { return kernels().isa; }

void cpu_launch(const ExitLoss& launch) {
  kernels();  // chosen out here: an exception inside parallel_for would lose its message
  Plan plan;
  plan.pixels = launch.B * launch.H * launch.W;
  const PixelCounts counts = count_pixels(launch, plan.pixels);
  if (counts.bad_label >= 0)
    throw std::invalid_argument("labels: neither a class nor ignored at flat index " +
                                std::to_string(counts.bad_label));
  const bool mean = launch.reduction == Reduction::mean;
  auto norm = [&](double divisor) { return !mean ? 1.0 : divisor == 0 ? 0.0 : 1.0 / divisor; };
  plan.norm[0] = norm(counts.label);
  plan.norm[1] = norm(counts.soft);
  plan.tile_pixels = tile_pixels(launch, plan.pixels);
  plan.tiles = (plan.pixels + plan.tile_pixels - 1) / plan.tile_pixels;
  int64_t wanted = 0;
  for (int e = 0; e < launch.N; ++e) wanted += launch.grads[e].data != nullptr;
  plan.stream = wanted * plan.pixels * launch.C >= (int64_t(4) << 20);

  std::vector<double> partial(plan.tiles * (launch.T + 1) * launch.N);
  const int64_t grain = std::max<int64_t>(1, 32768 / (plan.tile_pixels * launch.C * launch.N));
  torch::stable::parallel_for(0, plan.tiles, grain, [&](int64_t begin, int64_t end) {
    kernels().run(launch, plan, begin, end, partial.data());
  });

  const bool is_double = launch.dtype == DType::float64;
  if (launch.reduction != Reduction::none)
    is_double ? write_sums<double>(launch, plan, partial) : write_sums<float>(launch, plan, partial);
  is_double ? write_total<double>(launch) : write_total<float>(launch);
}

}  // namespace selfreg

// The CPU backend's launch: phase 0 over the labels, bands of tiles to threads, phase 3 in a fixed order. No torch type
// in here but parallel_for.
#include "launch.h"

#ifdef SELFREG_X86_ISAS
#include <cpuid.h>
#endif
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "../axis.h"
#include "cpu.h"

namespace selfreg {
namespace {

// Pixels a tile: its rows (one exit's, and each teacher's logits and targets) should stay in a core's L2 cache.
int64_t tile_pixels(const ExitLoss& launch, int64_t pixels) {
  const int64_t number = launch.dtype == DType::float64 ? 8 : 4;
  const int64_t rows =
      launch.C * (1 + launch.T * (launch.detach_teacher ? 2 : 3) + (launch.target == Target::renormalized ? 1 : 0));
  const int64_t budget = int64_t(512) * 1024 / (rows * number);
  // At least 16 tiles, to share; at least a few vectors a row.
  return std::clamp<int64_t>(std::min(budget, pixels / 16) / 64 * 64, 64, 1024);
}

#ifdef SELFREG_X86_ISAS
// By cpuid: GCC 10 and Clang 16 do not know the name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The best instruction set of this CPU, or a lesser one that SELFREG_FAST_ISA names.
const CpuKernels& choose_kernels() {
  const char* const names[] = {"baseline", "avx2", "avx512"};
  int best = 0;
#ifdef SELFREG_X86_ISAS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") && has_f16c())
    best = 1;
  if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    best = 2;
#endif
  const char* const wanted = std::getenv("SELFREG_FAST_ISA");
  if (wanted && *wanted) {
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

// f(begin, end) of parts of [0, count), of which each returns how many bytes of scratch it could not have. An exception
// in there would lose its message.
template <class F>
void share_out(int64_t count, int64_t grain, F f) {
  std::atomic<int64_t> missing{0};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    if (const int64_t bytes = f(begin, end)) missing = bytes;
  });
  if (missing)
    throw std::runtime_error("selfreg_fast: out of memory: a thread could not have " + std::to_string(missing) +
                             " bytes of scratch");
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

// ---- resized exits -------------------------------------------------------------------------------------------------

struct AxisMemory {
  std::vector<int32_t> low;
  std::vector<double> weight;
  AxisMemory(int64_t from, int64_t to, bool align_corners) : low(to), weight(to) {
    const Axis axis{from, to, align_corners};
    for (int64_t o = 0; o < to; ++o) {
      low[o] = int32_t(axis.low(o));
      weight[o] = axis.weight<double>(o, low[o]);
      if (weight[o] == 1) ++low[o], weight[o] = 0;  // the other one has no part, be it NaN
    }
  }
  AxisTable table(int64_t size) const { return {size, low.data(), weight.data()}; }
};

constexpr int64_t kMostLanes = 16;  // kernels read `place` a vector at a time

// The memory behind a Resize.
struct ResizeMemory {
  AxisMemory rows, columns;
  std::vector<int32_t> place, taken, count;
  std::vector<double> shared;  // whatever A is: room for as many of it

  ResizeMemory(const ExitLoss& launch, const View& exit, Resize& to)
      : rows(exit.H, launch.H, launch.align_corners), columns(exit.W, launch.W, launch.align_corners) {
    to.needed = true;
    to.rows = rows.table(exit.H), to.columns = columns.table(exit.W);
  }
  // What depends on how the launch is cut.
  void plan_bands(const ExitLoss& launch, const Plan& plan, bool gradient, Resize& to) {
    for (int64_t band = 0; band < plan.bands; ++band) {
      const int64_t begin = plan.begins[band], end = plan.begins[band + 1];
      for (int64_t y = begin, rows; y < end; y += rows) {
        rows = plan.block_rows ? rows_of_tile(plan, y, end) : std::min(plan.tile_rows, end - y);
        to.held_rows = std::max(to.held_rows, to.rows.high(y + rows - 1) - to.rows.low[y] + 1);
        to.upper_rows = std::max<int64_t>(to.upper_rows, to.rows.low[y + rows - 1] - to.rows.low[y] + 1);
      }
      if (band > 0) to.shared_rows = std::max(to.shared_rows, to.rows.high(begin - 1) - to.rows.low[begin] + 1);
    }
    if (!plan.block_rows) list_columns(launch, plan, to);
    if (!gradient) return;
    const int64_t rows = launch.B * (plan.bands - 1) * to.shared_rows * shared_sides(launch);
    const int64_t numbers = rows * launch.C * to.columns.size;
    shared.resize(launch.dtype == DType::float64 ? numbers : (numbers + 1) / 2);
    to.shared = shared.data();
  }

 private:
  void list_columns(const ExitLoss& launch, const Plan& plan, Resize& to) {
    place.resize(launch.W + kMostLanes);
    taken.resize(plan.tiles_across * plan.tile_columns * 2);
    count.resize(plan.tiles_across);
    to.place = place.data(), to.taken = taken.data(), to.count = count.data();
    for (int64_t segment = 0; segment < plan.tiles_across; ++segment) {
      int32_t* const first = taken.data() + segment * plan.tile_columns * 2;
      int32_t* last = first;
      const int64_t x0 = segment * plan.tile_columns, x1 = std::min(x0 + plan.tile_columns, launch.W);
      for (int64_t x = x0; x < x1; ++x) {
        for (int32_t column = columns.low[x]; column <= to.columns.high(x); ++column)
          if (last == first || last[-1] < column) *last++ = column;
        place[x] = int32_t(std::lower_bound(first, last, columns.low[x]) - first);
      }
      count[segment] = int32_t(last - first);
      to.most_columns = std::max<int64_t>(to.most_columns, count[segment]);
    }
  }
};

bool is_resized(const ExitLoss& launch, const View& exit) { return exit.H != launch.H || exit.W != launch.W; }

// ---- plan ----------------------------------------------------------------------------------------------------------

// Whether small_exits.cpp will do: for smaller exits, with others of the output's size among them. It keeps nothing of
// the former at the output's resolution, and so has no maps of losses, no argmax and nothing for teachers that learn;
// of larger exits its sums would be no smaller, and where a position has more pixels, they would lose digits.
bool are_small(const ExitLoss& launch) {
  const bool learns = !launch.detach_teacher && (launch.grad_losses || launch.weights) && launch.T;
  // Of one class, gradients are to be exactly 0, not a small difference.
  if (launch.reduction == Reduction::none || launch.target == Target::argmax || learns || launch.C == 1) return false;
  return std::all_of(launch.exits, launch.exits + launch.N, [&](const View& v) {
    const int64_t pixels = launch.H * launch.W / std::max<int64_t>(1, v.H * v.W);
    return v.H <= launch.H && v.W <= launch.W && pixels <= 1 << 14;
  });
}

// Where bands of about `rows` output rows begin: with a span of the finest exits', if those are not longer, so that
// none is cut in two and bands share one of its rows, not two.
std::vector<int64_t> begins_at_spans(const ExitLoss& launch, const AxisTable& finest, int64_t rows) {
  const bool anywhere = finest.size * rows < launch.H;
  std::vector<int64_t> begins{0};
  for (int64_t y = 1; y < launch.H; ++y)
    if (y / rows > begins.back() / rows && (anywhere || finest.low[y] != finest.low[y - 1])) begins.push_back(y);
  begins.push_back(launch.H);
  return begins;
}

// Returns where bands begin.
std::vector<int64_t> cut(const ExitLoss& launch, Plan& plan) {
  int64_t most = tile_pixels(launch, plan.pixels);
  if (!plan.resizes) {
    plan.images = plan.tiles_down = plan.tiles_across = plan.tile_rows = 1;
    plan.tile_columns = plan.width = most;
    plan.tiles = plan.bands = plan.height = (plan.pixels + most - 1) / most;
    return {};
  }
  // Tiles of several rows: an exit's row is shared by those that it is interpolated to, and so is the work of gathering
  // the gradient. At least 16 bands, to share out.
  constexpr int64_t kColumns = 128, kPixels = 512, kBands = 16;
  most = std::min(most, kPixels);
  auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  plan.images = launch.B, plan.height = launch.H, plan.width = launch.W;
  if (are_small(launch)) {  // bands are not cut further
    plan.block_rows = launch.C <= 64 ? 8 : 4;
    plan.tile_columns = plan.width, plan.tiles_across = plan.tiles_down = 1;
    plan.tile_rows = parts(plan.height, std::min(plan.height, parts(kBands, plan.images)));
    const auto less = [](const Resize& a, const Resize& b) { return a.rows.size < b.rows.size; };
    plan.finest = &std::max_element(plan.resizes, plan.resizes + launch.N, less)->rows;
    std::vector<int64_t> begins = begins_at_spans(launch, *plan.finest, plan.tile_rows);
    plan.bands = int64_t(begins.size()) - 1;
    plan.tiles = plan.images * plan.bands;
    return begins;
  }
  plan.tile_columns = parts(plan.width, parts(plan.width, std::min(kColumns, most)));
  plan.tiles_across = parts(plan.width, plan.tile_columns);
  plan.tile_rows = std::clamp<int64_t>(most / plan.tile_columns, 1, plan.height);
  const int64_t rows_of_tiles = parts(plan.height, plan.tile_rows);
  plan.tiles_down = parts(rows_of_tiles, std::min(rows_of_tiles, parts(kBands, plan.images)));
  plan.bands = parts(rows_of_tiles, plan.tiles_down);
  plan.tiles = plan.images * plan.bands * plan.tiles_down * plan.tiles_across;
  std::vector<int64_t> begins;
  for (int64_t band = 0; band <= plan.bands; ++band)
    begins.push_back(std::min(band * plan.tiles_down * plan.tile_rows, plan.height));
  return begins;
}

// ---- phase 3 -------------------------------------------------------------------------------------------------------

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
  Plan plan{};
  plan.pixels = launch.B * launch.H * launch.W;
  const PixelCounts counts = count_pixels(launch, plan.pixels);
  if (counts.bad_label >= 0)
    throw std::invalid_argument("labels: neither a class nor ignored at flat index " +
                                std::to_string(counts.bad_label));
  const bool mean = launch.reduction == Reduction::mean;
  auto norm = [&](double divisor) {  // of an infinite one NaN: as 0 it would leave out what made it so
    return !mean ? 1.0 : divisor == 0 ? 0.0 : std::isinf(divisor) ? std::nan("") : 1.0 / divisor;
  };
  plan.norm[0] = norm(counts.label);
  plan.norm[1] = norm(counts.soft);
  std::vector<Resize> resizes(launch.N);
  std::deque<ResizeMemory> memories;
  int64_t wanted = 0;
  for (int e = 0; plan.pixels > 0 && e < launch.N; ++e) {
    const bool resized = is_resized(launch, launch.exits[e]);
    if (resized) memories.emplace_back(launch, launch.exits[e], resizes[e]);
    wanted += launch.grads[e].data && !resized;
  }
  plan.resizes = memories.empty() ? nullptr : resizes.data();
  const std::vector<int64_t> begins = plan.pixels > 0 ? cut(launch, plan) : std::vector<int64_t>();
  plan.begins = begins.empty() ? nullptr : begins.data();
  auto memory = memories.begin();
  for (int e = 0; e < launch.N; ++e)
    if (resizes[e].needed) (memory++)->plan_bands(launch, plan, launch.grads[e].data, resizes[e]);
  plan.stream = wanted * plan.pixels * launch.C >= (int64_t(4) << 20);

  std::vector<double> partial(plan.tiles * (launch.T + 1) * launch.N);
  const int64_t tile = plan.tile_rows * plan.tile_columns * plan.tiles_down * plan.tiles_across;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, tile * launch.C * launch.N));
  share_out(plan.images * plan.bands, grain, [&](int64_t begin, int64_t end) {
    const auto run = plan.block_rows ? kernels().run_small_exits : kernels().run;
    return run(launch, plan, begin, end, partial.data());
  });
  for (int e = 0; e < launch.N; ++e) {
    if (!resizes[e].needed || !launch.grads[e].data) continue;
    torch::stable::parallel_for(0, launch.B * (plan.bands - 1), 4,
                                [&](int64_t begin, int64_t end) { kernels().join(launch, plan, e, begin, end); });
  }

  const bool is_double = launch.dtype == DType::float64;
  if (launch.reduction != Reduction::none)
    is_double ? write_sums<double>(launch, plan, partial) : write_sums<float>(launch, plan, partial);
  is_double ? write_total<double>(launch) : write_total<float>(launch);
}

}  // namespace selfreg

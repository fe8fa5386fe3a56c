// The CPU backend's launch: phase 0 over the labels, bands to threads, phase 3 in a fixed order. No torch type
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

// Whether sums at an exit's own resolution will do. They leave nothing of it at the output's, and so no maps of losses,
// no argmax and nothing for teachers that learn; of larger exits they would be no smaller, and where a position has
// more pixels, they would lose digits. Of one class, all should cancel, and does so better pixel by pixel.
bool is_small(const ExitLoss& launch, const View& exit) {
  const bool learns = !launch.detach_teacher && launch.T;  // be gradients wanted or not: with both, the same bits
  if (launch.reduction == Reduction::none || launch.target == Target::argmax || learns || launch.C == 1) return false;
  const int64_t pixels = launch.H * launch.W / std::max<int64_t>(1, exit.H * exit.W);
  return exit.H <= launch.H && exit.W <= launch.W && pixels <= 1 << 14;
}

// The memory behind a Resize.
struct ResizeMemory {
  AxisMemory rows, columns;
  std::vector<double> shared;  // whatever A is: room for as many of it

  ResizeMemory(const ExitLoss& launch, const View& exit, Resize& to)
      : rows(exit.H, launch.H, launch.align_corners), columns(exit.W, launch.W, launch.align_corners) {
    to.needed = true, to.small = is_small(launch, exit);
    to.rows = rows.table(exit.H), to.columns = columns.table(exit.W);
  }
  // What depends on how the launch is cut.
  void plan_bands(const ExitLoss& launch, const Plan& plan, bool gradient, Resize& to) {
    for (int64_t band = 0; band < plan.bands; ++band) {
      const int64_t begin = plan.begins[band], end = plan.begins[band + 1];
      for (int64_t y = begin, rows; y < end; y += rows) {
        rows = rows_of_tile(plan, y, end);
        to.held_rows = std::max(to.held_rows, to.rows.high(y + rows - 1) - to.rows.low[y] + 1);
        to.upper_rows = std::max<int64_t>(to.upper_rows, to.rows.low[y + rows - 1] - to.rows.low[y] + 1);
      }
      if (band > 0) to.shared_rows = std::max(to.shared_rows, to.rows.high(begin - 1) - to.rows.low[begin] + 1);
    }
    if (!gradient) return;
    const int64_t rows = launch.B * (plan.bands - 1) * to.shared_rows * shared_sides(launch);
    const int64_t numbers = rows * launch.C * to.columns.size;
    shared.resize(launch.dtype == DType::float64 ? numbers : (numbers + 1) / 2);
    to.shared = shared.data();
  }
};

// ---- plan ----------------------------------------------------------------------------------------------------------

// Pixels of a tensor of the output's size come in runs of `length` at a fixed `step`: the whole batch, an image, or a
// row.
struct Runs {
  int64_t length, step;
};

Runs runs_of(const View& v, const ExitLoss& launch) {
  Runs r{1, 1};
  const int64_t sizes[] = {launch.W, launch.H, launch.B}, strides[] = {v.stride_w, v.stride_h, v.stride_b};
  for (int d = 0; d < 3; ++d) {
    if (sizes[d] == 1) continue;
    if (r.length == 1) {
      r = {sizes[d], strides[d]};
    } else if (strides[d] == r.length * r.step) {
      r.length *= sizes[d];
    } else {
      break;
    }
  }
  return r;
}

// A launch as it is cut. Where all pixels of an image, or of the batch, are a run in every tensor, they are laid in
// rows of one vector, so that a block has as many as it can hold, side by side.
struct Cut {
  ExitLoss launch;
  std::vector<View> exits, grads;
  bool laid_in_rows = false;

  explicit Cut(const ExitLoss& given)
      : launch(given), exits(given.exits, given.exits + given.N), grads(given.grads, given.grads + given.N) {}
  Cut(const Cut&) = delete;

  void lay_in_rows(int64_t row) {
    const int64_t image = launch.H * launch.W, all = launch.B * image;
    int64_t shortest = all;
    auto over_views = [&](auto f) {
      for (View& v : exits) f(v);
      for (View& v : grads)
        if (v.data) f(v);
    };
    over_views([&](const View& v) { shortest = std::min(shortest, runs_of(v, launch).length); });
    // The gradient of an exit whose numbers share places, being expanded, has no place to share, and so its channels
    // between its images. Without it the launch is to be cut as with it, for the same bits.
    auto shares = [&](const View& v) { return runs_of(v, launch).step == 0 || (launch.C > 1 && v.stride_c == 0); };
    if (std::any_of(exits.begin(), exits.end(), shares)) shortest = std::min(shortest, image);
    if (shortest < image) return;
    const int64_t images = shortest == all ? 1 : launch.B, height = (all / images + row - 1) / row;
    over_views([&](View& v) {
      const int64_t step = runs_of(v, launch).step;
      v = {v.data, v.stride_b, v.stride_c, row * step, step, height, row};
    });
    launch.B = images, launch.H = height, launch.W = row;
    launch.exits = exits.data(), launch.grads = grads.data();
    laid_in_rows = true;
  }
};

// Where bands of about `rows` output rows begin: with a span of the finest exits', if those are not longer, so that
// none is cut in two and bands share one of its rows, not two.
std::vector<int64_t> begins_at_spans(const ExitLoss& launch, const AxisTable* finest, int64_t rows) {
  const bool anywhere = !finest || finest->size * rows < launch.H;
  std::vector<int64_t> begins{0};
  for (int64_t y = rows; y < launch.H; y = (y / rows + 1) * rows) {
    while (y < launch.H && !anywhere && finest->low[y] == finest->low[y - 1]) ++y;
    if (y < launch.H) begins.push_back(y);
  }
  begins.push_back(launch.H);
  return begins;
}

std::vector<int64_t> where_bands_begin(const Cut& cut, Plan& plan) {
  const ExitLoss& launch = cut.launch;
  const Resize* const end = plan.resizes + launch.N;
  plan.images = launch.B, plan.height = launch.H, plan.width = launch.W;
  plan.image_pixels = plan.pixels / plan.images;
  const auto* const most = std::max_element(plan.resizes, end, [](const Resize& a, const Resize& b) {
    return (a.needed ? a.rows.size : 0) < (b.needed ? b.rows.size : 0);
  });
  plan.finest = most->needed ? &most->rows : nullptr;
  // Rows of a larger exit are not shared by those of a tile, and those in between would have to be held.
  plan.tile_rows = plan.finest && plan.finest->size > plan.height ? 1 : launch.C <= 64 ? 8 : 4;
  // Longer pieces of each channel's plane are then worth more than a block in the first-level cache.
  if (cut.laid_in_rows) plan.tile_rows = std::min<int64_t>(kMostRows, 4 * plan.tile_rows);
  // At least so many bands, to share out, of at most so many rows: sums of more would lose digits.
  constexpr int64_t kBands = 16, kRows = 64;
  auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  int64_t rows = std::min(kRows, parts(plan.height, std::min(plan.height, parts(kBands, plan.images))));
  if (cut.laid_in_rows) rows = parts(std::min(4 * kRows, parts(plan.height, kBands)), plan.tile_rows) * plan.tile_rows;
  std::vector<int64_t> begins = begins_at_spans(launch, plan.finest, rows);
  plan.bands = int64_t(begins.size()) - 1;
  return begins;
}

// Phases 1 and 2: the sums of each band.
template <class A>
std::vector<double> run(const ExitLoss& launch, Plan& plan, std::deque<ResizeMemory>& memories,
                        std::vector<Resize>& resizes) {
  Cut cut(launch);
  if (memories.empty()) cut.lay_in_rows(kernels().vector_bytes / int64_t(sizeof(A)));
  const std::vector<int64_t> begins = where_bands_begin(cut, plan);
  plan.begins = begins.data();
  auto memory = memories.begin();
  for (int e = 0; e < launch.N; ++e)
    if (resizes[e].needed) (memory++)->plan_bands(launch, plan, launch.grads[e].data, resizes[e]);

  const int64_t bands = plan.images * plan.bands;
  std::vector<double> partial(bands * (launch.T + 1) * launch.N);
  const int64_t numbers = plan.pixels / bands * launch.C * launch.N;
  share_out(bands, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, numbers)),
            [&](int64_t begin, int64_t end) { return kernels().run(cut.launch, plan, begin, end, partial.data()); });
  for (int e = 0; e < launch.N; ++e) {
    if (!resizes[e].needed || !launch.grads[e].data) continue;
    torch::stable::parallel_for(0, launch.B * (plan.bands - 1), 4,
                                [&](int64_t begin, int64_t end) { kernels().join(launch, plan, e, begin, end); });
  }
  return partial;
}

// ---- phase 3 -------------------------------------------------------------------------------------------------------

template <class A>
void finish(const ExitLoss& launch, const Plan& plan, const std::vector<double>& partial) {
  const int64_t entries = int64_t(launch.T + 1) * launch.N;
  double total = 0;
  for (int64_t entry = 0; entry < entries; ++entry) {
    double sum = 0;
    for (int64_t band = 0; band < plan.images * plan.bands; ++band) sum += partial[band * entries + entry];
    if (launch.reduction != Reduction::none)
      static_cast<A*>(launch.losses)[entry] = A(sum * plan.norm[entry < launch.N ? 0 : 1]);
    if (launch.total_weights && launch.total_weights[entry] != 0)
      total += launch.total_weights[entry] * double(static_cast<const A*>(launch.losses)[entry]);
  }
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
    const bool resized = launch.exits[e].H != launch.H || launch.exits[e].W != launch.W;
    if (resized) memories.emplace_back(launch, launch.exits[e], resizes[e]);
    wanted += launch.grads[e].data && !resized;
  }
  plan.resizes = resizes.data();
  plan.stream = wanted * plan.pixels * launch.C >= (int64_t(4) << 20);
  auto compute = [&](auto a) {
    using A = decltype(a);
    finish<A>(launch, plan, plan.pixels > 0 ? run<A>(launch, plan, memories, resizes) : std::vector<double>());
  };
  launch.dtype == DType::float64 ? compute(double{}) : compute(float{});
}

}  // namespace selfreg

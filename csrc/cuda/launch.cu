// The CUDA backend's launch: its plan, phase 0 over the labels, phase 3 in a fixed order; and the scaling of gradients.
#include <algorithm>

#include "cuda_launch.h"
#include "device.h"
#include "launch.h"

namespace selfreg {
namespace {

constexpr int64_t kMaxCountBlocks = 512;
constexpr int kThreads = 256;

// ---- plan ------------------------------------------------------------------------------------------------------

// The dimensions B, H, W, as few as describe the pixels of all views.
template <class A>
void merge_dimensions(const ExitLoss& L, Args<A>& args) {
  const int64_t sizes[3] = {L.B, L.H, L.W};
  PixelView* views[2 * kMaxExits];
  int count = 0;
  for (int e = 0; e < L.N; ++e) {
    for (auto [from, to] : {std::pair{&L.exits[e], &args.exits[e]}, {&L.grads[e], &args.grads[e]}}) {
      *to = {from->data, from->stride_c, {from->stride_b, from->stride_h, from->stride_w}};
      if (from->data) views[count++] = to;
    }
  }
  int last = 3;  // dimensions [last, 3) are merged
  for (int d = 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    const bool merges =
        last < 3 &&
        std::all_of(
            views, views + count, [&](const PixelView* v) { return v->step[d] == v->step[last] * args.size[last]; });
    if (merges) {
      args.size[last] *= sizes[d];
    } else {
      --last;
      args.size[last] = sizes[d];
      for (int i = 0; i < count; ++i) views[i]->step[last] = views[i]->step[d];
    }
  }
  for (int d = 0; d < last; ++d) {
    args.size[d] = 1;
    for (int i = 0; i < count; ++i) views[i]->step[d] = 0;
  }
  args.dims = 3 - last;
  args.alike = std::all_of(views, views + count,
                           [&](const PixelView* v) { return std::equal(v->step, v->step + 3, views[0]->step); });
}

// What resized exits are, and how many there are.
template <class A>
bool resizes(const ExitLoss& L, Args<A>& args) {
  bool any = false;
  for (int e = 0; e < L.N; ++e) {
    const View& exit = L.exits[e];
    if (exit.H == L.H && exit.W == L.W) continue;
    args.from[e] = make_int2(int(exit.H), int(exit.W));
    any = true;
    args.size_number[e] = uint8_t(args.sizes);
    for (int other = e; other-- > 0;)
      if (args.from[other].x == args.from[e].x && args.from[other].y == args.from[e].y)
        args.size_number[e] = args.size_number[other];
    args.sizes += args.size_number[e] == args.sizes;
  }
  return any;
}

// Calls f for the views that the kernel touches; whether it is true for all.
template <class A, class F>
bool all_views(const Args<A>& args, F f) {
  for (int e = 0; e < args.N; ++e)
    if (!f(args.exits[e]) || (args.grads[e].data && !f(args.grads[e]))) return false;
  return true;
}

template <class A>
void choose_layout(const Args<A>& args, int bytes, Launch<A>& launch) {
  int rows = 0;  // exits whose channels lie together
  for (int e = 0; e < args.N; ++e) rows += args.C > 1 && args.exits[e].channel == 1 && args.exits[e].step[2] != 1;
  launch.layout = 2 * rows > args.N ? Layout::lanes : Layout::planes;
  const bool lanes = launch.layout == Layout::lanes;
  if (lanes && args.dims <= 1 && all_views(args, [&](const PixelView& v) {
        return v.channel == 1 && v.step[2] == args.C && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
      }))
    launch.layout = Layout::staged;
  auto fits = [&](int vector) {
    return (lanes ? args.C : args.size[2]) % vector == 0 && all_views(args, [&](const PixelView& v) {
             const int64_t together = lanes ? v.channel : v.step[2], apart = lanes ? v.step[2] : v.channel;
             return together == 1 && apart % vector == 0 && v.step[0] % vector == 0 && v.step[1] % vector == 0 &&
                    reinterpret_cast<uintptr_t>(v.data) % (vector * bytes) == 0;
           });
  };
  launch.vector = fits(4) ? 4 : fits(2) ? 2 : 1;
  launch.near = all_views(args, [&](const PixelView& v) { return (args.C - 1) * v.channel <= 0xffffffffll; });
}

// Where exits are resized, nothing is merged: rows and columns are what they lie on.
template <class A>
void keep_dimensions(const ExitLoss& L, int bytes, Args<A>& args, Launch<A>& launch) {
  launch.layout = Layout::resized;
  launch.near = true;
  args.size[0] = L.B, args.size[1] = L.H, args.size[2] = L.W, args.dims = 3;
  args.align_corners = L.align_corners;
  for (int e = 0; e < L.N; ++e) {
    for (auto [from, to] : {std::pair{&L.exits[e], &args.exits[e]}, {&L.grads[e], &args.grads[e]}})
      *to = {from->data, from->stride_c, {from->stride_b, from->stride_h, from->stride_w}};
    const View& v = L.exits[e];
    const int64_t last = (v.H - 1) * v.stride_h + (v.W - 1) * v.stride_w + (L.C - 1) * v.stride_c;
    launch.near = launch.near && last <= 0xffffffffll / bytes;
  }
}

// ---- phase 0 ---------------------------------------------------------------------------------------------------

template <class A>
struct CountArgs {
  const void* labels;
  const A *class_weight, *pixel_weight;
  int64_t pixels, C, ignore_index;
  bool mask_soft;
  double* counts;  // [blocks, 2]
};

template <class A, class Label>
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ CountArgs<A> a) {
  double label = 0, soft = 0;
  const int64_t step = int64_t(gridDim.x) * kThreads;
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.pixels; i += step) {
    const double w = a.pixel_weight ? double(a.pixel_weight[i]) : 1.0;
    const int64_t y = a.labels ? int64_t(static_cast<const Label*>(a.labels)[i]) : a.ignore_index;
    const bool valid = y != a.ignore_index;
    if (valid && w != 0 && y >= 0 && y < a.C) label += a.class_weight ? w * double(a.class_weight[y]) : w;
    if (valid || !a.mask_soft) soft += w;
  }
  label = block_sum(label);
  soft = block_sum(soft);
  if (threadIdx.x == 0) a.counts[2 * blockIdx.x] = label, a.counts[2 * blockIdx.x + 1] = soft;
}

template <class A>
int64_t count_pixels(const Args<A>& args, double* counts, const Launch<A>& launch) {
  const CountArgs<A> count{args.labels, args.class_weight, args.pixel_weight, args.pixels,
                           args.C,      args.ignore_index, args.mask_soft,    counts};
  const int64_t most = std::min<int64_t>(2 * launch.processors, kMaxCountBlocks);
  const int64_t blocks = std::clamp<int64_t>(args.pixels / (4 * kThreads), 1, most);
  auto kernel = args.label_type == LabelType::uint8   ? count_kernel<A, uint8_t>
                : args.label_type == LabelType::int32 ? count_kernel<A, int32_t>
                                                      : count_kernel<A, int64_t>;
  launch_kernel(launch, kernel, dim3(unsigned(blocks)), kThreads, 0, count);
  return blocks;
}

// ---- phase 3 ---------------------------------------------------------------------------------------------------

template <class A>
struct FinishArgs {
  const double *partial, *combined, *norm;  // [entries, blocks], [entries, combined_blocks], [2]
  int64_t blocks, combined_blocks;
  int32_t entries, N;
  bool weighted;
  A weights[(kMaxExits + 1) * kMaxExits];
  A *losses, *total;  // [entries], []
};

template <class A>
__global__ void __launch_bounds__(1024) finish_kernel(const __grid_constant__ FinishArgs<A> a) {
  __shared__ A losses[(kMaxExits + 1) * kMaxExits];
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < a.entries; i += blockDim.x / 32) {  // a warp an entry
    double sum = 0;
#pragma unroll 8
    for (int64_t b = lane; b < a.blocks; b += 32) sum += a.partial[i * a.blocks + b];
    for (int64_t b = lane; b < a.combined_blocks; b += 32) sum += a.combined[i * a.combined_blocks + b];
    sum = warp_sum(sum);
    if (lane == 0) a.losses[i] = losses[i] = a.blocks ? A(sum * a.norm[i < a.N ? 0 : 1]) : A(0);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = 0;
  if (a.weighted)
    for (int i = 0; i < a.entries; ++i)
      if (a.weights[i] != 0) total += double(a.weights[i]) * double(losses[i]);
  *a.total = A(total);
}

// ---- gradients of resized exits --------------------------------------------------------------------------------

template <class A>
struct JoinArgs {
  const A* copies[kMaxExits];  // null: there are none
  PixelView grads[kMaxExits];
  int2 from[kMaxExits];
  Cut cut;
  int64_t B, C;
  bool align_corners;
};

// A thread an element of the plane: the sum of the copies that have it, which lie side by side, for all channels.
template <class S, class A>
__global__ void __launch_bounds__(kThreads, 3) join_kernel(const __grid_constant__ JoinArgs<A> a) {
  const int e = blockIdx.y;
  if (!a.copies[e]) return;
  const Cut& cut = a.cut;
  const PixelView& grad = a.grads[e];
  const int64_t h = a.from[e].x, w = a.from[e].y, step = int64_t(gridDim.x) * kThreads;
  const Axis rows{h, cut.height, a.align_corners}, columns{w, cut.width, a.align_corners};
  const Copies copies(cut, h, w, a.align_corners);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.B * h * w; i += step) {
    const int64_t line = quotient(i, w), x = i - line * w, image = quotient(line, h), y = line - image * h;
    // The output's rows that lie on row y are those on y - 1 and on y; of larger exits there may be none.
    const int64_t row0 = rows.first(y - 1), row1 = rows.first(y + 1) - 1;
    const int64_t column0 = columns.first(x - 1), column1 = columns.first(x + 1) - 1;
    const bool none = row0 > row1 || column0 > column1;
    const int64_t band0 = quotient(row0, cut.rows), band1 = none ? band0 - 1 : quotient(row1, cut.rows);
    const int64_t strip0 = quotient(column0, cut.columns), strip1 = quotient(column1, cut.columns);
    S* const to = static_cast<S*>(grad.data) + image * grad.step[0] + y * grad.step[1] + x * grad.step[2];
    const int64_t below = y - rows.low(band0 * cut.rows), right = x - columns.low(strip0 * cut.columns);
    const A* const first =
        a.copies[e] + copies.begin(cut, image, band0, strip0, a.C) + (below * copies.columns + right) * a.C;
    if (band0 == band1 && strip0 == strip1) {
#pragma unroll 4
      for (int64_t c = 0; c < a.C; ++c) to[c * grad.channel] = to_storage<S>(first[c]);
      continue;
    }
#pragma unroll 1
    for (int64_t c = 0; c < a.C; ++c) {
      A sum = 0;
#pragma unroll 1
      for (int64_t band = band0; band <= band1; ++band) {
        const int64_t row = y - rows.low(band * cut.rows);
#pragma unroll 1
        for (int64_t strip = strip0; strip <= strip1; ++strip) {
          const int64_t column = x - columns.low(strip * cut.columns);
          sum += a.copies[e][copies.begin(cut, image, band, strip, a.C) + (row * copies.columns + column) * a.C + c];
        }
      }
      to[c * grad.channel] = to_storage<S>(sum);
    }
  }
}

template <class A>
void join_copies(const ExitLoss& L, const Args<A>& args, const Cut& cut, const A* room, const Launch<A>& launch) {
  JoinArgs<A> join{};
  int64_t most = 0;
  place_copies(args, cut, [&](int e, int64_t begin) {
    const View& grad = L.grads[e];
    join.copies[e] = room + begin;
    join.grads[e] = {grad.data, grad.stride_c, {grad.stride_b, grad.stride_h, grad.stride_w}};
    join.from[e] = args.from[e];
    most = std::max(most, L.B * grad.H * grad.W);
  });
  if (most == 0) return;
  join.cut = cut, join.B = L.B, join.C = L.C, join.align_corners = L.align_corners;
  void (*kernel)(JoinArgs<A>);
  if constexpr (sizeof(A) == 8) {
    kernel = join_kernel<double, double>;
  } else {
    kernel = L.dtype == DType::float32   ? join_kernel<float, float>
             : L.dtype == DType::float16 ? join_kernel<__half, float>
                                         : join_kernel<__nv_bfloat16, float>;
  }
  const int64_t blocks = std::clamp<int64_t>((most + kThreads - 1) / kThreads, 1, 4 * launch.processors);
  launch_kernel(launch, kernel, dim3(unsigned(blocks), unsigned(L.N)), kThreads, 0, join);
}

// ---- exits that are all small: small_exits.h -------------------------------------------------------------------

// Whether that kernel will do; what is known before the output is cut. Peaks come first, then copies.
bool plan_small(const Args<float>& args, const Launch<float>& launch, double* combined, SmallArgs& small) {
  // Raw targets of other temperatures underflow where what they are a power of does not, or the other way round; of
  // large ones, gradients are small differences of large sums.
  const bool fits = args.T == 0 || (args.tau >= 0.5f && args.tau <= 8);
  const bool suits = args.C > 1 && args.C <= kMostSmallChannels;  // of one channel, gradients are to be exactly 0
  if (!fits || !suits || !is_plain(args) || args.teacher_learns || !launch.near) return false;
  if (args.pixels >> 31) return false;
  int64_t peaks = 0;
  for (int e = args.N; e-- > 0;) {
    const int2 from = args.from[e];
    if (from.x == 0 || from.x > args.size[1] || from.y > args.size[2]) return false;
    const int s = args.size_number[e];
    small.size_first[s] = e;
    if (peaks == 0 || from.x > args.from[small.size_first[small.finest]].x) small.finest = s;
    small.peaks_from[e] = peaks;
    peaks += args.size[0] * from.x * from.y;
  }
  if (peaks >> 30) return false;  // they are counted, in steps of a grid, in int
  for (int s = 0; s < args.sizes; ++s) small.vectors[s] = uint8_t(args.T + 1);
  for (int e = 0; e < args.N; ++e)
    if (args.grads[e].data) small.rank[e] = small.vectors[args.size_number[e]]++;
  small.all = args;
  small.peaks = launch.copies;
  small.copies_begin = (peaks + 3) / 4 * 4;
  small.copies = launch.copies + small.copies_begin;
  small.combined = combined;
  return true;
}

// ---- the launch ------------------------------------------------------------------------------------------------

struct Workspace {
  int64_t norm, counts, partial, combined, total;  // numbers of double
};

Workspace workspace(const ExitLoss& L) {
  const int64_t blocks = std::min(kMaxBlocks, L.B * L.H * L.W);
  const bool resized = std::any_of(L.exits, L.exits + L.N, [&](const View& v) { return v.H != L.H || v.W != L.W; });
  Workspace w{0, 2, 2 + 2 * kMaxCountBlocks, 0, 0};
  w.combined = w.partial + (L.T + 1) * L.N * blocks;
  w.total = w.combined + (resized ? (L.T + 1) * L.N * kMaxCombineBlocks : 0);
  return w;
}

// Without `room`: only how much of it is needed, in `numbers`.
template <class A>
cudaError_t launch_as(const ExitLoss& L, double* room, int device, cudaStream_t stream, int64_t& numbers) {
  const Workspace at = workspace(L);
  numbers = at.total;
  int64_t blocks = 0;
  cudaError_t error = cudaSuccess;
  Cut cut{};
  SmallArgs small{};
  Launch<A> launch{};
  launch.dry = !room;
  launch.copies = reinterpret_cast<A*>(room + at.total);
  launch.cut = &cut;
  launch.device = device;
  launch.stream = stream;
  launch.blocks = &blocks;
  launch.error = &error;
  if (!launch.works(cudaDeviceGetAttribute(&launch.processors, cudaDevAttrMultiProcessorCount, device))) return error;

  Args<A> args{};
  args.N = L.N, args.T = L.T, args.C = int32_t(L.C);
  args.pixels = L.B * L.H * L.W;
  const int bytes = L.dtype == DType::float64 ? 8 : L.dtype == DType::float32 ? 4 : 2;
  const bool resized = resizes(L, args);
  if (launch.dry && !resized) return cudaSuccess;
  if (resized) {
    keep_dimensions(L, bytes, args, launch);
  } else {
    merge_dimensions(L, args);
    choose_layout(args, bytes, launch);
  }
  int place = 0;
  for (int r = L.T; r-- > 0;) args.order[place++] = args.teachers[r] = L.teachers[r];
  for (int e = 0; e < L.N; ++e)
    if (std::find(L.teachers, L.teachers + L.T, e) == L.teachers + L.T) args.order[place++] = e;
  args.labels = L.labels;
  args.label_type = L.label_type;
  args.class_weight = static_cast<const A*>(L.class_weight);
  args.pixel_weight = static_cast<const A*>(L.pixel_weight);
  args.grad_losses = static_cast<const A*>(L.grad_losses);
  args.target = L.target;
  args.reduction = L.reduction;
  args.tau = A(L.temperature);
  args.rate_tau = A(kLog2e / L.temperature);
  args.rate = L.target == Target::renormalized && !L.labels ? args.rate_tau : A(kLog2e);
  args.dot_scale = L.target == Target::argmax ? A(1) : args.tau;
  args.log_z_scale = L.target == Target::renormalized ? args.tau * args.tau : args.dot_scale;
  args.hot_weight = A(1 - L.label_smoothing);
  args.smoothing = L.labels ? A(L.label_smoothing / double(L.C)) : A(0);
  args.ignore_index = L.ignore_index;
  args.mask_soft = L.mask_soft;
  args.teacher_learns = !L.detach_teacher && (L.grad_losses || L.weights);
  const int32_t entries = (L.T + 1) * L.N;
  for (int i = 0; L.weights && i < entries; ++i) args.weights[i] = A(L.weights[i]);
  args.norm = room + at.norm;
  args.partial = room + at.partial;
  args.maps = L.reduction == Reduction::none ? static_cast<A*>(L.losses) : nullptr;

  if (args.pixels > 0) {
    if (L.reduction == Reduction::mean && (L.labels || L.pixel_weight)) {
      args.counts = room + at.counts;
      args.count_blocks = int32_t(count_pixels(args, room + at.counts, launch));
    }
    args.soft_norm = 1.0 / double(args.pixels);
    const Args<A> planned = args;  // with the gradients' own memory
    if constexpr (sizeof(A) == 4)
      if (resized && plan_small(args, launch, room + at.combined, small)) launch.small = &small;
    if constexpr (sizeof(A) == 8) {
      launch_exit_loss<double>(launch, args);
    } else {
      L.dtype == DType::float32   ? launch_exit_loss<float>(launch, args)
      : L.dtype == DType::float16 ? launch_exit_loss<__half>(launch, args)
                                  : launch_exit_loss<__nv_bfloat16>(launch, args);
    }
    if (error != cudaSuccess) return error;
    int64_t copies = 0;  // numbers of A
    if (small.taken) {
      copies = small.copies_begin + place_vectors(small);
    } else if (resized) {
      copies = place_copies(planned, cut, [](int, int64_t) {});
      join_copies(L, planned, cut, launch.copies, launch);
    }
    numbers += (copies * int64_t(sizeof(A)) + 7) / 8;
  }
  if (launch.dry) return cudaSuccess;

  FinishArgs<A> finish{};
  finish.partial = room + at.partial;
  finish.combined = room + at.combined;
  finish.combined_blocks = small.combined_blocks;
  finish.norm = room + at.norm;
  finish.blocks = blocks;
  finish.N = L.N;
  if (L.reduction != Reduction::none) {
    finish.entries = entries;
    finish.weighted = L.total_weights;
    for (int i = 0; finish.weighted && i < entries; ++i) finish.weights[i] = A(L.total_weights[i]);
    finish.losses = static_cast<A*>(L.losses);
  }
  finish.total = static_cast<A*>(L.total);
  launch_kernel(launch, finish_kernel<A>, dim3(1), 512, 0, finish);
  return error;
}

// ---- scaling ---------------------------------------------------------------------------------------------------

template <class S>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleArgs a) {
  using A = typename Accumulator<S>::type;
  constexpr int V = 16 / sizeof(S);
  const A factor = *static_cast<const A*>(a.factor);
  if (factor == A(1)) return;
  S* const data = static_cast<S*>(a.data[blockIdx.y]);
  const int64_t numel = a.numel[blockIdx.y];
  const int64_t words = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? numel / V : 0;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = first; i < words; i += step) {
    A x[V];
    unpack<S, V>(__ldcs(reinterpret_cast<const uint4*>(data) + i), x);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] *= factor;
    store<S, V>(data + i * V, x);
  }
  for (int64_t i = words * V + first; i < numel; i += step) data[i] = to_storage<S>(to_number(data[i]) * factor);
}

}  // namespace

cudaError_t cuda_workspace_bytes(const ExitLoss& launch, int device, int64_t& bytes) {
  const auto plan = launch.dtype == DType::float64 ? launch_as<double> : launch_as<float>;
  const cudaError_t error = plan(launch, nullptr, device, nullptr, bytes);
  bytes *= int64_t(sizeof(double));
  return error;
}

cudaError_t cuda_launch(const ExitLoss& launch, void* room, int device, cudaStream_t stream) {
  const auto run = launch.dtype == DType::float64 ? launch_as<double> : launch_as<float>;
  int64_t numbers;
  return run(launch, static_cast<double*>(room), device, stream, numbers);
}

cudaError_t cuda_scale(const ScaleArgs& args, int tensors, DType dtype, cudaStream_t stream) {
  auto kernel = dtype == DType::float64   ? scale_kernel<double>
                : dtype == DType::float32 ? scale_kernel<float>
                : dtype == DType::float16 ? scale_kernel<__half>
                                          : scale_kernel<__nv_bfloat16>;
  const int64_t most = *std::max_element(args.numel, args.numel + tensors);
  const int64_t blocks = std::clamp<int64_t>(most / (16 * kThreads), 1, 1024);
  return enqueue(kernel, dim3(unsigned(blocks), unsigned(tensors)), kThreads, 0, stream, args);
}

cudaError_t cuda_load() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(finish_kernel<float>));
}

}  // namespace selfreg

// The CUDA backend's launch: its plan, phase 0 over the labels, phase 3 in a fixed order; and the scaling of gradients.
#include <algorithm>

#include "cuda_launch.h"
#include "device.h"
#include "planning.h"

namespace selfreg {
namespace {

constexpr int kThreads = 256;

// ---- what is asked for -----------------------------------------------------------------------------------------

template <class A>
void set_views(const ExitLoss& L, Args<A>& args) {
  for (int e = 0; e < L.N; ++e)
    for (auto [from, to] : {std::pair{&L.exits[e], &args.exits[e]}, {&L.grads[e], &args.grads[e]}})
      *to = {from->data, from->stride_c, {from->stride_b, from->stride_h, from->stride_w}};
}

// The dimensions B, H, W, as few as describe the pixels of all views.
template <class A>
void merge_dimensions(Args<A>& args) {
  const int64_t sizes[3] = {args.size[0], args.size[1], args.size[2]};
  PixelView* views[2 * kMaxExits];
  int count = 0;
  for (int e = 0; e < args.N; ++e)
    for (PixelView* v : {&args.exits[e], &args.grads[e]})
      if (v->data) views[count++] = v;
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
  args.same_steps = std::all_of(views, views + count,
                                [&](const PixelView* v) { return std::equal(v->step, v->step + 3, views[0]->step); });
}

// Whether f is true of all views that a kernel touches.
template <class A, class F>
bool all_views(const Args<A>& args, F f) {
  for (int e = 0; e < args.N; ++e)
    if (!f(args.exits[e]) || (args.grads[e].data && !f(args.grads[e]))) return false;
  return true;
}

template <class A>
void choose_layout(int bytes, Request<A>& request) {
  const Args<A>& args = request.args;
  int rows = 0;  // exits whose channels lie together
  for (int e = 0; e < args.N; ++e) rows += args.C > 1 && args.exits[e].channel == 1 && args.exits[e].step[2] != 1;
  request.layout = 2 * rows > args.N ? Layout::lanes : Layout::planes;
  const bool lanes = request.layout == Layout::lanes;
  if (lanes && args.dims <= 1 && all_views(args, [&](const PixelView& v) {
        return v.channel == 1 && v.step[2] == args.C && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
      }))
    request.layout = Layout::staged;
  auto fits = [&](int vector) {
    return (lanes ? args.C : args.size[2]) % vector == 0 && all_views(args, [&](const PixelView& v) {
             const int64_t together = lanes ? v.channel : v.step[2], apart = lanes ? v.step[2] : v.channel;
             return together == 1 && apart % vector == 0 && v.step[0] % vector == 0 && v.step[1] % vector == 0 &&
                    reinterpret_cast<uintptr_t>(v.data) % (vector * bytes) == 0;
           });
  };
  request.vector = fits(4) ? 4 : fits(2) ? 2 : 1;
  request.channels_near = all_views(args, [&](const PixelView& v) { return (args.C - 1) * v.channel <= 0xffffffffll; });
}

template <class A>
Request<A> make_request(const ExitLoss& L) {
  Request<A> request{};
  Args<A>& args = request.args;
  args.N = L.N, args.T = L.T, args.C = int32_t(L.C);
  args.size[0] = L.B, args.size[1] = L.H, args.size[2] = L.W, args.dims = 3;
  args.pixels = L.B * L.H * L.W;
  args.align_corners = L.align_corners;
  set_views(L, args);
  for (int e = 0; e < L.N; ++e) {
    const View& v = L.exits[e];
    if (v.H == L.H && v.W == L.W) continue;
    args.from[e] = make_int2(int(v.H), int(v.W));
    request.resized = true;
  }
  if (!request.resized) merge_dimensions(args);  // else rows and columns are what exits lie on
  choose_layout(L.dtype == DType::float64 ? 8 : L.dtype == DType::float32 ? 4 : 2, request);
  int place = 0;
  for (int r = L.T; r-- > 0;) args.order[place++] = args.teachers[r] = uint8_t(L.teachers[r]);
  for (int e = 0; e < L.N; ++e)
    if (std::find(L.teachers, L.teachers + L.T, e) == L.teachers + L.T) args.order[place++] = uint8_t(e);
  args.labels = L.labels;
  args.label_type = L.label_type;
  args.class_weight = static_cast<const A*>(L.class_weight);
  args.pixel_weight = static_cast<const A*>(L.pixel_weight);
  args.grad_losses = static_cast<const A*>(L.grad_losses);
  // At temperature 1 powers are renormalised as they are.
  args.target = L.target == Target::renormalized && L.temperature == 1 ? Target::raw : L.target;
  args.reduction = L.reduction;
  args.tau = A(L.temperature);
  args.rate_tau = A(kLog2e / L.temperature);
  args.rate = args.target == Target::renormalized && !L.labels ? args.rate_tau : A(kLog2e);
  args.dot_scale = L.target == Target::argmax ? A(1) : args.tau;
  args.log_z_scale = L.target == Target::renormalized ? args.tau * args.tau : args.dot_scale;
  args.hot_weight = A(1 - L.label_smoothing);
  args.smoothing = L.labels ? A(L.label_smoothing / double(L.C)) : A(0);
  args.ignore_index = L.ignore_index;
  args.mask_soft = L.mask_soft;
  args.teacher_learns = !L.detach_teacher && (L.grad_losses || L.weights);
  for (int i = 0; L.weights && i < (L.T + 1) * L.N; ++i) args.weights[i] = A(L.weights[i]);
  args.maps = L.reduction == Reduction::none ? static_cast<A*>(L.losses) : nullptr;
  args.soft_norm = 1.0 / double(std::max<int64_t>(args.pixels, 1));
  return request;
}

// ---- phase 0 ---------------------------------------------------------------------------------------------------

template <class A>
struct CountArgs {
  const void* labels;
  LabelType label_type;
  const A *class_weight, *pixel_weight;
  int64_t pixels, C, ignore_index;
  bool mask_soft;
  double* counts;  // [blocks, 2]
};

template <class A, class Label>
SELFREG_DEVICE void count(const CountArgs<A>& a) {
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
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ CountArgs<A> a) {
  switch (a.label_type) {
    case LabelType::uint8: return count<A, uint8_t>(a);
    case LabelType::int32: return count<A, int32_t>(a);
    default: return count<A, int64_t>(a);
  }
}

template <class A>
void plan_counts(Planner& planner, Request<A>& request) {
  const Args<A>& args = request.args;
  request.counts = -1;
  if (args.reduction != Reduction::mean || !(args.labels || args.pixel_weight)) return;
  const int64_t blocks = std::clamp<int64_t>(args.pixels / (4 * kThreads), 1, 2 * planner.processors);
  const int64_t counts = request.counts = planner.take(2 * blocks * int64_t(sizeof(double)));
  request.args.count_blocks = int32_t(blocks);
  const CountArgs<A> count{args.labels,       args.label_type, args.class_weight,
                           args.pixel_weight, args.pixels,     args.C,
                           args.ignore_index, args.mask_soft,  nullptr};
  planner.add(count_kernel<A>, dim3(unsigned(blocks)), kThreads, 0, count,
              [=](CountArgs<A>& to, char* workspace) { to.counts = placed<double>(workspace, counts); });
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

template <class A>
void plan_finish(Planner& planner, const ExitLoss& L, int64_t norm, const Planned& planned) {
  FinishArgs<A> finish{};
  finish.blocks = planned.main.blocks;
  finish.combined_blocks = planned.combined.blocks;
  finish.N = L.N;
  if (L.reduction != Reduction::none) {
    finish.entries = (L.T + 1) * L.N;
    finish.weighted = L.total_weights;
    for (int i = 0; finish.weighted && i < finish.entries; ++i) finish.weights[i] = A(L.total_weights[i]);
    finish.losses = static_cast<A*>(L.losses);
  }
  finish.total = static_cast<A*>(L.total);
  planner.add(finish_kernel<A>, dim3(1), 512, 0, finish, [=](FinishArgs<A>& to, char* workspace) {
    to.norm = placed<double>(workspace, norm);
    to.partial = placed<double>(workspace, planned.main.begin);
    to.combined = placed<double>(workspace, planned.combined.begin);
  });
}

// ---- the plan --------------------------------------------------------------------------------------------------

template <class A>
void plan_launch(Planner& planner, const ExitLoss& L) {
  Request<A> request = make_request<A>(L);
  request.norm = planner.take(2 * sizeof(double));
  Planned planned;
  if (request.args.pixels > 0) {
    plan_counts(planner, request);
    if constexpr (sizeof(A) == 8) {
      planned = plan_exit_loss<double>(planner, request);
    } else {
      planned = L.dtype == DType::float32   ? plan_exit_loss<float>(planner, request)
                : L.dtype == DType::float16 ? plan_exit_loss<__half>(planner, request)
                                            : plan_exit_loss<__nv_bfloat16>(planner, request);
    }
  }
  plan_finish<A>(planner, L, request.norm, planned);
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

cudaError_t cuda_plan(const ExitLoss& launch, int device, Plan& plan) {
  Planner planner{device, 0, plan};
  if (planner.works(cudaDeviceGetAttribute(&planner.processors, cudaDevAttrMultiProcessorCount, device)))
    launch.dtype == DType::float64 ? plan_launch<double>(planner, launch) : plan_launch<float>(planner, launch);
  return planner.error;
}

cudaError_t cuda_enqueue(const Plan& plan, void* workspace, cudaStream_t stream) {
  for (const auto& step : plan.steps)
    if (const cudaError_t error = step(static_cast<char*>(workspace), stream); error != cudaSuccess) return error;
  return cudaSuccess;
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

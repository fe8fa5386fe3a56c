// `exit_loss` and `scale_` on CUDA tensors. Built with -DSELFREG_CUDA_ON_HOST, the same kernels compiled for the CPU
// (tests/cuda_on_host) serve CPU tensors under names of their own.
#include <dlfcn.h>

#include "../operator.h"
#include "cuda_launch.h"

#ifndef SELFREG_CUDA_ON_HOST
#include <torch/csrc/stable/accelerator.h>
#endif

namespace selfreg {
namespace {

std::string described(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is told here, and not again by whoever looks next
  throw std::runtime_error("selfreg_fast: CUDA: " + described(error));
}

#ifdef SELFREG_CUDA_ON_HOST
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
cudaStream_t current_stream(int) { return nullptr; }
int device_of(const Tensor&) { return 0; }
#else
using torch::stable::accelerator::DeviceGuard;

// The function is in libtorch_cuda; looked up there at run time, this library can be built beside a torch without it.
cudaStream_t current_stream(int device) {
  using Get = int32_t (*)(int32_t, void**);
  static const Get get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  check(get && get(device, &stream) == 0, "there is no CUDA stream in this torch");
  return static_cast<cudaStream_t>(stream);
}
int device_of(const Tensor& t) { return int(t.get_device_index()); }
#endif

std::tuple<Tensor, Tensor, std::vector<Tensor>> exit_loss_cuda(
    const std::vector<Tensor>& exits, const std::optional<Tensor>& labels, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pixel_weight, const std::optional<Tensor>& grad_losses,
    const std::vector<double>& weights, const Ints& wanted, const Ints& teachers, double temperature, int64_t target,
    int64_t ignore_index, double label_smoothing, bool mask_soft, bool detach_teacher, int64_t reduction,
    const Ints& size, bool align_corners) {
  check(!exits.empty(), "exits: expected at least one");
  check(exits.size() <= kMaxCudaExits, "exits: expected at most ", kMaxCudaExits, " on a GPU, got ", exits.size());
  const int device = device_of(exits[0]);
  const DeviceGuard guard(device);
  auto run = [device](const ExitLoss& launch, const Tensor& first) {
    // Freed on return, but not used again before this stream is done with it: torch's allocator sees to that.
    Plan plan;
    check_cuda(cuda_plan(launch, device, plan));
    Tensor workspace = empty(first, {plan.bytes}, ScalarType::Byte);
    check_cuda(cuda_enqueue(plan, workspace.mutable_data_ptr(), current_stream(device)));
  };
  return exit_loss(
      run, true, [](void*, int64_t) {}, exits, labels, class_weight, pixel_weight, grad_losses, weights, wanted,
      teachers, temperature, target, ignore_index, label_smoothing, mask_soft, detach_teacher, reduction, size,
      align_corners);
}

// Whether the tensor's elements are all of those between its first and its last.
bool is_dense(const Tensor& t) {
  int64_t span = 1;
  for (int64_t d = 0; d < t.dim(); ++d) span += (t.size(d) - 1) * t.stride(d);
  return span == t.numel() || t.numel() == 0;
}

void scale_cuda(std::vector<Tensor> grads, const Tensor& factor) {
  if (grads.empty()) return;
  const DType dtype = dtype_of(grads[0]);
  const ScalarType scalar = dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  check(factor.numel() == 1 && factor.scalar_type() == scalar, "factor: expected one number of the losses' dtype");
  const DeviceGuard guard(device_of(grads[0]));
  for (size_t first = 0; first < grads.size(); first += kMaxCudaExits) {
    ScaleArgs args{};
    args.factor = factor.const_data_ptr();
    int count = 0;
    for (size_t i = first; i < grads.size() && count < kMaxCudaExits; ++i, ++count) {
      check(dtype_of(grads[i]) == dtype && is_dense(grads[i]), "grads: expected dense tensors of one dtype");
      args.data[count] = grads[i].mutable_data_ptr();
      args.numel[count] = grads[i].numel();
    }
    check_cuda(cuda_scale(args, count, dtype, current_stream(device_of(grads[0]))));
  }
}

// Why kernels cannot be loaded on the device; "" where they can.
std::string load_cuda(int64_t device) {
  const DeviceGuard guard{int(device)};
  const cudaError_t error = cuda_load();
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  return described(error);
}

}  // namespace
}  // namespace selfreg

STABLE_TORCH_LIBRARY_FRAGMENT(selfreg_fast, m) {
  m.def("load_cuda(int device) -> str");
#ifdef SELFREG_CUDA_ON_HOST
  m.def("exit_loss_cuda_on_host" SELFREG_EXIT_LOSS_SCHEMA);
  m.def("scale_cuda_on_host_" SELFREG_SCALE_SCHEMA);
#endif
}
STABLE_TORCH_LIBRARY_IMPL(selfreg_fast, CompositeExplicitAutograd, m) {
  m.impl("load_cuda", TORCH_BOX(&selfreg::load_cuda));
}

#ifdef SELFREG_CUDA_ON_HOST
STABLE_TORCH_LIBRARY_IMPL(selfreg_fast, CPU, m) {
  m.impl("exit_loss_cuda_on_host", TORCH_BOX(&selfreg::exit_loss_cuda));
  m.impl("scale_cuda_on_host_", TORCH_BOX(&selfreg::scale_cuda));
}
#else
STABLE_TORCH_LIBRARY_IMPL(selfreg_fast, CUDA, m) {
  m.impl("exit_loss", TORCH_BOX(&selfreg::exit_loss_cuda));
  m.impl("scale_", TORCH_BOX(&selfreg::scale_cuda));
}
#endif

// The CUDA backend's interface to the operator: nothing in here knows of torch.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <vector>

#include "../exit_loss.h"

namespace selfreg {

constexpr int kMaxCudaExits = 16;

// A launch, worked out but for its memory: the kernels, in order.
struct Plan {
  int64_t bytes = 0;  // of the workspace
  std::vector<std::function<cudaError_t(char* workspace, cudaStream_t)>> steps;
};
cudaError_t cuda_plan(const ExitLoss& launch, int device, Plan& plan);

// Enqueues the kernels. The workspace, of plan.bytes aligned to 16, must live until the stream has passed.
cudaError_t cuda_enqueue(const Plan& plan, void* workspace, cudaStream_t stream);

// data[i][0 .. numel[i]) *= *factor, a number of A; where that is 1, nothing is read or written.
struct ScaleArgs {
  void* data[kMaxCudaExits];
  int64_t numel[kMaxCudaExits];
  const void* factor;
};
cudaError_t cuda_scale(const ScaleArgs& args, int tensors, DType dtype, cudaStream_t stream);

// Loads a kernel on the current device: whether there is code for it, and a driver that can run it.
cudaError_t cuda_load();

}  // namespace selfreg

// The CUDA backend's interface to the operator: nothing in here knows of torch.
#pragma once

#include <cuda_runtime.h>

#include "../exit_loss.h"

namespace selfreg {

constexpr int kMaxCudaExits = 16;

cudaError_t cuda_workspace_bytes(const ExitLoss& launch, int device, int64_t& bytes);

// Enqueues the launch. `workspace` holds cuda_workspace_bytes(launch, device), and must live until the stream has
// passed.
cudaError_t cuda_launch(const ExitLoss& launch, void* workspace, int device, cudaStream_t stream);

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

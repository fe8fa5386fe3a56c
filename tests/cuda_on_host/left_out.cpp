// Stands in for exit_loss.cu of a storage type (SELFREG_LEFT_OUT) that a sanitizer's build does without.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

template <>
cudaError_t selfreg::launch_exit_loss<SELFREG_LEFT_OUT>(const Launch<float>&, Args<float>&) {
  return cudaErrorInvalidConfiguration;
}

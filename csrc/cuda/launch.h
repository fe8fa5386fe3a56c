// From a launch's description to a kernel's grid.
#pragma once

#include <map>
#include <tuple>

#include "args.h"

namespace selfreg {

constexpr int64_t kMaxBlocks = 4096;

template <class A>
struct Launch {
  Layout layout;  // planes, lanes, or staged where lanes may also be staged
  int vector;     // so many neighbours, a power of 2, can be one access
  bool near;      // a pixel's channels are less than 2^32 numbers apart
  int device, processors;
  cudaStream_t stream;
  int64_t* blocks;  // out: how many there are
};

// Phases 1 and 2 for exits of type S: exit_loss.cu.
template <class S, class A>
cudaError_t launch_exit_loss(const Launch<A>& launch, Args<A>& args);

// The blocks of a kernel that a multiprocessor runs at a time; 0 where they need more shared memory than there is.
inline int resident_blocks(const void* kernel, int device, int threads, int64_t shared) {
  thread_local std::map<std::tuple<const void*, int, int, int64_t>, int> known;  // asking takes microseconds
  auto [found, added] = known.try_emplace({kernel, device, threads, shared}, 0);
  if (added) {
    int most = 0;
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    most -= 1024;  // for static shared memory
    if (shared > most) return 0;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found->second, kernel, threads, size_t(shared));
    if (found->second == 0) cudaGetLastError();  // another kernel will serve: not an error of the launch
  }
  return found->second;
}

// As many blocks as the device runs at a time share out the tiles of `tile` pixels. False where it can run none.
template <class A>
bool launch_blocks(const Launch<A>& launch, void (*kernel)(Args<A>), const Args<A>& args, dim3 block, int64_t shared,
                   int64_t tile) {
  const int resident = resident_blocks(reinterpret_cast<const void*>(kernel), launch.device, block.x * block.y, shared);
  if (resident == 0) return false;
  int64_t blocks = (args.pixels + tile - 1) / tile;
  if (blocks > int64_t(resident) * launch.processors) blocks = int64_t(resident) * launch.processors;
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  *launch.blocks = blocks;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = block;
  config.dynamicSmemBytes = size_t(shared);
  config.stream = launch.stream;
  cudaLaunchKernelEx(&config, kernel, args);
  return true;
}

}  // namespace selfreg

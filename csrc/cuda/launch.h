// From a launch's description to a kernel's grid.
#pragma once

#include <map>
#include <tuple>

#include "args.h"
#include "small_exits.h"

namespace selfreg {

constexpr int64_t kMaxBlocks = 4096;

template <class A>
struct Launch {
  Layout layout;     // planes, lanes, or staged where lanes may also be staged
  int vector;        // so many neighbours, a power of 2, can be one access
  bool near;         // a pixel's channels are less than 2^32 numbers apart; an image's numbers, where exits are resized
  bool dry;          // nothing is launched: it is about the workspace
  A* copies;         // room for the private copies of gradients, where exits are resized; or as small_exits.h has it
  Cut* cut;          // out, likewise
  SmallArgs* small;  // where the kernel of small_exits.h will do; out: whether it was that one
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

// One without dynamic shared memory.
template <class... Exp, class... Act>
void launch_kernel(void (*kernel)(Exp...), dim3 blocks, int threads, cudaStream_t stream, const Act&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, args...);
}

// As many blocks as the device runs at a time; 0 where it can run none.
template <class A, class TheArgs>
int64_t most_blocks(const Launch<A>& launch, void (*kernel)(TheArgs), dim3 block, int64_t shared) {
  const int resident = resident_blocks(reinterpret_cast<const void*>(kernel), launch.device, block.x * block.y, shared);
  const int64_t blocks = int64_t(resident) * launch.processors;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// `blocks` of them share out what there is to do.
template <class A, class TheArgs>
void launch_blocks(const Launch<A>& launch, void (*kernel)(TheArgs), const TheArgs& args, dim3 block, int64_t shared,
                   int64_t blocks) {
  *launch.blocks = blocks;
  if (launch.dry) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = block;
  config.dynamicSmemBytes = size_t(shared);
  config.stream = launch.stream;
  cudaLaunchKernelEx(&config, kernel, args);
}

// Cuts an output for `blocks` blocks, so that they end together: the time is that of the rows of the block with the
// most, and some for each band. Short bands have large copies, for all share rows with their neighbours.
inline Cut cut_output(int64_t B, int64_t H, int64_t W, int64_t columns, int64_t tile_rows, int64_t blocks) {
  constexpr int64_t kShortest = 16, kSetup = 4;
  auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const int64_t strips = parts(W, columns), walks = B * strips;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t n = 1; n <= parts(H, kShortest) && (n - 1) * walks < 4 * blocks; ++n) {
    const int64_t time = parts(walks * n, blocks) * (parts(H, n) + kSetup);
    if (time < least) least = time, best = n;
  }
  const int64_t rows = parts(parts(H, best), tile_rows) * tile_rows;
  return {H, W, int32_t(rows), int32_t(columns), int32_t(parts(H, rows)), int32_t(strips)};
}

// Whether nothing is asked for that is rare, or costs much where it is.
template <class A>
bool is_plain(const Args<A>& args) {
  const bool two_rates = args.target == Target::renormalized && args.labels && args.T > 0;
  return args.target != Target::argmax && !two_rates && args.smoothing == 0 && args.reduction != Reduction::none;
}

// Says where the private copies of exits' gradients begin, to(e, number of A); returns how many numbers they are.
template <class A, class To>
int64_t place_copies(const Args<A>& args, const Cut& cut, To to) {
  int64_t numbers = 0;
  for (int e = 0; e < args.N; ++e) {
    if (!args.from[e].x || !args.grads[e].data) continue;
    to(e, numbers);
    numbers += Copies(cut, args.from[e].x, args.from[e].y, args.align_corners).begin(cut, args.size[0], 0, 0, args.C);
  }
  return numbers;
}

}  // namespace selfreg

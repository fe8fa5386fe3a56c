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
  int64_t* blocks;     // out: how many there are
  cudaError_t* error;  // out: the first that occurs, after which nothing is asked or launched: what follows hides it

  bool works(cudaError_t result) const {
    if (*error == cudaSuccess) *error = result;
    return *error == cudaSuccess;
  }
};

// Phases 1 and 2 for exits of type S: exit_loss.cu.
template <class S, class A>
void launch_exit_loss(const Launch<A>& launch, Args<A>& args);

// The blocks of a kernel that a multiprocessor runs at a time; 0 where they need more shared memory than there is, or
// after an error.
template <class A>
int resident_blocks(const Launch<A>& launch, const void* kernel, int threads, int64_t shared) {
  thread_local std::map<std::tuple<const void*, int, int, int64_t>, int> known;  // asking takes microseconds
  const std::tuple key{kernel, launch.device, threads, shared};
  if (const auto found = known.find(key); found != known.end()) return found->second;
  int most = 0, blocks = 0;
  if (!launch.works(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, launch.device))) return 0;
  most -= 1024;  // for static shared memory
  // The first call for a kernel loads it, which can fail now and work the next time: no failure is kept.
  if (shared <= most &&
      !(launch.works(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) &&
        launch.works(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, size_t(shared)))))
    return 0;
  return known[key] = blocks;
}

template <class Args>
cudaError_t enqueue(void (*kernel)(Args), dim3 blocks, dim3 block, int64_t shared, cudaStream_t stream,
                    const Args& args) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = block;
  config.dynamicSmemBytes = size_t(shared);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <class A, class TheArgs>
void launch_kernel(const Launch<A>& launch, void (*kernel)(TheArgs), dim3 blocks, dim3 block, int64_t shared,
                   const TheArgs& args) {
  if (!launch.dry && launch.works(cudaSuccess))
    launch.works(enqueue(kernel, blocks, block, shared, launch.stream, args));
}

// As many blocks as the device runs at a time; 0 where it can run none, or after an error.
template <class A, class TheArgs>
int64_t most_blocks(const Launch<A>& launch, void (*kernel)(TheArgs), dim3 block, int64_t shared) {
  if (!launch.works(cudaSuccess)) return 0;
  const int resident = resident_blocks(launch, reinterpret_cast<const void*>(kernel), block.x * block.y, shared);
  const int64_t blocks = int64_t(resident) * launch.processors;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// `blocks` of them share out what there is to do.
template <class A, class TheArgs>
void launch_blocks(const Launch<A>& launch, void (*kernel)(TheArgs), const TheArgs& args, dim3 block, int64_t shared,
                   int64_t blocks) {
  *launch.blocks = blocks;
  launch_kernel(launch, kernel, dim3(unsigned(blocks)), block, shared, args);
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

// From a launch's description to a list of kernels: what the planning of every algorithm uses.
#pragma once

#include <algorithm>
#include <map>
#include <tuple>

#include "args.h"

namespace selfreg {

constexpr int64_t kMaxBlocks = 4096;
constexpr int kEnoughWarps = 8;  // of a multiprocessor, to hide what its memory takes

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

// The partial sums of every loss, [(T + 1) N, blocks] of double: where in the workspace, of how many blocks.
struct Partials {
  int64_t begin = 0, blocks = 0;
};

// A plan in the making. After the first error nothing is asked any more: what follows would hide it.
struct Planner {
  int device, processors;
  Plan& plan;
  cudaError_t error = cudaSuccess;

  bool works(cudaError_t result) {
    if (error == cudaSuccess) error = result;
    return error == cudaSuccess;
  }

  // Room in the workspace: where it begins, in bytes.
  int64_t take(int64_t bytes) {
    const int64_t begin = plan.bytes;
    plan.bytes += (bytes + 15) / 16 * 16;
    return begin;
  }

  // The blocks of a kernel that a multiprocessor runs at a time; 0 where they need more shared memory than there is, or
  // after an error.
  int resident_blocks(const void* kernel, int threads, int64_t shared) {
    if (error != cudaSuccess) return 0;
    thread_local std::map<std::tuple<const void*, int, int, int64_t>, int> known;  // asking takes microseconds
    const std::tuple key{kernel, device, threads, shared};
    if (const auto found = known.find(key); found != known.end()) return found->second;
    int most = 0, blocks = 0;
    if (!works(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device))) return 0;
    most -= 1024;  // for static shared memory
    // The first call for a kernel loads it, which can fail now and work the next time: no failure is kept.
    if (shared <= most &&
        !(works(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most)) &&
          works(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, size_t(shared)))))
      return 0;
    return known[key] = blocks;
  }
  template <class TheArgs>
  int resident_warps(void (*kernel)(TheArgs), dim3 block, int64_t shared) {
    const int threads = int(block.x * block.y);
    return resident_blocks(reinterpret_cast<const void*>(kernel), threads, shared) * ((threads + 31) / 32);
  }
  // As many blocks as the device runs at a time.
  int64_t most_blocks(int warps, dim3 block) const {
    return std::min<int64_t>(int64_t(warps / int((block.x * block.y + 31) / 32)) * processors, kMaxBlocks);
  }

  template <class A>
  Partials take_partials(const Args<A>& args, int64_t blocks) {
    return {take(int64_t(sizeof(double)) * (args.T + 1) * args.N * blocks), blocks};
  }

  // The plan's next kernel. `place` gets its arguments and the workspace, and puts pointers into it in their place.
  template <class TheArgs, class Place>
  void add(void (*kernel)(TheArgs), dim3 blocks, dim3 block, int64_t shared, const TheArgs& args, Place place) {
    plan.steps.push_back([=](char* workspace, cudaStream_t stream) {
      TheArgs placed = args;
      place(placed, workspace);
      return enqueue(kernel, blocks, block, shared, stream, placed);
    });
  }
};

template <class T>
T* placed(char* workspace, int64_t begin) {
  return reinterpret_cast<T*>(workspace + begin);
}

// What every algorithm is asked for, and what it plans: the kernels of phases 1 and 2.
template <class A>
struct Request {
  Args<A> args;
  bool resized;          // some exits are of another size than the output
  bool channels_near;    // a pixel's channels are less than 2^32 numbers apart
  Layout layout;         // planes, lanes, or staged where lanes may also be staged
  int vector;            // so many neighbours, a power of 2, can be one access
  int64_t norm, counts;  // where in the workspace; `counts` is negative where there are none
};

struct Planned {
  Partials main, combined;  // of the main kernel, and of the one that combines the copies of small exits
};

// Puts what all kernels of phases 1 and 2 have in the workspace in its place.
template <class A>
void place_sums(Args<A>& args, const Request<A>& request, const Partials& partials, char* workspace) {
  args.norm = placed<double>(workspace, request.norm);
  args.partial = placed<double>(workspace, partials.begin);
  if (request.counts >= 0) args.counts = placed<double>(workspace, request.counts);
}

// Phases 1 and 2 for exits of type S: exit_loss.cu.
template <class S, class A>
Planned plan_exit_loss(Planner& planner, const Request<A>& request);

// Cuts an output for `blocks` blocks, so that they end together: the time is that of the rows of the block with the
// most, and some for each band. Short bands have large copies, for all share rows with their neighbours.
inline Cut cut_output(const int64_t (&size)[3], int64_t columns, int64_t tile_rows, int64_t blocks) {
  constexpr int64_t kShortest = 16, kSetup = 4;
  auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const int64_t B = size[0], H = size[1], W = size[2], strips = parts(W, columns), walks = B * strips;
  int64_t best = 1, least = INT64_MAX;
  for (int64_t n = 1; n <= parts(H, kShortest) && (n - 1) * walks < 4 * blocks; ++n) {
    const int64_t time = parts(walks * n, blocks) * (parts(H, n) + kSetup);
    if (time < least) least = time, best = n;
  }
  const int64_t rows = parts(parts(H, best), tile_rows) * tile_rows;
  return {H, W, int32_t(rows), int32_t(columns), int32_t(parts(H, rows)), int32_t(strips)};
}

}  // namespace selfreg

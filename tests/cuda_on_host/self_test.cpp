// Proves the engine: kernels that are right and must pass, and kernels that are wrong and must not; the argument says
// which. See test_cuda_on_host.py.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                                \
    }                                                                         \
  } while (0)

namespace {

template <class... Parameters, class... Arguments>
cudaError_t Run(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// ---- kernels that are right -------------------------------------------------------------------------------------

__device__ double WarpSum(double x) {
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

__global__ void __launch_bounds__(1024) SumBlocks(const float* from, int64_t n, double* to) {
  SELFREG_DYNAMIC_SHARED(bytes);
  double* const sums = reinterpret_cast<double*>(bytes);
  __shared__ double total;
  const int warp = threadIdx.x / warpSize, lane = threadIdx.x % warpSize, warps = blockDim.x / warpSize;
  double sum = 0;
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += __ldg(from + i);
  sum = WarpSum(sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = WarpSum(lane < warps ? sums[lane] : 0);
    if (lane == 0) total = sum;
  }
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) to[blockIdx.x] = total;
}

void TestSums() {
  const std::vector<float> from(10000, 0.5f);
  for (unsigned threads : {32u, 96u, 1024u}) {
    std::vector<double> to(7);
    CHECK(Run(7, threads, threads / 32 * sizeof(double), SumBlocks, from.data(), int64_t(from.size()), to.data()) ==
          cudaSuccess);
    double sum = 0;
    for (double x : to) sum += x;
    CHECK(sum == 5000);
  }
}

__global__ void WriteIndices(uint4* to) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  if (threadIdx.y == 1) __syncwarp();  // whoever does not come has returned
  __stcs(to + i, make_uint4(threadIdx.x, threadIdx.z, blockIdx.y, blockIdx.z));
}

void TestIndices() {
  const dim3 grid(2, 3, 4), block(5, 2, 3);
  std::vector<uint4> to(24 * 30);
  CHECK(Run(grid, block, 0, WriteIndices, to.data()) == cudaSuccess);
  for (unsigned i = 0; i < to.size(); ++i) {
    CHECK(to[i].x == i % 5 && to[i].y == i % 30 / 10);
    CHECK(to[i].z == i / 30 / 2 % 3 && to[i].w == i / 30 / 6);
  }
}

__global__ void MeetInWarp(int* wrong) {
  SELFREG_DYNAMIC_SHARED(bytes);
  const int lane = threadIdx.x % warpSize;
  int* const shared = reinterpret_cast<int*>(bytes) + threadIdx.x - lane;
  bool good = shared[lane] == -1;  // all bits set
  __syncwarp();
  shared[lane] = lane;
  __syncwarp();
  good = good && shared[31 - lane] == 31 - lane;
  good = good && __shfl_sync(~0u, lane, 35) == 3 && __shfl_sync(~0u, float(lane), 1, 8) == lane / 8 * 8 + 1;
  good = good && __shfl_down_sync(~0u, lane, 5) == (lane + 5 < 32 ? lane + 5 : lane);
  good = good && __shfl_down_sync(~0u, lane, 1, 4) == (lane % 4 == 3 ? lane : lane + 1);
  good = good && __shfl_xor_sync(~0u, double(lane), 3, 16) == (lane ^ 3);
  good = good && __ballot_sync(~0u, lane < 4) == 0xf && __any_sync(~0u, lane == 7) && !__all_sync(~0u, lane == 7);
  if (lane % 2) {  // each half on its own
    good = good && __ballot_sync(0xaaaaaaaau, 1) == 0xaaaaaaaau && __all_sync(0xaaaaaaaau, lane > 0);
  } else {
    good = good && __shfl_xor_sync(0x55555555u, lane, 2) == (lane ^ 2);
    if (lane == 0) return;
    good = good && __shfl_sync(0x55555555u, lane, 0) == -1;  // of a lane that has returned: undefined, not a number
  }
  if (!good) *wrong = 1;
}

void TestWarps() {
  int wrong = 0;
  CHECK(Run(1, 64, 64 * sizeof(int), MeetInWarp, &wrong) == cudaSuccess);
  CHECK(!wrong);
}

// Every number there and back, and what lies around the middle of every two neighbours.
template <class Number>
void TestRounding(unsigned infinity, float (*to_float)(Number), Number (*from_float)(float)) {
  auto rounded = [&](float x) { return unsigned(from_float(x).bits); };
  for (unsigned bits = 0; bits < infinity; ++bits) {
    const float x = to_float({uint16_t(bits)});
    const float next = bits + 1 == infinity ? 2 * to_float({uint16_t(bits)}) - to_float({uint16_t(bits - 1)})
                                            : to_float({uint16_t(bits + 1)});
    const float middle = float((double(x) + double(next)) / 2);
    CHECK(x < next || bits + 1 == infinity);
    for (float sign : {1.0f, -1.0f}) {
      const unsigned s = sign < 0 ? 0x8000 : 0;
      CHECK(to_float({uint16_t(s | bits)}) == sign * x && rounded(sign * x) == (s | bits));
      if (bits + 1 == infinity && !(middle < INFINITY)) continue;
      CHECK(rounded(sign * middle) == (s | (bits + bits % 2)));
      CHECK(rounded(sign * nextafterf(middle, 0)) == (s | bits) || middle == nextafterf(0, 1));
      CHECK(rounded(sign * nextafterf(middle, INFINITY)) == (s | (bits + 1)));
    }
  }
  CHECK(to_float({uint16_t(infinity)}) == INFINITY && rounded(INFINITY) == infinity && rounded(3.4e38f) == infinity);
  CHECK(rounded(-INFINITY) == (infinity | 0x8000) && rounded(NAN) == 0x7fff);
  for (unsigned bits = infinity + 1; bits < 0x8000; ++bits) CHECK(isnan(to_float({uint16_t(bits)})));
}

void TestNumbers() {
  TestRounding<__half>(0x7c00, __half2float, __float2half_rn);
  TestRounding<__nv_bfloat16>(0x7f80, __bfloat162float, __float2bfloat16_rn);
  CHECK(__half2float({0x3c00}) == 1 && __half2float({0x0001}) == 0x1p-24f && __half2float({0x7bff}) == 65504);
  CHECK(__bfloat162float({0x3f80}) == 1);
  const float2 h = __half22float2(__floats2half2_rn(1, 2)), b = __bfloat1622float2(__floats2bfloat162_rn(3, 4));
  CHECK(h.x == 1 && h.y == 2 && b.x == 3 && b.y == 4);
  CHECK(min(1, 2u) == 1 && max(1.5f, 2) == 2 && max(NAN, 1.0f) == 1 && min(1.0, double(NAN)) == 1);
  CHECK(rsqrtf(4) == 0.5f && __log2f(8) == 3 && __fdividef(1, 4) == 0.25f && __frcp_rn(2) == 0.5f);
  CHECK(__float_as_int(1) == 0x3f800000 && __uint_as_float(0x40000000) == 2 && __int_as_float(0) == 0);
}

__global__ void Nothing() {}
__global__ void NothingMuch() { __syncthreads(); }

void TestLaunches() {
  int value = 0, blocks = 0;
  CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess && value == 232448);
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, Nothing, 32, 0) == cudaSuccess && blocks == 2);
  CHECK(Run(0, 32, 0, Nothing) == cudaErrorInvalidConfiguration);
  CHECK(Run(1, 1025, 0, Nothing) == cudaErrorInvalidConfiguration);
  CHECK(Run(1, 32, value, Nothing) == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess);
  CHECK(cudaFuncSetAttribute(NothingMuch, cudaFuncAttributeMaxDynamicSharedMemorySize, value) == cudaSuccess);
  CHECK(Run(1, 32, value, NothingMuch) == cudaSuccess);
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) threads.emplace_back(TestSums);
  for (std::thread& thread : threads) thread.join();
}

// ---- kernels that are wrong -------------------------------------------------------------------------------------

// The neighbour's number, without a barrier before it is read.
__global__ void RaceInBlock(int* to) {
  SELFREG_DYNAMIC_SHARED(bytes);
  int* const shared = reinterpret_cast<int*>(bytes);
  shared[threadIdx.x] = threadIdx.x;
  to[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// As above, in static shared memory, and with a shuffle, which orders no memory.
__global__ void RaceInWarp(int* to) {
  __shared__ int shared[32];
  shared[threadIdx.x] = threadIdx.x;
  __shfl_xor_sync(~0u, 0, 1);
  to[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// Threads run ahead from one barrier to the next: what lies between is not in order.
__global__ void RaceBetweenBarriers(int* to) {
  __syncthreads();
  if (threadIdx.x == 0) *to = 1;
  if (threadIdx.x == 40) *to = 2;
  __syncthreads();
}

__global__ void RaceOfBlocks(int* to) {
  if (threadIdx.x == 0) *to = blockIdx.x;
}

__global__ void Overrun(int* to) {
  SELFREG_DYNAMIC_SHARED(bytes);
  reinterpret_cast<int*>(bytes)[threadIdx.x + 1] = 1;
  *to = bytes[0];
}

__global__ void OverrunStatic(int* to) {
  __shared__ int shared[8];
  int* p = shared;
  p[threadIdx.x] = 1;
  *to = p[0];
}

__global__ void Misaligned(int* to) { *to = __ldg(reinterpret_cast<const int2*>(to + 1)).x; }

__global__ void DivergentBarrier(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void BarrierOfSome(int*) {
  if (threadIdx.x != 5) __syncthreads();
  __syncwarp();
}

__global__ void WrongMask(int*) { __syncwarp(0xfffffffe); }

__global__ void DifferentMasks(int*) { __shfl_sync(threadIdx.x % 2 ? ~0u : 0x7fffffffu, 1.0f, 0); }

const struct {
  const char* name;
  void (*kernel)(int*);
  unsigned blocks, threads;
} kWrong[] = {{"race_in_block", RaceInBlock, 1, 64},
              {"race_in_warp", RaceInWarp, 1, 32},
              {"race_between_barriers", RaceBetweenBarriers, 1, 64},
              {"race_of_blocks", RaceOfBlocks, 2, 32},
              {"overrun", Overrun, 1, 64},
              {"overrun_static", OverrunStatic, 1, 64},
              {"misaligned", Misaligned, 1, 32},
              {"divergent_barrier", DivergentBarrier, 1, 64},
              {"barrier_of_some", BarrierOfSome, 1, 64},
              {"wrong_mask", WrongMask, 1, 32},
              {"different_masks", DifferentMasks, 1, 32}};

}  // namespace

// Also for a process that has loaded this file as a library.
extern "C" __attribute__((visibility("default"))) void self_test() {
  TestSums();
  TestIndices();
  TestWarps();
  TestNumbers();
  TestLaunches();
}

int main(int count, char** arguments) {
  const std::string name = count == 2 ? arguments[1] : "";
  if (name == "good") {
    self_test();
    return 0;
  }
  for (const auto& wrong : kWrong) {
    if (name != wrong.name) continue;
    alignas(8) int to[64] = {};
    CHECK(Run(wrong.blocks, wrong.threads, wrong.threads * sizeof(int), wrong.kernel, to) == cudaSuccess);
    return 0;
  }
  return 2;
}

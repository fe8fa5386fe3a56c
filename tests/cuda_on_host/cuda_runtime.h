// Stands in for CUDA's header of this name where kernels are compiled by g++ to run on the CPU: see cuda_on_host.h.
#pragma once

// <memory> before the macros: libstdc++ has __noinline__ inside of attributes.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_on_host.h"

// ---- language ---------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static CUDA_ON_HOST_PER_WORKER
#define SELFREG_DYNAMIC_SHARED(name) unsigned char* const name = ::cuda_on_host::DynamicShared()

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern CUDA_ON_HOST_PER_WORKER uint3 threadIdx, blockIdx;
extern CUDA_ON_HOST_PER_WORKER dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- threads that meet ------------------------------------------------------------------------------------------

namespace cuda_on_host {

template <class T>
T ShuffleFrom(const char* function, unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles words of 4 or 8 bytes");
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  word = MeetLanes(Meeting::kShuffle, function, mask, word, source, site);
  memcpy(&value, &word, sizeof(T));
  return value;
}

inline unsigned Vote(const char* function, unsigned mask, bool value, Site site) {
  return unsigned(MeetLanes(Meeting::kVote, function, mask, value, 0, site));
}

}  // namespace cuda_on_host

inline void __syncthreads(cuda_on_host::Site site = cuda_on_host::Site::Here()) { cuda_on_host::SyncThreads(site); }

inline int __syncthreads_or(int value, cuda_on_host::Site site = cuda_on_host::Site::Here()) {
  return cuda_on_host::SyncThreads(site, value != 0);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_on_host::Site site = cuda_on_host::Site::Here()) {
  cuda_on_host::MeetLanes(cuda_on_host::Meeting::kSync, "__syncwarp", mask, 0, 0, site);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              cuda_on_host::Site site = cuda_on_host::Site::Here()) {
  const unsigned first = cuda_on_host::LaneId() & ~unsigned(width - 1);
  return cuda_on_host::ShuffleFrom("__shfl_sync", mask, value, first | (source & (width - 1)), site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   cuda_on_host::Site site = cuda_on_host::Site::Here()) {
  const unsigned lane = cuda_on_host::LaneId(), last = lane | unsigned(width - 1);
  return cuda_on_host::ShuffleFrom("__shfl_down_sync", mask, value, lane + delta > last ? lane : lane + delta, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  cuda_on_host::Site site = cuda_on_host::Site::Here()) {
  const unsigned lane = cuda_on_host::LaneId(), last = lane | unsigned(width - 1), source = lane ^ lane_mask;
  return cuda_on_host::ShuffleFrom("__shfl_xor_sync", mask, value, source > last ? lane : source, site);
}

inline unsigned __ballot_sync(unsigned mask, int value, cuda_on_host::Site site = cuda_on_host::Site::Here()) {
  return cuda_on_host::Vote("__ballot_sync", mask, value != 0, site);
}
inline int __any_sync(unsigned mask, int value, cuda_on_host::Site site = cuda_on_host::Site::Here()) {
  return cuda_on_host::Vote("__any_sync", mask, value != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int value, cuda_on_host::Site site = cuda_on_host::Site::Here()) {
  return cuda_on_host::Vote("__all_sync", mask, value == 0, site) == 0;
}

// ---- memory: a GPU faults where a word is not aligned to its size -----------------------------------------------

namespace cuda_on_host {

template <class T>
T* Aligned(T* p, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T) != 0) Fail("misaligned address", site);
  return p;
}

}  // namespace cuda_on_host

#define CUDA_ON_HOST_LOAD(name)                                              \
  template <class T>                                                         \
  T name(const T* p, cuda_on_host::Site site = cuda_on_host::Site::Here()) { \
    return *cuda_on_host::Aligned(p, site);                                  \
  }
#define CUDA_ON_HOST_STORE(name)                                                                       \
  template <class T>                                                                                   \
  void name(T* p, std::common_type_t<T> value, cuda_on_host::Site site = cuda_on_host::Site::Here()) { \
    *cuda_on_host::Aligned(p, site) = value;                                                           \
  }
CUDA_ON_HOST_LOAD(__ldg)
CUDA_ON_HOST_LOAD(__ldcs)
CUDA_ON_HOST_LOAD(__ldcg)
CUDA_ON_HOST_STORE(__stcs)
CUDA_ON_HOST_STORE(__stcg)

// ---- math -------------------------------------------------------------------------------------------------------

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __log2f(float x) noexcept { return log2f(x); }  // glibc declares it, and has none

template <class To, class From>
inline To cuda_on_host_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __int_as_float(int x) { return cuda_on_host_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_host_bits<float>(x); }
inline int __float_as_int(float x) { return cuda_on_host_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_host_bits<unsigned>(x); }

// Of two numbers of any types, as CUDA's overloads: the other one where one is NaN.
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(b) < T(a) || T(a) != T(a) ? T(b) : T(a);
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return T(a) < T(b) || T(a) != T(a) ? T(b) : T(a);
}

// ---- launches ---------------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209
};
typedef struct CUstream_st* cudaStream_t;

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_on_host {

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t Return(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// The error with which tests make this function fail: by the environment variable CUDA_ON_HOST_FAILS="FUNCTION ERROR".
inline cudaError_t Injected(const char* function) {
  const char* const wanted = getenv("CUDA_ON_HOST_FAILS");
  const size_t length = strlen(function);
  if (!wanted || strncmp(wanted, function, length) || wanted[length] != ' ') return cudaSuccess;
  return Return(cudaError_t(atoi(wanted + length)));
}

// Dynamic shared memory of a block: what any kernel may take, and what cudaFuncSetAttribute can allow.
constexpr size_t kSharedBytes = 48 << 10;
void AllowSharedBytes(const void* kernel, size_t bytes);

// Calls `thread` as every thread of the grid; returns when all have returned. `parameters` are the kernel's, as a GPU
// gets them.
cudaError_t Launch(const cudaLaunchConfig_t& config, const void* kernel, const void* parameters, size_t bytes,
                   const std::function<void()>& thread);

// What a device is said to have: multiprocessors, the shared memory of a block, at most, and blocks of a kernel that a
// multiprocessor runs at a time.
int Multiprocessors();
int MostSharedBytes();
int ResidentBlocks(const void* kernel, int threads, size_t shared_bytes);

}  // namespace cuda_on_host

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for execution on the device";
  }
  return "unrecognized error code";
}
inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (const cudaError_t error = cuda_on_host::Injected("cudaDeviceGetAttribute")) return error;
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = cuda_on_host::kSharedBytes; break;
    case cudaDevAttrMultiProcessorCount: *value = cuda_on_host::Multiprocessors(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 228 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = cuda_on_host::MostSharedBytes(); break;
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  if (const cudaError_t error = cuda_on_host::Injected("cudaFuncSetAttribute")) return error;
  if (value < 0 || value > cuda_on_host::MostSharedBytes()) return cuda_on_host::Return(cudaErrorInvalidValue);
  cuda_on_host::AllowSharedBytes(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel* kernel, int threads, size_t shared) {
  if (const cudaError_t error = cuda_on_host::Injected("cudaOccupancyMaxActiveBlocksPerMultiprocessor")) return error;
  *blocks = cuda_on_host::ResidentBlocks(reinterpret_cast<const void*>(kernel), threads, shared);
  return cudaSuccess;
}

struct cudaFuncAttributes {};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return cuda_on_host::Injected("cudaFuncGetAttributes");
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  memset(p, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  if (const cudaError_t error = cuda_on_host::Injected("cudaLaunchKernelEx")) return error;
  const std::tuple<Parameters...> parameters(std::forward<Arguments>(given)...);
  return cuda_on_host::Return(cuda_on_host::Launch(*config, reinterpret_cast<const void*>(kernel), &parameters,
                                                   sizeof(parameters), [&] { std::apply(kernel, parameters); }));
}

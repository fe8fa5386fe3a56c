// What kernels are written with: numbers as they lie in memory, the device's exponential, logarithm and quotient, sums
// over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "../pixel_math.h"

namespace selfreg {

#define SELFREG_DEVICE __device__ __forceinline__
#ifndef SELFREG_DYNAMIC_SHARED
#define SELFREG_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// ---- arithmetic ------------------------------------------------------------------------------------------------

SELFREG_DEVICE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // 2 units in the last place; 0 at -infinity
  return y;
#else
  return exp2f(x);
#endif
}
SELFREG_DEVICE double exp2_fast(double x) { return ::exp2(x); }

template <class A>
SELFREG_DEVICE A exp2_of(A x, A rate) {
  return exp2_fast(x * rate);
}

// Not the approximate one: near 1 its relative error has no bound, and a confident pixel's loss is such a logarithm.
SELFREG_DEVICE float log2(float x) { return log2f(x); }
SELFREG_DEVICE double log2(double x) { return ::log2(x); }

SELFREG_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }
SELFREG_DEVICE double quotient(double a, double b) { return a / b; }

SELFREG_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // the other one where one is NaN
SELFREG_DEVICE double larger(double a, double b) { return fmax(a, b); }

template <class A>
constexpr A kLowest = sizeof(A) == 4 ? A(-3.402823466e38) : A(-1.7976931348623157e308);

// ---- storage ---------------------------------------------------------------------------------------------------

template <class S>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

SELFREG_DEVICE float to_number(float x) { return x; }
SELFREG_DEVICE double to_number(double x) { return x; }
SELFREG_DEVICE float to_number(__half x) { return __half2float(x); }
SELFREG_DEVICE float to_number(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class S, class A>
SELFREG_DEVICE S to_storage(A x) {
  if constexpr (sizeof(S) == sizeof(A)) {
    return x;
  } else if constexpr (__is_same(S, __half)) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// V numbers that lie side by side, aligned to their size, as one word of memory.
template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class S, int V, class A>
SELFREG_DEVICE void unpack(typename Word<sizeof(S) * V>::type word, A (&to)[V]) {
  S numbers[V];
  memcpy(numbers, &word, sizeof(word));
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = to_number(numbers[v]);
}
template <class S, int V, class A>
SELFREG_DEVICE typename Word<sizeof(S) * V>::type pack(const A (&from)[V]) {
  S numbers[V];
#pragma unroll
  for (int v = 0; v < V; ++v) numbers[v] = to_storage<S>(from[v]);
  typename Word<sizeof(S) * V>::type word;
  memcpy(&word, numbers, sizeof(word));
  return word;
}

// What is read once goes past the L1 cache and is the first to leave the L2; likewise what is written.
template <class S, int V, bool once, class A>
SELFREG_DEVICE void load(const S* p, A (&to)[V]) {
  using W = typename Word<sizeof(S) * V>::type;
  const W* const word = reinterpret_cast<const W*>(p);
  unpack<S, V>(once ? __ldcs(word) : __ldg(word), to);
}
template <class S, int V, class A>
SELFREG_DEVICE void store(S* p, const A (&from)[V]) {
  using W = typename Word<sizeof(S) * V>::type;
  __stcs(reinterpret_cast<W*>(p), pack<S, V>(from));
}

// Likewise in shared memory, as single accesses.
template <int V, class A>
SELFREG_DEVICE void load_shared(const A* p, A (&to)[V]) {
  unpack<A, V>(*reinterpret_cast<const typename Word<sizeof(A) * V>::type*>(p), to);
}
template <int V, class A>
SELFREG_DEVICE void store_shared(A* p, const A (&from)[V]) {
  *reinterpret_cast<typename Word<sizeof(A) * V>::type*>(p) = pack<A, V>(from);
}

// ---- sums over a block, the same at every run ------------------------------------------------------------------

SELFREG_DEVICE double warp_sum(double x) {
#pragma unroll
  for (int other = 16; other; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

// All threads of the block, whole warps, get the sum.
SELFREG_DEVICE double block_sum(double x) {
  __shared__ double parts[32];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, warps = blockDim.x * blockDim.y / 32;
  x = warp_sum(x);
  if (thread % 32 == 0) parts[thread / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll 1
  for (int w = 0; w < warps; ++w) x += parts[w];
  __syncthreads();
  return x;
}

}  // namespace selfreg

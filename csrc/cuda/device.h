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

SELFREG_DEVICE float log2_fast(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // errs by 2^-22, relative to the larger of 1 and the result
  return y;
#else
  return log2f(x);
#endif
}
SELFREG_DEVICE double log2_fast(double x) { return ::log2(x); }

// log Z of a sum Z of exponentials, 1 or more where the largest is 1. A confident pixel's loss is such a logarithm near
// 0, where the fast one has no bound to its relative error: there, a polynomial of Z - 1, good to 1e-7.
SELFREG_DEVICE float log_normalizer(float Z) {
  const float t = Z - 1;
  const float series =
      t * (1 + t * (-0.499997407f + t * (0.33320868f + t * (-0.247786015f + t * (0.181731209f + t * -0.0923835337f)))));
  return t >= 0 && t < 0.25f ? series : log2_fast(Z) * float(kLn2);
}
SELFREG_DEVICE double log_normalizer(double Z) { return ::log(Z); }

SELFREG_DEVICE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // 1 unit in the last place
  return y;
#else
  return 1 / x;
#endif
}
SELFREG_DEVICE double reciprocal(double x) { return 1 / x; }

// k x, and 0 where k is: what x is, be it infinite or NaN, is left out.
template <class A>
SELFREG_DEVICE A product(A k, A x) {
  return k == 0 ? A(0) : k * x;
}

// What the sum of a mean with this divisor is multiplied by: 0 where nothing counts. Of an infinite one NaN: as 0 it
// would leave out what made it so.
SELFREG_DEVICE double norm_of(double divisor) { return divisor == 0 ? 0 : 1 / divisor + (divisor - divisor); }

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
  if constexpr (__is_same(S, __nv_bfloat16) && V > 1) {
    unsigned pairs[V / 2];  // one instruction a number: left to the compiler, it is three for two
    memcpy(pairs, &word, sizeof(word));
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = __uint_as_float(v % 2 ? pairs[v / 2] & 0xffff0000u : pairs[v / 2] << 16);
  } else {
    S numbers[V];
    memcpy(numbers, &word, sizeof(word));
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = to_number(numbers[v]);
  }
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

// Of two pairs of halves, a pair of the larger ones; the other one where one is NaN.
template <class S>
SELFREG_DEVICE unsigned larger_of_pairs(unsigned a, unsigned b) {
#ifdef __CUDA_ARCH__
  unsigned larger;
  if constexpr (__is_same(S, __half)) {
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
  return larger;
#else
  float x[2], y[2];
  unpack<S, 2>(a, x);
  unpack<S, 2>(b, y);
  for (int k = 0; k < 2; ++k) x[k] = larger(x[k], y[k]);
  return pack<S, 2>(x);
#endif
}

// What is read once goes past the L1 cache and is the first to leave the L2; likewise what is written.
template <class S, int V, bool once>
SELFREG_DEVICE typename Word<sizeof(S) * V>::type load(const S* p) {
  const auto* const word = reinterpret_cast<const typename Word<sizeof(S) * V>::type*>(p);
  return once ? __ldcs(word) : __ldg(word);
}
template <class S, int V, class A>
SELFREG_DEVICE void store(S* p, const A (&from)[V]) {
  using W = typename Word<sizeof(S) * V>::type;
  __stcs(reinterpret_cast<W*>(p), pack<S, V>(from));
}

// Likewise in shared memory, as single accesses, of at most 16 bytes each.
template <int V, class A>
SELFREG_DEVICE void load_shared(const A* p, A (&to)[V]) {
  constexpr int n = sizeof(A) * V > 16 ? V / 2 : V;
#pragma unroll
  for (int v = 0; v < V; v += n) {
    unpack<A, n>(*reinterpret_cast<const typename Word<sizeof(A) * n>::type*>(p + v), reinterpret_cast<A(&)[n]>(to[v]));
  }
}
// (In CUDA's words and not in C++'s, of which the compiler makes four stores, where the numbers lie in four places.)
template <int V>
SELFREG_DEVICE void store_shared(float* p, const float (&from)[V]) {
  static_assert(V == 1 || V == 2 || V == 4);
#ifdef __CUDA_ARCH__
  const unsigned to = unsigned(__cvta_generic_to_shared(p));
  if constexpr (V == 4) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(from[0]), "f"(from[1]), "f"(from[2]),
                 "f"(from[3])
                 : "memory");
  } else if constexpr (V == 2) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(from[0]), "f"(from[1]) : "memory");
  } else {
    *p = from[0];
  }
#else
  memcpy(p, from, sizeof from);
#endif
}
template <int V>
SELFREG_DEVICE void store_shared(double* p, const double (&from)[V]) {
  if constexpr (V == 1) {
    *p = from[0];
  } else {
#pragma unroll
    for (int v = 0; v < V; v += 2) *reinterpret_cast<double2*>(p + v) = make_double2(from[v], from[v + 1]);
  }
}

// x, of which the compiler does not know where from. Of a pointer it would else make each of p + step, p + 2 step, ...
// anew; and what it computed from a number it would keep for the next time.
template <class T>
SELFREG_DEVICE T* opaque(T* x) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(x));
#endif
  return x;
}
SELFREG_DEVICE float opaque(float x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(x));
#endif
  return x;
}

// An address in shared memory that the compiler keeps in a register: by itself it derives it anew for every use.
template <class T>
SELFREG_DEVICE T* kept_shared(T* p) {
#ifdef __CUDA_ARCH__
  unsigned address = unsigned(__cvta_generic_to_shared(p));
  asm volatile("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
#else
  return p;
#endif
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

// Vectors of pixels: GCC/Clang vector extensions as wide as the instruction set this file is compiled for, with the
// few functions that pixel_math.h and the loops over blocks need. Everything is in the includer's anonymous namespace
// scope: no symbol of one instruction set can be linked into the code of another.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define SELFREG_ALWAYS inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVecBytes)));
typedef double VecD __attribute__((vector_size(kVecBytes)));
typedef double VecDD __attribute__((vector_size(2 * kVecBytes)));  // as many as VecF has
typedef int32_t VecI __attribute__((vector_size(kVecBytes)));
typedef int64_t VecL __attribute__((vector_size(kVecBytes)));
typedef float HalfF __attribute__((vector_size(kVecBytes / 2)));
typedef double HalfD __attribute__((vector_size(kVecBytes / 2)));
typedef int32_t HalfI __attribute__((vector_size(kVecBytes / 2)));
typedef int64_t HalfL __attribute__((vector_size(kVecBytes / 2)));

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  using V = VecF;
  using Int = int32_t;
  using VInt = VecI;
  using Half = HalfF;
  using HalfInt = HalfI;
  using Sums = VecDD;
};
template <>
struct VecOf<double> {
  using V = VecD;
  using Int = int64_t;
  using VInt = VecL;
  using Half = HalfD;
  using HalfInt = HalfL;
  using Sums = VecD;
};

template <class V, class A>
SELFREG_ALWAYS V load(const A* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class A>
SELFREG_ALWAYS void store(A* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <class V, class A>
SELFREG_ALWAYS V fill(A x) {
  return V{} + x;
}

// a > b ? a : b, so b where either is NaN: the machine's own maximum, which compilers do not see in that expression.
SELFREG_ALWAYS VecF larger(VecF a, VecF b) {
#if defined(__AVX512F__)
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (VecF)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
SELFREG_ALWAYS VecD larger(VecD a, VecD b) { return a > b ? a : b; }

// c - a * b, rounded once wherever the processor can, and not as the compiler likes: the same in every copy of a loop.
#if defined(__AVX512F__)
SELFREG_ALWAYS VecF less_product(VecF c, VecF a, VecF b) {
  return (VecF)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
SELFREG_ALWAYS VecD less_product(VecD c, VecD a, VecD b) {
  return (VecD)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(__AVX2__)
SELFREG_ALWAYS VecF less_product(VecF c, VecF a, VecF b) {
  return (VecF)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
SELFREG_ALWAYS VecD less_product(VecD c, VecD a, VecD b) {
  return (VecD)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
template <class V>
SELFREG_ALWAYS V less_product(V c, V a, V b) {
  return c - a * b;
}
#endif

// 2^f for f in [-1/2, 1/2], relative error 9e-8.
SELFREG_ALWAYS VecF exp2_of_fraction(VecF f) {
  VecF p = f * 1.3264727e-3f + 9.6715127e-3f;
  p = p * f + 5.5507337e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314698e-1f;
  return p * f + 1.f;
}

// 2^(x * rate) for rate > 0 and x * rate <= 127; 0 below -126.5 (so also at -inf), NaN for NaN, exactly 1 at 0,
// relative error 9e-8. The sum with 1.5 * 2^23 + 127 rounds to an integer n + 127 in the low bits, the exponent of 2^n.
SELFREG_ALWAYS VecF exp2_of(VecF x, float rate) {
  const float magic = 12582912.f + 127;
  x = larger(fill<VecF>(-127.f / rate), x);
  const VecF rounded = x * rate + magic, n = rounded - magic, f = x * rate - n;
  const VecF p = exp2_of_fraction(f);
  const VecI power = (VecI)rounded << 23;  // casts between vectors keep the bits
  return p * (VecF)power;
}

// 2^x for finite x <= 0, likewise; what is smaller than the smallest normal number may be that or 0.
SELFREG_ALWAYS VecF exp2_below_1(VecF x) {
#if defined(__AVX512F__)
  x = larger(fill<VecF>(-126.f), x);
  const VecF n = (VecF)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - n;
  const VecF p = exp2_of_fraction(f);
  return (VecF)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return exp2_of(x, 1.f);
#endif
}

// log2 of a positive normal number, NaN otherwise: the exponent, plus log(1 + f) = 2 artanh(f / (2 + f)) of the
// mantissa in [sqrt(1/2), sqrt(2)), relative error under 1e-7.
SELFREG_ALWAYS VecF log2(VecF x) {
  VecI bits = (VecI)x;
  VecI exponent = (bits - 0x3f3504f3) >> 23;
  VecI mantissa = bits - (exponent << 23);
  VecF f = (VecF)mantissa - 1.f;
  VecF s = f / (f + 2.f), s2 = s * s;
  VecF series = (((s2 * (1.f / 9) + 1.f / 7) * s2 + 1.f / 5) * s2 + 1.f / 3) * s2 + 1.f;
  VecF result = s * series * 2.88539008f + __builtin_convertvector(exponent, VecF);
  return x > 0.f ? result : fill<VecF>(__builtin_nanf(""));
}

// The same in float64, with the Taylor series of 2^f to f^13, relative error 3e-16.
SELFREG_ALWAYS VecD exp2_of(VecD x, double rate) {
  const double magic = 6755399441055744.;  // 1.5 * 2^52
  x = larger(fill<VecD>(-1023. / rate), x);
  const VecD rounded = x * rate + magic, n = rounded - magic, f = (x * rate - n) * 0.69314718055994530942;
  VecD p = fill<VecD>(1.);
  for (int k = 13; k > 0; --k) p = p * f * (1. / k) + 1.;
  const VecL power = ((VecL)rounded + 1023) << 52;
  return p * (VecD)power;
}
SELFREG_ALWAYS VecD exp2_below_1(VecD x) { return exp2_of(x, 1.); }
// Once a pixel, not once an element.
SELFREG_ALWAYS VecD log2(VecD x) {
  for (int k = 0; k < kVecBytes / 8; ++k) x[k] = x[k] > 0 ? __builtin_log2(x[k]) : __builtin_nan("");
  return x;
}

// Numbers by their places: those of v, or of a and b one after the other. Clang has no instruction for it by name.
template <class V, class VInt>
SELFREG_ALWAYS V shuffle(V v, VInt at) {
#if defined(__clang__)
  constexpr int kLanes = sizeof(VInt) / sizeof(at[0]);
  V to;
  for (int j = 0; j < kLanes; ++j) to[j] = v[at[j] & (kLanes - 1)];
  return to;
#else
  return __builtin_shuffle(v, at);
#endif
}
template <class V, class VInt>
SELFREG_ALWAYS V shuffle(V a, V b, VInt at) {
#if defined(__clang__)
  constexpr int kLanes = sizeof(VInt) / sizeof(at[0]);
  V to;
  for (int j = 0; j < kLanes; ++j) to[j] = at[j] & kLanes ? b[at[j] & (kLanes - 1)] : a[at[j] & (kLanes - 1)];
  return to;
#else
  return __builtin_shuffle(a, b, at);
#endif
}

// rows[i][j] <-> rows[j][i], in log2(lanes) rounds of exchanges between pairs of rows.
template <class V, class VInt, int LANES>
SELFREG_ALWAYS void transpose(V (&rows)[LANES]) {
  VInt lane;
  for (int j = 0; j < LANES; ++j) lane[j] = j;
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    const VInt odd = (lane & step) != 0;
    const VInt low = odd ? lane + (LANES - step) : lane;  // a where (j & step) == 0, else b[j - step]
    const VInt high = odd ? lane + LANES : lane + step;   // a[j + step] where (j & step) == 0, else b
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & step) continue;
      const V a = rows[i], b = rows[i + step];
      rows[i] = shuffle(a, b, low);
      rows[i + step] = shuffle(a, b, high);
    }
  }
}

// Past the caches, for a gradient that is larger than they are; p is aligned to the vector.
template <class A, class V>
SELFREG_ALWAYS void stream(A* p, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p, v);
#endif
}
SELFREG_ALWAYS void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace

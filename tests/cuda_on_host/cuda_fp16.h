// Stands in for CUDA's header of this name: half precision as numbers in memory, rounded to the nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half h) {
  const unsigned sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  unsigned bits = magnitude << 13;
  if (magnitude >= 0x7c00) {  // infinity, NaN
    bits += 0x70000000u;
  } else if (magnitude >= 0x0400) {
    bits += 0x38000000u;
  } else {  // subnormal: a multiple of 2^-24
    bits = __float_as_uint(float(magnitude) * 0x1p-24f);
  }
  return __uint_as_float(sign | bits);
}

inline __half __float2half_rn(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  unsigned half;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) {  // 65520: halfway from the largest number to the next power of 2
    half = 0x7c00;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  } else {  // subnormal: floats from 0.5 to 1 are multiples of 2^-24
    half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
  }
  return {uint16_t(sign | half)};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }

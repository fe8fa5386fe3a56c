// Numbers as they lie in memory, and their conversion to and from those that are computed with. Like vec.h, all of it
// is in an anonymous namespace.
#pragma once

#include <stdint.h>
#include <string.h>

#include "vec.h"

namespace {

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

SELFREG_ALWAYS float from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
SELFREG_ALWAYS uint32_t to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

SELFREG_ALWAYS void convert(float& to, float from) { to = from; }
SELFREG_ALWAYS void convert(double& to, double from) { to = from; }
SELFREG_ALWAYS void convert(float& to, BFloat from) { to = from_bits(uint32_t(from.bits) << 16); }
SELFREG_ALWAYS void convert(BFloat& to, float from) {
  uint32_t u = to_bits(from);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;  // to nearest even
  to.bits = uint16_t(from == from ? rounded : 0x7fc0);
}
// Exponents by a multiplication with 2^112, which also makes subnormals right; infinity and NaN keep theirs.
SELFREG_ALWAYS void convert(float& to, Half from) {
  uint32_t magnitude = from.bits & 0x7fffu;
  uint32_t u = to_bits(from_bits(magnitude << 13) * 0x1p112f);
  u |= magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  to = from_bits(u | uint32_t(from.bits & 0x8000u) << 16);
}
// Subnormal results are rounded by adding 1/2, the others in integers; to nearest even.
SELFREG_ALWAYS void convert(Half& to, float from) {
  uint32_t u = to_bits(from), magnitude = u & 0x7fffffffu;
  uint32_t small = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  uint32_t h = magnitude < 0x38800000u ? small : normal;
  h = magnitude >= 0x47800000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  to.bits = uint16_t(h | (u >> 16 & 0x8000u));
}

// n numbers side by side.
template <class To, class From>
SELFREG_ALWAYS void convert(To* to, const From* from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) convert(to[i], from[i]);
}
#if defined(__F16C__)  // the processor's own conversions
SELFREG_ALWAYS void convert(float* to, const Half* from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  for (; i < n; ++i) convert(to[i], from[i]);
}
SELFREG_ALWAYS void convert(Half* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) convert(to[i], from[i]);
}
#endif

}  // namespace

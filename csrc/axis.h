// Where an output row or column lies on an exit of another size. Host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SELFREG_AXIS __host__ __device__ __forceinline__
#else
#define SELFREG_AXIS inline
#endif

namespace selfreg {

// Rarely more than 32 bits, in which a GPU divides several times as fast.
SELFREG_AXIS int64_t quotient(int64_t n, int64_t d) {
  return ((n | d) >> 32) == 0 ? int64_t(unsigned(n) / unsigned(d)) : n / d;
}

// One dimension of an exit, of `from` positions, which are resized to `to`. Bilinear as in F.interpolate, but in whole
// numbers: position o is at numerator(o) / denominator(), exactly. It lies between low(o) and high(o), which is
// low(o) + 1, also at and beyond the last position: so a pair is always there to be read, unless `from` is 1. Where
// `from` is the larger, some positions of the exit may lie under none of the output.
struct Axis {
  int64_t from, to;
  bool align_corners;

  SELFREG_AXIS int64_t denominator() const { return !align_corners ? 2 * to : to > 1 ? to - 1 : 1; }
  SELFREG_AXIS int64_t numerator(int64_t o) const {
    if (align_corners) return o * (from - 1);
    const int64_t n = (2 * o + 1) * from - to;
    return n > 0 ? n : 0;
  }
  SELFREG_AXIS int64_t low(int64_t o) const {
    if (from == 1) return 0;
    const int64_t l = quotient(numerator(o), denominator());
    return l < from - 2 ? l : from - 2;
  }
  SELFREG_AXIS int64_t high(int64_t o) const { return from == 1 ? 0 : low(o) + 1; }
  // Of high(o); 0 where it is low(o).
  template <class A>
  SELFREG_AXIS A weight(int64_t o, int64_t low) const {
    const int64_t n = numerator(o) - low * denominator();
    return from == 1 ? A(0) : n < denominator() ? A(n) / A(denominator()) : A(1);
  }
  // The first position o with low(o) >= l; `to` where there is none.
  SELFREG_AXIS int64_t first(int64_t l) const {
    if (l <= 0) return 0;
    if (l >= from - 1) return to;
    const int64_t d = align_corners ? from - 1 : 2 * from;
    const int64_t o = quotient((align_corners ? l * denominator() : (2 * l + 1) * to - from) + d - 1, d);
    return o < to ? o : to;
  }
  // The most positions of the exit that `count` consecutive ones of the output lie between.
  SELFREG_AXIS int64_t most(int64_t count) const {
    const int64_t spanned = quotient((count - 1) * (align_corners ? from - 1 : 2 * from), denominator()) + 3;
    return spanned < from ? spanned : from;
  }
};

}  // namespace selfreg

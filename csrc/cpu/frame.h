// Where a worker of exit_loss.cpp is, and what all of its parts know.
#pragma once

#include <string.h>

#include "cpu.h"
#include "memory.h"
#include "vec.h"  // before pixel_math.h, whose templates call its exp2_of and log2

#include "../pixel_math.h"

namespace {

using namespace selfreg;

template <class A>
struct Frame {
  using V = typename VecOf<A>::V;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const ExitLoss& L;
  const Plan& plan;
  int C;
  A smoothing, class_w_sum;  // what label smoothing gives to a class of weight 1; the sum of the weights
  int64_t blocks, pitch;     // vectors of a row of the output; numbers from a column of a sum to the next
  int64_t apart;             // in a block, vectors from a channel to the next: as many as a block may have rows
  int64_t image, band;
  int64_t y0, y1;  // the band: output rows [y0, y1)
  int64_t top;     // the tile's first row
  int rows;        // how many it has

  Frame(const ExitLoss& launch, const Plan& plan) : L(launch), plan(plan), C(int(launch.C)) {
    smoothing = L.labels ? A(L.label_smoothing / C) : A(0);
    class_w_sum = 0;
    for (int c = 0; smoothing != 0 && c < C; ++c) class_w_sum += class_weight(c);
    blocks = (plan.width + kLanes - 1) / kLanes;
    apart = plan.tile_rows;
    constexpr int64_t kHalf = kLanes / 2;
    pitch = (C + kHalf - 1) / kHalf * kHalf;
  }
  // The first exit of e's size.
  int first_of_size(int e) const {
    int first = 0;
    while (L.exits[first].H != L.exits[e].H || L.exits[first].W != L.exits[e].W) ++first;
    return first;
  }
  // Of row r in block b: the number of the first pixel among all, and how many there are.
  int64_t pixel(int r, int64_t b) const { return image * plan.image_pixels + (top + r) * plan.width + b * kLanes; }
  int columns(int r, int64_t b) const {
    const int64_t of_row = plan.width - b * kLanes, of_image = plan.image_pixels - (top + r) * plan.width - b * kLanes;
    const int64_t left = of_row < of_image ? of_row : of_image;
    return int(left < kLanes ? left : kLanes);
  }
  A class_weight(int c) const { return L.class_weight ? static_cast<const A*>(L.class_weight)[c] : A(1); }
};

// A block of an exit at the output's resolution. y = (z - most) unit, in units of ln 2.
template <class A>
struct Logits {
  using V = typename VecOf<A>::V;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  V* block;  // [C, frame.apart] vectors of pixels, if z is not read where it lies in the exit
  const A* z;
  int64_t channel;    // numbers from a channel to the next
  V most[kMostRows];  // of the channels of a pixel
  A unit;
  void is_in_block(int64_t apart) { z = reinterpret_cast<const A*>(block), channel = apart * kLanes; }
  SELFREG_ALWAYS V operator()(int c, int r) const { return load<V>(z + c * channel + r * kLanes); }
};

// Rows [begin, end) of a tile lie between rows `low` and low + 1 of an exit; `both`: some of them on the latter, too.
struct Span {
  int begin, end;
  int64_t low;
  bool both;
};

template <int n>
struct Number {
  static constexpr int value = n;
};
// A span's rows in groups, whose sums stay in registers.
template <class F>
SELFREG_ALWAYS void over_groups(const Span& span, F f) {
  int r = span.begin;
  for (; r + 8 <= span.end; r += 8) f(Number<8>{}, r);
  if (r + 4 <= span.end) f(Number<4>{}, r), r += 4;
  if (r + 2 <= span.end) f(Number<2>{}, r), r += 2;
  if (r < span.end) f(Number<1>{}, r);
}

template <class VInt>
SELFREG_ALWAYS bool any(VInt x) {
  uint64_t words[kVecBytes / 8], some = 0;
  memcpy(words, &x, kVecBytes);
  for (uint64_t word : words) some |= word;
  return some != 0;
}

}  // namespace

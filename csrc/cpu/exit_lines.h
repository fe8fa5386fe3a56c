// A resized exit's rows under a tile, less their maxima over channels, and y of a block that lies on them.
#pragma once

#include "exit_sums.h"
#include "frame.h"
#include "storage.h"

namespace {

// In units of ln 2, in a ring. Channels of a row lie apart, columns together. (For an argmax, logits as they are: ties
// stay ties.)
template <class A>
struct ExitLines {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const View* exit;
  ExitSums<A>* size;
  int vector;  // its S among the sums; -1: no gradient is wanted
  int C;
  bool as_they_are;
  int64_t line;         // numbers from a channel to the next
  int64_t ring, drawn;  // rows; the first that is not in there yet
  A* rows;              // [ring, C, line]
  bool* odd_row;        // [ring] whether something is not finite
  bool odd;             // in any row under the tile

  void lay_out(Memory& m, const Frame<A>& frame, int e) {
    exit = &frame.L.exits[e];
    C = frame.C;
    as_they_are = frame.L.target == Target::argmax;
    line = (exit->W + int64_t(3) * kLanes) / kLanes * kLanes;
    ring = frame.plan.resizes[e].held_rows;
    rows = m.template take<A>(ring * C * line);
    odd_row = m.template take<bool>(ring);
  }
  A* row(int64_t i) const { return rows + i % ring * C * line; }

  // Draws the rows that the tile needs.
  void draw(const Frame<A>& frame) {
    const AxisTable& axis = size->resize->rows;
    if (frame.top == frame.y0 || drawn < axis.low[frame.top]) drawn = axis.low[frame.top];
    const int64_t last = axis.high(frame.top + frame.rows - 1);
    for (int64_t& i = drawn; i <= last; ++i) {
      if constexpr (sizeof(A) == 8) {
        read<double>(frame.image, i);
      } else {
        switch (frame.L.dtype) {
          case DType::float32: read<float>(frame.image, i); break;
          case DType::float16: read<Half>(frame.image, i); break;
          default: read<BFloat>(frame.image, i);
        }
      }
      odd_row[i % ring] = less_maxima(row(i));
    }
    odd = false;
    for (int64_t i = axis.low[frame.top]; i <= last; ++i) odd |= odd_row[i % ring];
  }
  template <class S>
  void read(int64_t image, int64_t i) const {
    const S* const from = static_cast<const S*>(exit->data) + image * exit->stride_b + i * exit->stride_h;
    A* const to = row(i);
    if (exit->stride_w == 1) {
      for (int c = 0; c < C; ++c) convert(to + c * line, from + c * exit->stride_c, exit->W);
    } else {
      for (int64_t x = 0; x < exit->W; ++x)
        for (int c = 0; c < C; ++c) convert(to[c * line + x], from[x * exit->stride_w + c * exit->stride_c]);
    }
  }
  // Whether something is not finite.
  bool less_maxima(A* to) const {
    clear_beyond(to);
    VInt found{};
    for (int64_t x = 0; x < exit->W; x += kLanes) {
      V most = load<V>(to + x);
      for (int c = 1; c < C; ++c) most = larger(load<V>(to + c * line + x), most);
      for (int c = 0; c < C; ++c) {
        const V z = load<V>(to + c * line + x), less = as_they_are ? z : (z - most) * A(kLog2e);
        store(to + c * line + x, less);
        found |= less - less != V{};
      }
    }
    clear_beyond(to);
    return any(found);
  }
  void clear_beyond(A* to) const {
    for (int c = 0; c < C; ++c)
      for (int64_t x = exit->W; x < line; ++x) to[c * line + x] = 0;
  }

  // A span in block b, at the output's columns, times `scale`: to[c] = {on the row above, the step to the one below}.
  void spread(const Span& span, int64_t b, A scale, V (*to)[2]) const {
    const A* const upper = row(span.low) + size->first[b];
    const A* const lower = row(span.low + span.both) + size->first[b];
    const VInt left = load<VInt>(size->column + b * kLanes);
    const V weight = load<V>(size->to_right + b * kLanes);
    // Those to the left and to the right of the block's columns, out of one vector, two, or any number.
    auto between_columns = [&](const A* from, auto vectors) {
      V l, r;
      if constexpr (vectors.value == 1) {
        const V a = load<V>(from);
        l = shuffle(a, left), r = shuffle(a, left + 1);
      } else if constexpr (vectors.value == 2) {
        const V a = load<V>(from), next = load<V>(from + kLanes);
        l = shuffle(a, next, left), r = shuffle(a, next, left + 1);
      } else {
        for (int k = 0; k < kLanes; ++k) l[k] = from[left[k]], r[k] = from[left[k] + 1];
      }
      return (l + weight * (r - l)) * scale;
    };
    auto all_channels = [&](auto vectors) {
      for (int c = 0; c < C; ++c) {
        const V above = between_columns(upper + c * line, vectors);
        to[c][0] = above, to[c][1] = between_columns(lower + c * line, vectors) - above;
      }
    };
    switch (size->vectors_of[b]) {
      case 1: all_channels(Number<1>{}); break;
      case 2: all_channels(Number<2>{}); break;
      default: all_channels(Number<3>{});
    }
  }
  // y of a pixel, where numbers may not be finite: of what a pixel does not lie on, nothing comes in.
  A pixel(const Span& span, int c, int64_t x, int64_t b, int r) const {
    const int64_t at = c * line + size->first[b] + size->column[x];
    const A *const upper = row(span.low) + at, *const lower = row(span.low + span.both) + at;
    const A right = size->to_right[x];
    return between(between(upper[0], upper[1], right), between(lower[0], lower[1], right), size->down[r]);
  }

  // Row i with its channels together: to[x][c], columns `pitch` apart.
  void turn(int64_t i, int64_t pitch, A* to) const {
    const A* const from = row(i);
    for (int64_t x = 0; x < exit->W; x += kLanes)
      for (int64_t c = int64_t(C - 1) / kLanes * kLanes; c >= 0; c -= kLanes) {  // the last first: it overlaps
        V square[kLanes];
        for (int k = 0; k < kLanes; ++k) square[k] = c + k < C ? load<V>(from + (c + k) * line + x) : V{};
        transpose<V, VInt>(square);
        for (int k = 0; k < kLanes; ++k) store(to + (x + k) * pitch + c, square[k]);
      }
  }
};

}  // namespace

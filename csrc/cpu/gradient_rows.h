// The gradient of an exit at its own resolution, row by row, as bands of the output finish them. Two rows lie across a
// border between bands: what both add to them goes through memory, and is added up afterwards, from top to bottom.
#pragma once

#include <string.h>

#include "cpu.h"
#include "storage.h"

namespace {

using namespace selfreg;

// Where w is 0 the other one does not matter, be it infinite or NaN.
template <class A>
SELFREG_ALWAYS A between(A a, A b, A w) {
  return w == 0 ? a : (1 - w) * a + w * b;
}

// The first row that the band from output row y on has to see to.
SELFREG_ALWAYS int64_t first_row(const Resize& resize, int64_t y) {
  const Axis& axis = resize.rows;
  if (y == 0) return 0;
  const int64_t after = axis.high(y - 1) + 1;
  return after < axis.low[y] ? after : axis.low[y];
}
// The first row that is not yet complete when all output rows above y are done, in a band that ends before `end`.
SELFREG_ALWAYS int64_t rows_until(const ExitLoss& L, const Resize& resize, int64_t y, int64_t end) {
  const Axis& axis = resize.rows;
  return y < end ? axis.low[y] : y < L.H ? axis.high(y - 1) + 1 : axis.size;
}

template <class S, class A>
void write_row_as(const ExitLoss& L, const View& grad, int64_t image, int64_t i, const A* sum, int64_t step) {
  using V = typename VecOf<A>::V;
  constexpr int kLanes = sizeof(V) / sizeof(A);
  S* const to = static_cast<S*>(grad.data) + image * grad.stride_b + i * grad.stride_h;
  const int64_t whole = sum && grad.stride_w == 1 && step % kLanes == 0 ? grad.W / kLanes * kLanes : 0;
  for (int64_t x = 0; x < whole; x += kLanes)
    for (int64_t c = 0; c < L.C; c += kLanes) {
      V square[kLanes];
      for (int k = 0; k < kLanes; ++k) square[k] = load<V>(sum + (x + k) * step + c);
      transpose<V, typename VecOf<A>::VInt>(square);
      for (int k = 0; k < kLanes && c + k < L.C; ++k) {
        A plane[kLanes];
        store(plane, square[k]);
        convert(to + (c + k) * grad.stride_c + x, plane, kLanes);
      }
    }
  for (int64_t c = 0; c < L.C; ++c)
    for (int64_t x = whole; x < grad.W; ++x)
      convert(to[c * grad.stride_c + x * grad.stride_w], sum ? sum[x * step + c] : A(0));
}
// sum[x * step + c], or zeros, to row i of the gradient.
template <class A>
void write_row(const ExitLoss& L, const View& grad, int64_t image, int64_t i, const A* sum, int64_t step) {
  if constexpr (sizeof(A) == 8) {
    write_row_as<double>(L, grad, image, i, sum, step);
  } else {
    switch (L.dtype) {
      case DType::float32: write_row_as<float>(L, grad, image, i, sum, step); break;
      case DType::float16: write_row_as<Half>(L, grad, image, i, sum, step); break;
      default: write_row_as<BFloat>(L, grad, image, i, sum, step);
    }
  }
}

// Room for a row that is shared across the border before output row y, for what the band below (0, 1) and, if it may
// not be rounded to the gradient's dtype yet, the band above (2, 3) adds to it.
template <class A>
A* shared_row(const ExitLoss& L, const Plan& plan, int e, int64_t image, int64_t y, int64_t number) {
  const int64_t border = image * (plan.bands - 1) + y / (plan.tiles_down * plan.tile_rows) - 1;
  return static_cast<A*>(plan.resizes[e].shared) +
         (border * shared_slots(L) + number) * plan.resizes[e].columns.size * L.C;
}

// Row i of exit e's gradient, complete as far as the band of output rows [begin, end) goes.
template <class A>
void write_gradient(const ExitLoss& L, const Plan& plan, int e, int64_t image, int64_t begin, int64_t end, int64_t i,
                    const A* sum, int64_t step) {
  const Axis& axis = plan.resizes[e].rows;
  A* to = nullptr;
  if (begin > 0 && i <= axis.high(begin - 1)) {
    to = shared_row<A>(L, plan, e, image, begin, i - axis.low[begin]);
  } else if (end < L.H && i >= axis.low[end] && shared_slots(L) > 2) {
    to = shared_row<A>(L, plan, e, image, end, 2 + i - axis.low[end - 1]);
  }
  if (!to) return write_row(L, L.grads[e], image, i, sum, step);
  if (!sum) memset(to, 0, L.grads[e].W * L.C * sizeof(A));
  for (int64_t x = 0; sum && x < L.grads[e].W; ++x) memcpy(to + x * L.C, sum + x * step, L.C * sizeof(A));
}

// The rows that bands of an image share, added up from top to bottom.
template <class A>
void join_rows(const ExitLoss& L, const Plan& plan, int e, int64_t image, A* sum) {
  const Axis& axis = plan.resizes[e].rows;
  const int64_t width = plan.resizes[e].columns.size, row = width * L.C;
  const int64_t band = plan.tiles_down * plan.tile_rows;
  auto shares = [&](int64_t y, int64_t i) { return i <= axis.high(y - 1) && i >= axis.low[y]; };
  for (int64_t y = band; y < L.H; y += band) {
    for (int64_t i = axis.low[y]; i <= axis.high(y - 1); ++i) {
      if (y > band && shares(y - band, i)) continue;  // done, from the first border it crosses
      if (shared_slots(L) == 2) {
        const View& grad = L.grads[e];
        const A* const from = static_cast<const A*>(grad.data) + image * grad.stride_b + i * grad.stride_h;
        for (int64_t x = 0; x < width; ++x)
          for (int64_t c = 0; c < L.C; ++c) sum[x * L.C + c] = from[x * grad.stride_w + c * grad.stride_c];
      } else {
        memcpy(sum, shared_row<A>(L, plan, e, image, y, 2 + i - axis.low[y - 1]), row * sizeof(A));
      }
      for (int64_t border = y; border < L.H && shares(border, i); border += band) {
        const A* const more = shared_row<A>(L, plan, e, image, border, i - axis.low[border]);
#pragma omp simd
        for (int64_t k = 0; k < row; ++k) sum[k] += more[k];
      }
      write_row(L, L.grads[e], image, i, sum, L.C);
    }
  }
}

}  // namespace

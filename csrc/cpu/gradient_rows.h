// The gradient of an exit at its own resolution, row by row, as bands of the output finish them. One or two rows lie
// across a border between bands: what both add to them goes through memory, and is added up afterwards.
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
  const AxisTable& axis = resize.rows;
  if (y == 0) return 0;
  const int64_t after = axis.high(y - 1) + 1;
  return after < axis.low[y] ? after : axis.low[y];
}
// The first row that is not yet complete when all output rows above y are done, in a band that ends before `end`.
SELFREG_ALWAYS int64_t rows_until(const ExitLoss& L, const Resize& resize, int64_t y, int64_t end) {
  const AxisTable& axis = resize.rows;
  return y < end ? axis.low[y] : y < L.H ? axis.high(y - 1) + 1 : axis.size;
}

template <class S, class A>
void write_row_as(const ExitLoss& L, const View& grad, int64_t image, int64_t i, const A* sum, int64_t step) {
  using V = typename VecOf<A>::V;
  constexpr int kLanes = sizeof(V) / sizeof(A);
  S* const to = static_cast<S*>(grad.data) + image * grad.stride_b + i * grad.stride_h;
  const int64_t whole = sum && grad.stride_w == 1 ? grad.W / kLanes * kLanes : 0;
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
// sum[x * step + c], or zeros, to row i of the gradient. Up to a vector's numbers beyond are read.
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

// Row i of an exit, which bands share across the border above band `below`, as a gradient of that one row: what the
// band below adds to it (side 0), or the one above (1).
template <class A>
View shared_row(const ExitLoss& L, const Plan& plan, int e, int64_t image, int64_t below, int64_t i, int side) {
  const Resize& resize = plan.resizes[e];
  const int64_t border = image * (plan.bands - 1) + below - 1, number = i - resize.rows.low[plan.begins[below]];
  const int64_t width = resize.columns.size;
  A* const row =
      static_cast<A*>(resize.shared) + ((border * resize.shared_rows + number) * shared_sides(L) + side) * L.C * width;
  return {row, 0, width, 0, 1, 1, width};
}
// Whether the bands above and below that border do.
SELFREG_ALWAYS bool is_shared(const Plan& plan, const AxisTable& rows, int64_t below, int64_t i) {
  return below > 0 && below < plan.bands && i <= rows.high(plan.begins[below] - 1) && i >= rows.low[plan.begins[below]];
}

// Row i of exit e's gradient, complete as far as the band goes.
template <class A>
void write_gradient(const ExitLoss& L, const Plan& plan, int e, int64_t image, int64_t band, int64_t i, const A* sum,
                    int64_t step) {
  const AxisTable& rows = plan.resizes[e].rows;
  const bool above = is_shared(plan, rows, band, i), below = is_shared(plan, rows, band + 1, i);
  if (above) {
    write_row_as<A>(L, shared_row<A>(L, plan, e, image, band, i, 0), 0, 0, sum, step);
  } else if (below && shared_sides(L) == 2) {
    write_row_as<A>(L, shared_row<A>(L, plan, e, image, band + 1, i, 1), 0, 0, sum, step);
  } else {
    write_row(L, L.grads[e], image, i, sum, step);
  }
}

// What bands add to row i, of which the border above band `below` is the first that it lies across.
template <class S, class A>
void join_row(const ExitLoss& L, const Plan& plan, int e, int64_t image, int64_t below, int64_t i) {
  const View& grad = L.grads[e];
  S* const to = static_cast<S*>(grad.data) + image * grad.stride_b + i * grad.stride_h;
  auto part = [&](int64_t band, int side, int64_t c) {
    return static_cast<A*>(shared_row<A>(L, plan, e, image, band, i, side).data) + c * grad.W;
  };
  for (int64_t c = 0; c < L.C; ++c) {
    A* const sum = part(below, 0, c);
    S* const row = to + c * grad.stride_c;
    if constexpr (sizeof(S) == sizeof(A)) {
      for (int64_t x = 0; x < grad.W; ++x) sum[x] += row[x * grad.stride_w];
    } else {
      const A* const above = part(below, 1, c);
      for (int64_t x = 0; x < grad.W; ++x) sum[x] += above[x];
    }
    for (int64_t band = below + 1; is_shared(plan, plan.resizes[e].rows, band, i); ++band) {
      const A* const more = part(band, 0, c);
      for (int64_t x = 0; x < grad.W; ++x) sum[x] += more[x];
    }
    for (int64_t x = 0; x < grad.W; ++x) convert(row[x * grad.stride_w], sum[x]);
  }
}

// The rows of exit e's gradient that bands share across the border above band `below`, added up from top to bottom.
template <class A>
void join_rows(const ExitLoss& L, const Plan& plan, int e, int64_t image, int64_t below) {
  const AxisTable& rows = plan.resizes[e].rows;
  const int64_t y = plan.begins[below];
  for (int64_t i = rows.low[y]; i <= rows.high(y - 1); ++i) {
    if (is_shared(plan, rows, below - 1, i)) continue;  // done, from the first border that it lies across
    if constexpr (sizeof(A) == 8) {
      join_row<double, A>(L, plan, e, image, below, i);
    } else {
      switch (L.dtype) {
        case DType::float32: join_row<float, A>(L, plan, e, image, below, i); break;
        case DType::float16: join_row<Half, A>(L, plan, e, image, below, i); break;
        default: join_row<BFloat, A>(L, plan, e, image, below, i);
      }
    }
  }
}

}  // namespace

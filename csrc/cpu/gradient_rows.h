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

// What the band above (side 0) and that below (1) add to row i, which they share: `below` is the number of the latter.
template <class A>
A* shared_row(const ExitLoss& L, const Plan& plan, int e, int64_t image, int64_t below, int64_t i, int side) {
  const Resize& resize = plan.resizes[e];
  const int64_t border = image * (plan.bands - 1) + below - 1, number = i - resize.rows.low[plan.begins[below]];
  return static_cast<A*>(resize.shared) +
         ((border * resize.shared_rows + number) * 2 + side) * resize.columns.size * L.C;
}

// Row i of exit e's gradient, complete as far as the band goes.
template <class A>
void write_gradient(const ExitLoss& L, const Plan& plan, int e, int64_t image, int64_t band, int64_t i, const A* sum,
                    int64_t step) {
  const Axis& axis = plan.resizes[e].rows;
  const int64_t begin = plan.begins[band], end = plan.begins[band + 1];
  A* to = nullptr;
  if (begin > 0 && i <= axis.high(begin - 1)) {
    to = shared_row<A>(L, plan, e, image, band, i, 1);
  } else if (end < L.H && i >= axis.low[end]) {
    to = shared_row<A>(L, plan, e, image, band + 1, i, 0);
  }
  if (!to) return write_row(L, L.grads[e], image, i, sum, step);
  if (!sum) memset(to, 0, L.grads[e].W * L.C * sizeof(A));
  for (int64_t x = 0; sum && x < L.grads[e].W; ++x) memcpy(to + x * L.C, sum + x * step, L.C * sizeof(A));
}

// The rows that bands share across the border above band `below` of an image, added up from top to bottom. One that
// lies across several borders is done at the first.
template <class A>
void join_rows(const ExitLoss& L, const Plan& plan, int e, int64_t image, int64_t below) {
  const Axis& axis = plan.resizes[e].rows;
  const int64_t row = plan.resizes[e].columns.size * L.C;
  auto shares = [&](int64_t band, int64_t i) {
    const int64_t y = plan.begins[band];
    return i <= axis.high(y - 1) && i >= axis.low[y];
  };
  const int64_t y = plan.begins[below];
  for (int64_t i = axis.low[y]; i <= axis.high(y - 1); ++i) {
    if (below > 1 && shares(below - 1, i)) continue;
    A* const sum = shared_row<A>(L, plan, e, image, below, i, 0);
    for (int64_t band = below; band < plan.bands && shares(band, i); ++band) {
      const A* const more = shared_row<A>(L, plan, e, image, band, i, 1);
#pragma omp simd
      for (int64_t k = 0; k < row; ++k) sum[k] += more[k];
    }
    write_row(L, L.grads[e], image, i, sum, L.C);
  }
}

}  // namespace

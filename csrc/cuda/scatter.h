// Small exits, the way back: what stands at the tile's pixels is added up at an exit's own resolution.
#pragma once

#include "lines.h"

namespace selfreg {

template <class Shape>
struct Scatter : Lines<Shape> {
  using Base = Lines<Shape>;
  using Base::K, Base::P, Base::a, Base::args, Base::channel, Base::channels, Base::column_firsts, Base::column_weights,
      Base::group, Base::groups, Base::kParts, Base::rows_of, Base::shared, Base::slots, Base::smoothed, Base::thread,
      Base::threads, Base::under, Base::weights;
  using typename Base::A;

  using Base::Base;

  // Adds a vector at the tile's pixels to that of an exit of size s. put(span) writes a column's sums for the exit's
  // row above and the one below to mine(), of its rows in the span. Then the pixels between the same two columns are
  // summed for both of these; and then, in order, what is to the left and right of each column.
  template <class Put>
  SELFREG_DEVICE void scatter(int s, int rank, Put put) const {
    const Under& u = under(s);
#pragma unroll 1
    for (int span = 0; span < P; span = u.end[span]) {
      put(span);
      __syncthreads();
      sum_cells(s);
      __syncthreads();
      add_columns(s, rank, span);
    }
  }
  SELFREG_DEVICE A* mine() const { return kept_shared(shared + args.at.scattered + thread() * Shape::kScattered); }

  // x times its pixel's number of `times`.
  SELFREG_DEVICE void scatter_row(int s, int rank, const A (&x)[K][P], const A (&times)[P]) const {
    const Under& u = under(s);
    auto put = [&](int span, auto all) {
      A above[P], below[P];
      load_shared(u.weight, below);
#pragma unroll
      for (int p = 0; p < P; ++p) above[p] = (1 - below[p]) * times[p], below[p] *= times[p];
      bool here[P];
#pragma unroll
      for (int p = 0; p < P; ++p) here[p] = decltype(all)::value || (p >= span && p < u.end[span]);
      A* const to = mine();
#pragma unroll
      for (int i = 0; i < K; i += 2) {
        A sum[4] = {};
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int p = 0; p < P; ++p)
            if (here[p]) sum[2 * k] += above[p] * x[i + k][p], sum[2 * k + 1] += below[p] * x[i + k][p];
        store_shared(to + 2 * i, sum);
      }
    };
    scatter(s, rank, [&](int span) { u.end[0] == P ? put(0, std::true_type()) : put(span, std::false_type()); });
  }
  // hot at each pixel's class c; and smoothing's part of `all` at every class.
  SELFREG_DEVICE void scatter_labels(int s, int rank, const int (&c)[P], const A (&hot)[P], const A (&all)[P]) const {
    const Under& u = under(s);
    scatter(s, rank, [&](int span) {
      A* const to = mine();
      A smooth[2] = {};
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const bool here = p >= span && p < u.end[span] && smoothed();
        if (here) smooth[0] += (1 - u.weight[p]) * all[p], smooth[1] += u.weight[p] * all[p];
      }
#pragma unroll
      for (int i = 0; i < K; i += 2) {
        A sum[4] = {};
        if (smooth[0] != 0 || smooth[1] != 0) {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const A w = i + k < channels ? a.smoothing * class_weight(a, channel(i + k)) : A(0);
            sum[2 * k] = product(smooth[0], w), sum[2 * k + 1] = product(smooth[1], w);
          }
        }
        store_shared(to + 2 * i, sum);
      }
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const bool here = p >= span && p < u.end[span];
        const int i = Shape::kSpread ? int(unsigned(c[p]) / unsigned(a.groups)) : c[p];
        if (!here || hot[p] == 0 || (Shape::kSpread && c[p] - i * a.groups != group())) continue;
        A x[2];
        load_shared(to + 2 * i, x);
        x[0] += (1 - u.weight[p]) * hot[p], x[1] += u.weight[p] * hot[p];
        store_shared(to + 2 * i, x);
      }
    });
  }

  // [groups, cells, parts]: two channels, above and below, for the column on the left; then for that on the right.
  SELFREG_DEVICE A* cell_at(int g, int cell) const {
    return shared + args.at.lines + (g * args.at.line_columns + cell) * Shape::kLine;
  }
  SELFREG_DEVICE void sum_cells(int s) const {
    const A *const numbers = shared + args.at.scattered, *const weights = column_weights(s);
    const uint16_t* const firsts = column_firsts(s);
    const Divisor cells = under(s).cells;
#pragma unroll 1
    for (int task = thread(); task < cells.divisor * kParts * groups(); task += threads()) {
      const int number = task / kParts, part = task - number * kParts;
      const int g = Shape::kSpread ? cells.of(number) : 0, cell = number - g * cells.divisor;
      const int first = firsts[cell + 1];
      int left = firsts[cell + 2] - first;
      const A* from = numbers + (g * slots() + first) * Shape::kScattered + part * 4;
      const A* weight = weights + first;
      A sum[4] = {}, right[4] = {};
      auto add = [&](int x) {
        A n[4];
        load_shared(from + x * Shape::kScattered, n);
        const A w = weight[x];
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[k] += n[k], right[k] += w * n[k];
      };
#pragma unroll 1
      for (; left >= 4; left -= 4, from += 4 * Shape::kScattered, weight += 4) add(0), add(1), add(2), add(3);
#pragma unroll 1
      for (; left > 0; --left, from += Shape::kScattered, ++weight) add(0);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] -= right[k];
      A* const to = cell_at(g, cell) + part * 8;
      store_shared(to, sum);
      store_shared(to + 4, right);
    }
  }

  // The row of this parity that tiles still add to: of each column, groups of parts.
  SELFREG_DEVICE A* added(int s, int rank, int parity) const {
    return shared + under(s).added + (rank * 2 + parity) * under(s).added_row;
  }
  // Row y of the band's copy.
  SELFREG_DEVICE A* copy_row(int s, int rank, int y) const {
    const Under& u = under(s);
    return args.copies + args.copies_from[s] + rank * args.copy_numbers[s] + u.copy + int64_t(y - u.row) * u.copy_row;
  }
  SELFREG_DEVICE void add_columns(int s, int rank, int span) const {
    const Under& u = under(s);
    const Divisor parts = u.parts;
    const int low = u.low[span], last = span > 0 ? u.low[span - 1] : u.last;
    const int tasks = u.columns * parts.divisor, cells = u.cells.divisor;
    // Rows that nothing was added to yet; the row below takes the place of one that is complete.
    const bool first = last < 0, fresh = low != last;
    A *const above = added(s, rank, low & 1), *const below = added(s, rank, ~low & 1);
    A* const complete = fresh && !first ? copy_row(s, rank, low - 1) : nullptr;
#pragma unroll 1
    for (int task = thread(); task < tasks; task += threads()) {
      const int x = parts.of(task), number = task - x * parts.divisor;
      const int g = Shape::kSpread ? number / kParts : 0, part = number - g * kParts;
      const A* const from = cell_at(g, x) + part * 8;
      A sum[4] = {}, more[4];
      if (x < cells) load_shared(from, sum);
      if (x > 0) {
        load_shared(from + 4 - Shape::kLine, more);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[k] += more[k];
      }
      A old[2];
      if (!first) {
        load_shared(above + 2 * task, old);
        sum[0] += old[0], sum[2] += old[1];
        load_shared(below + 2 * task, old);
        if (fresh) {
          *reinterpret_cast<float2*>(complete + 2 * task) = make_float2(old[0], old[1]);
        } else {
          sum[1] += old[0], sum[3] += old[1];
        }
      }
      store_shared<2>(above + 2 * task, {sum[0], sum[2]});
      store_shared<2>(below + 2 * task, {sum[1], sum[3]});
    }
  }
  // The last rows of a band.
  SELFREG_DEVICE void end_band() const {
    for (int s = 0; s < args.sizes; ++s)
      for (int rank = a.labels ? 0 : 1; rank < args.vectors[s]; ++rank) end_band(s, rank);
  }
  SELFREG_DEVICE void end_band(int s, int rank) const {
    const Under& u = under(s);
    for (int y = u.low[P - 1]; y < u.low[P - 1] + 2 && y < rows_of(s).from; ++y) {
      A *const from = added(s, rank, y & 1), *const to = copy_row(s, rank, y);
#pragma unroll 1
      for (int task = thread(); task < u.columns * u.parts.divisor; task += threads()) {
        A sum[2];
        load_shared(from + 2 * task, sum);
        *reinterpret_cast<float2*>(to + 2 * task) = make_float2(sum[0], sum[1]);
      }
    }
  }
};

}  // namespace selfreg

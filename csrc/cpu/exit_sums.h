// What is summed at the resolution of the exits of a size: Q of the labels and of each teacher, S of each exit.
#pragma once

#include "frame.h"  // and with it vec.h: before pixel_math.h, whose templates call its exp2_of and log2
#include "gradient_rows.h"
#include "pixel_weights.h"

#include "../pixel_math.h"

namespace {

// What is added up: u^POWER of a block's exponentials u [C, apart];
template <int POWER, class V>
struct PowerOf {
  const V* u;
  int64_t apart;
  SELFREG_ALWAYS V operator()(int c, int r) const { return selfreg::power<POWER>(u[c * apart + r]); }
};
// two kinds of exponentials, each times a factor of its own;
template <class V>
struct SumOfBoth {
  const V *e1, *e2, *f1, *f2;
  int64_t apart;
  SELFREG_ALWAYS V operator()(int c, int r) const { return e1[c * apart + r] * f1[r] + e2[c * apart + r] * f2[r]; }
};
// the labels' target, but for the pixel's weight. Those that do not count are negative.
template <bool SMOOTH, class A>
struct OfLabels {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  VInt label[kMostRows];
  const A *hot, *rest;  // [C] of the label, of another class
  SELFREG_ALWAYS V operator()(int c, int r) const {
    const V other = SMOOTH ? label[r] < 0 ? V{} : fill<V>(rest[c]) : V{};
    return label[r] == typename VecOf<A>::Int(c) ? fill<V>(hot[c]) : other;
  }
};

// Rows are kept while tiles add to them, in a ring.
template <class A>
struct ExitSums {
  using V = typename VecOf<A>::V;
  using Int = typename VecOf<A>::Int;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const Resize* resize;
  int C, vectors;
  int64_t blocks;                           // of a row of the output
  int64_t width, ring;                      // columns; rows of the ring
  int64_t pitch, row_numbers;               // numbers of a column, of a row
  int64_t apart;                            // in a block, vectors from a channel to the next
  A *to_right, *to_left;  // [output columns] weights of the columns to the right and to the left; 0 beyond the last
  Int* column;            // [output columns] the column to the left, counted from `first`
  int32_t* first;         // [blocks] the block's first column
  bool* wide;             // [blocks] whether it lies on more columns than a vector holds
  A* sums;                // [vectors, ring, width + 1, pitch]
  V *above, *none;        // [pitch] a span's sums for the exit's row above, at the output's columns; zeros
  V* carried;             // [vectors, blocks, C] those for the row below: the next span, below that row, goes on with them
  int64_t opened, done;   // the first row that is not yet in the ring; that is not yet done with
  int64_t y0, y1;         // the band
  Span spans[kMostRows];  // of the tile
  int count;
  bool begins, goes_on, ends;  // the first span: is the band's; began in the tile above. The last is the band's
  A down[kMostRows];  // of each row of the tile: the weight of the exit's row below

  // The sums of `exits` gradients.
  void lay_out(Memory& m, const Frame<A>& frame, const Resize& the_resize, int exits) {
    resize = &the_resize;
    C = frame.C, pitch = frame.pitch, apart = frame.apart;
    width = resize->columns.size, ring = resize->held_rows, row_numbers = (width + 1) * pitch;
    const int64_t columns = frame.blocks * kLanes;
    to_right = m.template take<A>(columns);
    to_left = m.template take<A>(columns);
    column = m.template take<Int>(columns);
    first = m.template take<int32_t>(frame.blocks);
    wide = m.template take<bool>(frame.blocks);
    vectors = targets(frame.L) + exits;
    sums = m.template take<A>(vectors * ring * row_numbers);
    above = m.template take<V>(pitch);
    none = m.template take<V>(C);
    blocks = frame.blocks;
    carried = m.template take<V>(vectors * blocks * C);
  }
  static int targets(const ExitLoss& L) { return L.T + (L.labels != nullptr); }

  A* row(int vector, int64_t i) const { return sums + (vector * ring + i % ring) * row_numbers; }

  void place_columns(const Frame<A>& frame) {
    const Axis& axis = resize->columns;
    for (int64_t c = C; c < pitch; ++c) above[c] = V{};
    for (int c = 0; c < C; ++c) none[c] = V{};
    for (int64_t b = 0; b < frame.blocks; ++b) {
      first[b] = axis.low[b * kLanes];
      wide[b] = false;
      for (int64_t x = b * kLanes; x < (b + 1) * kLanes; ++x) {
        const bool there = x < frame.plan.width;
        column[x] = Int(axis.low[there ? x : frame.plan.width - 1] - first[b]);
        to_right[x] = there ? A(axis.weight[x]) : A(0);
        to_left[x] = there ? 1 - to_right[x] : A(0);
        wide[b] |= column[x] + 1 >= kLanes;
      }
    }
  }

  void begin_band(int64_t begin, int64_t end) {
    y0 = begin, y1 = end;
    opened = resize->rows.low[y0];
    done = first_row(*resize, y0);
  }
  // The spans of the tile.
  void cut(int64_t top, int rows) {
    const Axis& axis = resize->rows;
    count = 0;
    goes_on = top > y0 && axis.low[top] == axis.low[top - 1];
    begins = top == y0, ends = top + rows == y1 && axis.low[y1 - 1] + 1 < axis.size;
    for (int r = 0; r < rows; ++r) {
      const int64_t low = axis.low[top + r];
      if (r == 0 || low != axis.low[top + r - 1]) spans[count++] = {r, r, low, false};
      Span& span = spans[count - 1];
      span.end = r + 1;
      down[r] = A(axis.weight[top + r]);
      span.both |= down[r] != 0;
    }
  }
  // Zeros, to the rows under the tile that nothing has been added to.
  void open(int64_t last) {
    for (; opened <= last; ++opened) {
      for (int v = 0; v < vectors; ++v) memset(row(v, opened), 0, row_numbers * sizeof(A));
    }
  }

  // Adds factor[row] * from(c, row) of block b to a vector: once a block, for what is carried is that of all blocks above.
  template <class From>
  void add(int vector, int64_t b, const From from, const V* factor) {
    V* const below = carried + (vector * blocks + b) * C;
    for (int s = 0; s < count; ++s) {
      const Span& span = spans[s];
      const V* const to_above = s == 0 && (begins || goes_on) ? none : below;
      const V* const to_below = s == 0 && goes_on ? below : none;
      over_groups(span, [&](auto group, int r) {
        const bool first = r == span.begin;
        add_rows<group.value>(r, from, factor, first ? to_above : above, first ? to_below : below, below);
      });
      add_columns(b, above, row(vector, span.low));
    }
    if (!ends) return;
    memcpy(above, below, C * sizeof(V));
    add_columns(b, above, row(vector, spans[count - 1].low + 1));
  }
  // Of G rows from r on, onto what is in to_above and to_below so far.
  template <int G, class From>
  void add_rows(int r, const From from, const V* factor, const V* to_above, const V* to_below, V* below) {
    V* const above = this->above;  // a store may change a member, as far as the compiler knows
    V up[G], low[G];
    for (int g = 0; g < G; ++g) low[g] = factor[r + g] * down[r + g], up[g] = factor[r + g] - low[g];
    for (int c = 0, classes = C; c < classes; ++c) {
      V a = to_above[c], z = to_below[c];
      for (int g = 0; g < G; ++g) {
        const V x = from(c, r + g);
        a += x * up[g], z += x * low[g];
      }
      above[c] = a, below[c] = z;
    }
  }
  void add_columns(int64_t b, const V* of_channels, A* to) const {
    const A *const right_weight = to_right + b * kLanes, *const left_weight = to_left + b * kLanes;
    const Int* const place = column + b * kLanes;
    to += first[b] * pitch;
    for (int64_t c = 0; c < pitch; c += kLanes) {
      V pixel[kLanes];
      for (int k = 0; k < kLanes; ++k) pixel[k] = of_channels[c + k];
      transpose<V, VInt>(pixel);
      V left{}, right{};
      Int x = place[0];
      A* sum = to + c + x * pitch;
      for (int k = 0; k < kLanes; ++k) {
        for (; x < place[k]; ++x, sum += pitch) {
          store(sum, load<V>(sum) + left);
          left = right, right = V{};
        }
        left += pixel[k] * left_weight[k], right += pixel[k] * right_weight[k];
      }
      store(sum, load<V>(sum) + left);
      store(sum + pitch, load<V>(sum + pitch) + right);
    }
  }

  // The sum of row i of a target times `y`, its channels together. 0 log 0 = 0.
  double dot(int target, int64_t i, const A* y) const {
    using Sums = typename VecOf<A>::Sums;
    const A* const q = row(target, i);
    Sums sum{};
    for (int64_t x = 0; x < width; ++x) {
      V of_column{};
      for (int64_t k = x * pitch; k < (x + 1) * pitch; k += kLanes) {
        const V share = load<V>(q + k);
        of_column += share == A(0) ? V{} : share * load<V>(y + k);
      }
      sum += __builtin_convertvector(of_column, Sums);
    }
    double all_lanes = 0;
    for (int k = 0; k < kLanes; ++k) all_lanes += sum[k];
    return all_lanes;
  }
  // From row i of an exit's S, `gain` times that of a target.
  void subtract(int target, A gain, int vector, int64_t i) const {
    const A* const q = row(target, i);
    A* const to = row(vector, i);
    for (int64_t k = 0; k < width * pitch; k += kLanes) {
      const V share = load<V>(q + k);
      store(to + k, load<V>(to + k) - (share == A(0) ? V{} : share * gain));
    }
  }
};

}  // namespace

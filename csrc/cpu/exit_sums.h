// What is summed at the resolution of the exits of a size: small ones' Q of the labels and of each teacher, and S of
// each; of the others, gradients.
#pragma once

#include "frame.h"
#include "gradient_rows.h"

namespace {

// Rows are kept from the span that lies below them, until it is done, in a ring.
template <class A>
struct ExitSums {
  using V = typename VecOf<A>::V;
  using Int = typename VecOf<A>::Int;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const Resize* resize;
  int C, vectors;
  int64_t blocks;              // of a row of the output
  int64_t width, ring;         // columns; rows of the ring
  int64_t pitch, row_numbers;  // numbers of a column, of a row
  int64_t apart;               // in a block, vectors from a channel to the next
  A *to_right, *to_left;  // [output columns] weights of the columns to the right and to the left; 0 beyond the last
  Int* column;            // [output columns] the column to the left, counted from `first`
  int32_t* first;         // [blocks] the block's first column
  int8_t* vectors_of;     // [blocks] how many vectors the block's columns lie in; 3: more than two
  A* sums;                // [vectors, ring, width + 1, pitch]
  V *above, *none;        // [pitch] a span's sums for the exit's row above, at the output's columns; zeros
  V* carried;             // [vectors, blocks, C] those for the row below, with which the next span goes on
  bool* added;            // [vectors] whether anything ever is: not to the sums of an exit without losses
  int64_t opened, done;   // the first row that is not yet in the ring; that is not yet done with
  int64_t y0;             // where the band begins
  Span spans[kMostRows];  // of the tile
  int count;
  bool begins, goes_on;  // nothing is carried for the first span; it began in the tile above
  bool carries;          // the tile's last span does
  A down[kMostRows];     // of each row of the tile: the weight of the exit's row below

  // The sums of `exits` gradients.
  void lay_out(Memory& m, const Frame<A>& frame, const Resize& the_resize, int exits) {
    resize = &the_resize;
    C = frame.C, pitch = frame.pitch, apart = frame.apart;
    width = resize->columns.size, ring = resize->upper_rows, row_numbers = (width + 1) * pitch;
    const int64_t columns = frame.blocks * kLanes;
    to_right = m.template take<A>(columns);
    to_left = m.template take<A>(columns);
    column = m.template take<Int>(columns);
    first = m.template take<int32_t>(frame.blocks);
    vectors_of = m.template take<int8_t>(frame.blocks);
    vectors = first_exit(frame.L, *resize) + exits;
    sums = m.template take<A>(vectors * ring * row_numbers);
    above = m.template take<V>(pitch);
    none = m.template take<V>(C);
    blocks = frame.blocks;
    carried = m.template take<V>(vectors * blocks * C);
    added = m.template take<bool>(vectors);
  }
  static int first_exit(const ExitLoss& L, const Resize& resize) {
    return resize.small ? L.T + (L.labels != nullptr) : 0;
  }

  A* row(int vector, int64_t i) const { return sums + (vector * ring + i % ring) * row_numbers; }

  void place_columns(const Frame<A>& frame) {
    const AxisTable& axis = resize->columns;
    for (int64_t c = C; c < pitch; ++c) above[c] = V{};
    for (int c = 0; c < C; ++c) none[c] = V{};
    for (int v = 0; v < vectors; ++v) added[v] = false;
    for (int64_t b = 0; b < frame.blocks; ++b) {
      first[b] = axis.low[b * kLanes];
      vectors_of[b] = 1;
      for (int64_t x = b * kLanes; x < (b + 1) * kLanes; ++x) {
        const bool there = x < frame.plan.width;
        column[x] = Int(axis.low[there ? x : frame.plan.width - 1] - first[b]);
        to_right[x] = there ? A(axis.weight[x]) : A(0);
        to_left[x] = there ? 1 - to_right[x] : A(0);
        const int8_t vector = column[x] + 1 < kLanes ? 1 : column[x] + 1 < 2 * kLanes ? 2 : 3;
        vectors_of[b] = vector > vectors_of[b] ? vector : vectors_of[b];
      }
    }
  }

  void begin_band(int64_t begin) {
    y0 = begin;
    opened = resize->rows.low[y0];
    done = first_row(*resize, y0);
  }
  // The spans of the tile, and zeros to rows that they are the first to add to.
  void cut(int64_t top, int rows) {
    const AxisTable& axis = resize->rows;
    count = 0;
    goes_on = top > y0 && axis.low[top] == axis.low[top - 1];
    begins = top == y0 || axis.low[top] > axis.low[top - 1] + 1;
    carries = true;
    for (int r = 0; r < rows; ++r) {
      const int64_t low = axis.low[top + r];
      if (r == 0 || low != axis.low[top + r - 1]) spans[count++] = {r, r, low, false};
      Span& span = spans[count - 1];
      span.end = r + 1;
      down[r] = A(axis.weight[top + r]);
      span.both |= down[r] != 0;
    }
    while (opened <= axis.low[top + rows - 1]) open_row();
  }
  void open_row() {
    for (int v = 0; v < vectors; ++v) memset(row(v, opened), 0, row_numbers * sizeof(A));
    ++opened;
  }
  // The row below the last span, where none goes on from it: what was carried is all of it.
  void add_carried() {
    open_row();
    carries = false;
    for (int v = 0; v < vectors; ++v)
      for (int64_t b = 0; added[v] && b < blocks; ++b) {
        memcpy(above, carried + (v * blocks + b) * C, C * sizeof(V));
        add_columns(b, above, row(v, opened - 1));
      }
  }

  // Adds factor[row] * from(c, row) of block b to a vector. Once a tile: what is carried is that of the tiles above.
  template <class From>
  void add(int vector, int64_t b, const From from, const V* factor) {
    V* const below = carried + (vector * blocks + b) * C;
    added[vector] = true;
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
    to += first[b] * pitch;
    int64_t c = 0;
    for (; c + kLanes <= pitch; c += kLanes) add_channels<V, VInt>(b, of_channels + c, to + c);
    if (c < pitch) add_channels<typename VecOf<A>::Half, typename VecOf<A>::HalfInt>(b, of_channels + c, to + c);
  }
  // As many channels as W has lanes, transposed for as many columns at a time.
  template <class W, class WInt>
  void add_channels(int64_t b, const V* of_channels, A* sum) const {
    constexpr int kWidth = sizeof(W) / sizeof(A);
    const A *const right_weight = to_right + b * kLanes, *const left_weight = to_left + b * kLanes;
    const Int* const place = column + b * kLanes;
    W left{}, right{};
    Int x = place[0];
    sum += x * pitch;
    for (int k0 = 0; k0 < kLanes; k0 += kWidth) {
      W pixel[kWidth];
      for (int k = 0; k < kWidth; ++k) pixel[k] = load<W>(reinterpret_cast<const A*>(of_channels + k) + k0);
      transpose<W, WInt>(pixel);
      for (int k = 0; k < kWidth; ++k) {
        for (; x < place[k0 + k]; ++x, sum += pitch) {
          store(sum, load<W>(sum) + left);
          left = right, right = W{};
        }
        left += pixel[k] * left_weight[k0 + k], right += pixel[k] * right_weight[k0 + k];
      }
    }
    store(sum, load<W>(sum) + left);
    store(sum + pitch, load<W>(sum + pitch) + right);
  }

  // The sum of row i of a target times `y`, its channels together. 0 log 0 = 0.
  double dot(int target, int64_t i, const A* y) const {
    using Sums = typename VecOf<A>::Sums;
    const A* const q = row(target, i);
    Sums sum{};
    over_row([&](int64_t k, auto vector) {
      const V share = vector.of(q + k), product = share * vector.of(y + k);
      sum += __builtin_convertvector(share == A(0) ? V{} : product, Sums);
    });
    double all_lanes = 0;
    for (int k = 0; k < kLanes; ++k) all_lanes += sum[k];
    return all_lanes;
  }
  // From row i of an exit's S, `gain` times that of a target.
  void subtract(int target, A gain, int vector, int64_t i) const {
    const A* const q = row(target, i);
    A* const to = row(vector, i);
    over_row([&](int64_t k, auto numbers) {
      const V share = numbers.of(q + k), rest = numbers.of(to + k) - (share == A(0) ? V{} : share * gain);
      memcpy(to + k, &rest, numbers.bytes);
    });
  }

 private:
  template <int BYTES>
  struct Part {
    static constexpr int bytes = BYTES;
    static SELFREG_ALWAYS V of(const A* from) {
      V v{};
      memcpy(&v, from, BYTES);
      return v;
    }
  };
  // A row vector by vector; the last may be a half.
  template <class F>
  SELFREG_ALWAYS void over_row(F f) const {
    const int64_t numbers = width * pitch, whole = numbers / kLanes * kLanes;
    for (int64_t k = 0; k < whole; k += kLanes) f(k, Part<sizeof(V)>{});
    if (whole < numbers) f(whole, Part<sizeof(V) / 2>{});
  }
};

}  // namespace

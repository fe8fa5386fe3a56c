// What is summed at the resolution of the exits of a size: Q of the labels and of each teacher, S of each exit.
#pragma once

#include "frame.h"  // and with it vec.h: before pixel_math.h, whose templates call its exp2_of and log2
#include "gradient_rows.h"
#include "pixel_weights.h"

#include "../pixel_math.h"

namespace {

template <int POWER, class V>
SELFREG_ALWAYS V power_of(V u) {
  return selfreg::power<POWER>(u);
}

// Rows are kept while tiles add to them, in a ring.
template <class A>
struct ExitSums {
  using V = typename VecOf<A>::V;
  using Int = typename VecOf<A>::Int;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const Resize* resize;
  int C, vectors;
  int64_t width, ring, pitch, row_numbers;  // columns; rows of the ring; of a column and of a row: numbers
  int64_t apart;                            // in a block, vectors from a channel to the next
  A *to_right, *to_left;  // [output columns] weights of the columns to the right and to the left; 0 beyond the last
  Int* column;            // [output columns] the column to the left, counted from `first`
  int32_t* first;         // [blocks] the block's first column
  bool* wide;             // [blocks] whether it lies on more columns than a vector holds
  A* sums;                // [vectors, ring, width + 1, pitch]
  double* labels;         // [ring, width + 1, pitch] their Q, until a row is finished: pixels come one by one
  V *above, *below;       // [pitch] a span's sums, for the exit's row above and for the one below
  int64_t opened, done;   // the first row that is not yet in the ring; that is not yet done with
  Span spans[kMostRows];  // of the tile
  int count;
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
    labels = frame.L.labels ? m.template take<double>(ring * row_numbers) : nullptr;
    above = m.template take<V>(pitch);
    below = m.template take<V>(pitch);
  }
  static int targets(const ExitLoss& L) { return L.T + (L.labels != nullptr); }

  A* row(int vector, int64_t i) const { return sums + (vector * ring + i % ring) * row_numbers; }
  double* label_row(int64_t i) const { return labels + i % ring * row_numbers; }

  void place_columns(const Frame<A>& frame) {
    const Axis& axis = resize->columns;
    for (int64_t c = C; c < pitch; ++c) above[c] = below[c] = V{};
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

  void begin_band(int64_t y) {
    opened = resize->rows.low[y];
    done = first_row(*resize, y);
  }
  // The spans of the tile.
  void cut(int64_t top, int rows) {
    const Axis& axis = resize->rows;
    count = 0;
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
      if (labels) memset(label_row(opened), 0, row_numbers * sizeof(double));
    }
  }

  // Adds factor[row] * from[c][row]^POWER of block b to a vector.
  template <int POWER>
  void add(int vector, int64_t b, const V* from, const V* factor) {
    for (int s = 0; s < count; ++s) {
      const Span& span = spans[s];
      over_groups(span, [&](auto group, int r) {
        add_rows<group.value, POWER>(from + r, factor + r, down + r, r == span.begin);
      });
      add_columns(b, above, row(vector, span.low));
      if (span.both) add_columns(b, below, row(vector, span.low + 1));
    }
  }
  template <int G, int POWER>
  void add_rows(const V* from, const V* factor, const A* weights, bool first) {
    const int64_t apart = this->apart;  // a store may change a member, as far as the compiler knows
    V up[G], low[G];
    for (int g = 0; g < G; ++g) low[g] = factor[g] * weights[g], up[g] = factor[g] - low[g];
    V *const to_above = above, *const to_below = below;
    for (int c = 0; c < C; ++c) {
      V a = first ? V{} : to_above[c], z = first ? V{} : to_below[c];
      for (int g = 0; g < G; ++g) {
        const V x = power_of<POWER>(from[c * apart + g]);
        a += x * up[g], z += x * low[g];
      }
      to_above[c] = a, to_below[c] = z;
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

  // Labels are targets of one class.
  void add_labels(const Frame<A>& frame, const PixelWeights<A>& pixels, int64_t b) {
    const int64_t x0 = b * kLanes, left = frame.plan.width - x0, columns = left < kLanes ? left : kLanes;
    for (int s = 0; s < count; ++s) {
      const Span& span = spans[s];
      double* const upper = label_row(span.low) + first[b] * pitch;
      double* const lower = label_row(span.low + span.both) + first[b] * pitch;
      for (int r = span.begin; r < span.end; ++r)
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t pixel = frame.at(r, b) + k, to = column[x0 + k] * pitch;
          const double right = to_right[x0 + k], low = down[r];
          auto put = [&](int64_t c, double w) {
            const double w_low = w * low, w_up = w - w_low;
            upper[to + c] += w_up - w_up * right;
            upper[to + pitch + c] += w_up * right;
            lower[to + c] += w_low - w_low * right;
            lower[to + pitch + c] += w_low * right;
          };
          if (pixels.hot[pixel] != 0) put(pixels.label[pixel], pixels.hot[pixel]);
          if (frame.smoothing != 0 && pixels.labelled[pixel] != 0) put(C, pixels.labelled[pixel]);
        }
    }
  }
  // With smoothing, the labels' loss gives something to all classes.
  void finish_labels(const Frame<A>& frame, int64_t i) {
    const double* const from = label_row(i);
    A* const to = row(0, i);
    for (int64_t k = 0; k < width * pitch; ++k) to[k] = A(from[k]);
    for (int64_t x = 0; frame.smoothing != 0 && x < width; ++x) {
      to[x * pitch + C] = 0;
      for (int c = 0; c < C; ++c)
        if (const A w = frame.class_weight(c)) to[x * pitch + c] += frame.smoothing * w * A(from[x * pitch + C]);
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

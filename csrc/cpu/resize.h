// Exits of another size than the output's: bilinear interpolation of a tile's logits, and the way back of its gradient.
// No tensor of the output's size exists; a tile's interpolated logits live in cache and are gone when it is done. It is
// for larger exits, and for what small_exits.cpp has not.
//
// Why so. A tile is many rows high, so that the work at the exit's own resolution is shared: its rows are read once a
// tile, interpolated vertically at their own width, and only then spread. On the way back the rows of a tile between
// the same two rows of the exit are added up first, at vector speed; what is left is transposed, so that a vector holds
// channels, and added to the exit's columns in order. Sums of a row are complete when the tiles below have passed: it
// is converted and written once, in any layout and dtype, with nothing in memory but the rows under way. Only the rows
// that two bands share go through memory, at most two an exit and border, and are added up afterwards.
// - A gather (each element of the exit looks up its pixels) has to compute the softmax of a pixel up to four times, or
//   to keep (B, C, H, W) of it.
// - Private copies of the gradient for each band, added up in the end, cost the exits' size again in memory.
// - Vertical sums at full width and one horizontal sum a row of the exit need 2 C W numbers an exit, which for wide
//   outputs no cache holds; that is why tiles are summed horizontally one by one.
// Measured on one AVX-512 core, float32, the objective. Five exits of 2 x 21 x 41 x 41 at 321 x 321: forward 15 ms,
// with gradients 25, so the second forward that a gather needs would cost 15; exits of full size to begin with 13 and
// 23; F.interpolate first and its backward after 144. Three exits of 1 x 19 x 256 x 512 at 512 x 1024, where only two
// rows share the work: forward 26, with gradients 59; full size 25 and 49; F.interpolate 261.
#pragma once

#include "cpu.h"
#include "gradient_rows.h"
#include "memory.h"
#include "storage.h"
#include "vec.h"

namespace {

using namespace selfreg;

// One resized exit in the hands of one worker, which goes through bands, and in each from tile to tile.
template <class A>
class Resizer {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

 public:
  static constexpr int kBlock = 4;  // channels that are interpolated together

  void lay_out(Memory& m, const ExitLoss& launch, const Plan& the_plan, int e) {
    L = &launch, plan = &the_plan, exit = &launch.exits[e], grad = &launch.grads[e], R = &the_plan.resizes[e];
    C = int(launch.C);
    line = (R->most_columns + int64_t(2) * kLanes) / kLanes * kLanes;
    pixel = (int64_t(C) + kLanes - 1) / kLanes * kLanes;
    patch_row = (R->held_rows < 2 * plan->tile_rows ? R->held_rows : 2 * plan->tile_rows) * line;
    patch = m.take<A>(C * patch_row);
    across = m.take<A>(int64_t(2) * kBlock * line);
    weight_x = m.take<A>(plan->width + kLanes);
    weight_y = m.take<A>(2 * plan->tile_rows);
    rows = m.take<int32_t>(3 * plan->tile_rows);
    sums = grad->data ? m.take<A>(R->held_rows * R->columns.size * pixel) : nullptr;
  }
  void begin_launch() {
    memset(patch, 0, C * patch_row * sizeof(A));
    for (int64_t x = 0; x < plan->width + kLanes; ++x) weight_x[x] = x < plan->width ? A(R->columns.weight[x]) : A(0);
  }

  void begin_band(int64_t image_, int64_t number) {
    image = image_, band = number;
    if (!sums) return;
    next = first_row(*R, plan->begins[band]);
    held = R->rows.low[plan->begins[band]];
    memset(sums, 0, R->held_rows * R->columns.size * pixel * sizeof(A));
  }

  // What of the exit the tile needs: its rows, with the weights of both, and its columns.
  void begin_tile(const Tile& the_tile) {
    tile = the_tile;
    const int64_t segment = tile.x / plan->tile_columns;
    taken = R->taken + segment * plan->tile_columns * 2;
    count = R->count[segment];
    int32_t* const needed = rows + plan->tile_rows;
    int64_t found = 0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int32_t low = R->rows.low[tile.y + r], high = int32_t(R->rows.high(tile.y + r));
      if (!found || needed[found - 1] < low) needed[found++] = low;
      if (needed[found - 1] < high) needed[found++] = high;
      rows[r] = int32_t(found - 1 - (high - low));
      weight_y[2 * r + 1] = A(R->rows.weight[tile.y + r]);
      weight_y[2 * r] = 1 - weight_y[2 * r + 1];
    }
    if constexpr (sizeof(A) == 8) {
      read<double>(needed, found);
    } else {
      switch (L->dtype) {
        case DType::float32: read<float>(needed, found); break;
        case DType::float16: read<Half>(needed, found); break;
        default: read<BFloat>(needed, found);
      }
    }
  }

  // Channels [c0, c0 + CB) of the tile, interpolated, to rows `ld` apart. Up to a vector's pixels beyond are written.
  template <int CB>
  void interpolate(int c0, A* to, int64_t ld) const {
    A *const lines = across, *const steps = across + kBlock * line;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const A w = weight_y[2 * r + 1];
      const A* const above = patch + c0 * patch_row + rows[r] * line;
      const A* const below = w == 0 ? above : above + line;
      // Vertically, at the exit's width; then the steps from column to column.
      VInt odd{};  // true where something is not finite
      for (int k = 0; k < CB; ++k) {
        const A *const a = above + k * patch_row, *const b = below + k * patch_row;
        A *const l = lines + k * line, *const d = steps + k * line;
        for (int64_t x = 0; x < count; x += kLanes) {
          const V v = load<V>(a + x);
          store(l + x, v + w * (load<V>(b + x) - v));
        }
        for (int64_t x = count; x <= (count + kLanes - 1) / kLanes * kLanes; ++x) l[x] = l[count - 1];
        for (int64_t x = 0; x < count; x += kLanes) {
          const V step = load<V>(l + x + 1) - load<V>(l + x);
          store(d + x, step);
          odd |= step - step != V{};
        }
      }
      A* const out = to + r * tile.columns;
      any(odd) ? careful<CB>(c0, r, out, ld) : spread<CB>(out, ld);
    }
  }

  // Adds the gradient of channels [c0, c1) at the tile's pixels, in rows `ld` apart, to the exit's; c0 is a multiple of
  // the vector.
  void gather(int c0, int c1, const A* from, int64_t ld) {
    const int64_t row = R->columns.size * pixel;
    for (int64_t r0 = 0, r1; r0 < tile.rows; r0 = r1) {
      const int32_t low = R->rows.low[tile.y + r0];
      bool both = false;
      for (r1 = r0; r1 < tile.rows && R->rows.low[tile.y + r1] == low; ++r1) both |= weight_y[2 * r1 + 1] != 0;
      for (int side = 0; side <= int(both); ++side)
        for (int c = c0; c < c1; c += kLanes) {
          A* const to = sums + (low + side - held) * row + c;
          gather_rows(from + (c - c0) * ld, ld, c1 - c < kLanes ? c1 - c : kLanes, r0, r1, weight_y + side, to);
        }
    }
  }

  // After a row of tiles that ends before output row y: the rows of the exit that nothing below adds to are written.
  void end_tiles_across(int64_t y) {
    if (!sums) return;
    const AxisTable& axis = R->rows;
    const int64_t row = R->columns.size * pixel, last = axis.high(y - 1), end = plan->begins[band + 1];
    const int64_t until = rows_until(*L, *R, y, end);
    for (; next < until; ++next) {
      const A* const sum = next <= last && next >= held ? sums + (next - held) * row : nullptr;
      write_gradient(*L, *plan, int(exit - L->exits), image, band, next, sum, pixel);
    }
    if (y == end) return;
    const int64_t kept = last - until + 1 > 0 ? last - until + 1 : 0;
    if (kept) memmove(sums, sums + (until - held) * row, kept * row * sizeof(A));
    memset(sums + kept * row, 0, (R->held_rows - kept) * row * sizeof(A));
    held = until;
  }

 private:
  const ExitLoss* L;
  const Plan* plan;
  const View *exit, *grad;
  const Resize* R;
  int C;
  int64_t line, patch_row, pixel;  // distances of lines, of channels of the patch, of columns of the sums
  A* patch;                        // [C, rows, line] the part of the exit that the tile needs
  A* across;                       // [2, kBlock, line] a row between two of them, and its steps from column to column
  A* weight_x;                     // [W] of the next column
  A* weight_y;                     // [tile rows, 2] of the row above and of that below
  int32_t* rows;                   // [tile rows] the row above in the patch; then room to list its rows
  A* sums;  // [held rows, w, pixel] gradient of the exit's rows from `held` on; null where none is wanted
  int64_t image, band;
  int64_t held, next;  // the first row in `sums`; the first that is not yet written
  Tile tile;
  const int32_t* taken;
  int64_t count;

  static SELFREG_ALWAYS bool any(VInt x) {
    uint64_t words[kVecBytes / 8], some = 0;
    memcpy(words, &x, kVecBytes);
    for (uint64_t word : words) some |= word;
    return some != 0;
  }

  template <class S>
  void read(const int32_t* needed, int64_t found) const {
    const S* const data = static_cast<const S*>(exit->data) + image * exit->stride_b;
    const bool together = exit->stride_w == 1 && taken[count - 1] - taken[0] == count - 1;
    for (int64_t j = 0; j < found; ++j) {
      const S* const from = data + needed[j] * exit->stride_h;
      A* const to = patch + j * line;
      if (together) {
        for (int c = 0; c < C; ++c) convert(to + c * patch_row, from + c * exit->stride_c + taken[0], count);
      } else {
        for (int64_t x = 0; x < count; ++x)
          for (int c = 0; c < C; ++c)
            convert(to[c * patch_row + x], from[taken[x] * exit->stride_w + c * exit->stride_c]);
      }
    }
  }

  // Horizontally: a vector's pixels lie between few columns, which one load and a permutation bring; when the exit is
  // the larger one, they may not.
  template <int CB>
  SELFREG_ALWAYS void spread(A* to, int64_t ld) const {
    const A *const lines = across, *const steps = across + kBlock * line;
    const int32_t* const place = R->place + tile.x;
    for (int64_t x = 0; x < tile.columns; x += kLanes) {
      const int32_t first = place[x];
      const int64_t last = x + kLanes < tile.columns ? x + kLanes - 1 : tile.columns - 1;
      if (place[last] - first < kLanes) {
        VInt at;
        for (int j = 0; j < kLanes; ++j) at[j] = place[x + j] - first;
        const V w = load<V>(weight_x + tile.x + x);
        for (int k = 0; k < CB; ++k) {
          const V v = shuffle(load<V>(lines + k * line + first), at);
          const V d = shuffle(load<V>(steps + k * line + first), at);
          store(to + k * ld + x, v + w * d);
        }
      } else {
        for (int k = 0; k < CB; ++k)
          for (int64_t i = x; i <= last; ++i)
            to[k * ld + i] = lines[k * line + place[i]] + weight_x[tile.x + i] * steps[k * line + place[i]];
      }
    }
  }

  // Row r where something is infinite or NaN, number by number.
  template <int CB>
  void careful(int c0, int64_t r, A* to, int64_t ld) const {
    const A w = weight_y[2 * r + 1];
    for (int k = 0; k < CB; ++k) {
      const A* const above = patch + (c0 + k) * patch_row + rows[r] * line;
      const A* const below = w == 0 ? above : above + line;
      for (int64_t x = 0; x < tile.columns; ++x) {
        const A w_x = weight_x[tile.x + x];
        const int64_t left = R->place[tile.x + x], right = w_x == 0 ? left : left + 1;
        to[k * ld + x] = between(between(above[left], below[left], w), between(above[right], below[right], w), w_x);
      }
    }
  }

  // Rows [r0, r1) of `channels` channels, each row times its weight, to the columns that they lie between.
  SELFREG_ALWAYS void gather_rows(const A* from, int64_t ld, int channels, int64_t r0, int64_t r1, const A* weights,
                                  A* to) {
    const int32_t* const low = R->columns.low + tile.x;
    const A* const weight = weight_x + tile.x;
    const int64_t size = R->columns.size, columns = tile.columns, width = pixel;
    int32_t column = low[0];
    V left{}, right{};  // what is to be added to `column` and to the next
    auto add = [&](int32_t x, V v) { store(to + x * width, load<V>(to + x * width) + v); };
    for (int64_t x = 0; x < columns; x += kLanes) {
      V lanes[kLanes] = {};
      for (int c = 0; c < channels; ++c) {
        const A* const g = from + c * ld + x;
        for (int64_t r = r0; r < r1; ++r) lanes[c] += weights[2 * r] * load<V>(g + r * columns);
      }
      transpose<V, VInt>(lanes);
      const int64_t pixels = columns - x < kLanes ? columns - x : kLanes;
      for (int64_t j = 0; j < pixels; ++j) {
        if (low[x + j] != column) {
          add(column, left);
          left = right, right = V{};
          if (low[x + j] != ++column) {
            add(column, left);
            left = V{};
            column = low[x + j];
          }
        }
        const A w = weight[x + j];
        left += (1 - w) * lanes[j];
        right += w * lanes[j];
      }
    }
    add(column, left);
    if (column + 1 < size) add(column + 1, right);
  }
};

}  // namespace

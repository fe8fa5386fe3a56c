// Small exits: a block's band of a strip, its tiles, and what lies under them. small_exits.h says how it goes on.
#pragma once

#include "small_args.h"

namespace selfreg {

// What the kernels begin with.
template <class Shape>
struct Strip {
  using A = float;
  using S = typename Shape::S;
  // What an ignored label counts; if the pixel counts for soft losses, what it is multiplied by may be NaN.
  static constexpr A kIgnored = A(-0.0);
  static constexpr int K = Shape::K, P = Shape::P, kParts = Shape::kParts, kSumTogether = Shape::kSumTogether;

  const SmallArgs& args;
  const Args<A>& a;
  A* const shared;
  const int channels;  // of this thread
  int turn = 0;        // of the two exchange buffers

  A all_class_weights = 0;
  int row;         // the tile's first
  bool all_count;  // the thread's pixels

  __device__ Strip(const SmallArgs& small, A* numbers)
      : args(small),
        a(small.all),
        shared(numbers),
        channels(Shape::kSpread ? (a.C - group() + a.groups - 1) / a.groups : a.C) {}

  SELFREG_DEVICE static int thread() { return Shape::kSpread ? threadIdx.y * blockDim.x + threadIdx.x : threadIdx.x; }
  SELFREG_DEVICE static int threads() { return Shape::kSpread ? blockDim.x * blockDim.y : blockDim.x; }
  SELFREG_DEVICE static int slot() { return threadIdx.x; }
  SELFREG_DEVICE static int slots() { return blockDim.x; }
  SELFREG_DEVICE static int group() { return Shape::kSpread ? threadIdx.y : 0; }
  SELFREG_DEVICE int groups() const { return Shape::kSpread ? a.groups : 1; }
  SELFREG_DEVICE int channel(int i) const { return Shape::kSpread ? group() + i * a.groups : i; }
  SELFREG_DEVICE bool exists(int i) const { return i < Shape::kSure || i < channels; }
  template <class F>
  SELFREG_DEVICE void each(F f) const {
#pragma unroll
    for (int i = 0; i < K; ++i)
#pragma unroll
      for (int p = 0; p < P; ++p) f(i, p);
  }

  SELFREG_DEVICE Under& under(int s) const { return reinterpret_cast<Under*>(shared + args.at.under)[s]; }
  SELFREG_DEVICE int64_t& first_of(int e, int p) const {
    return reinterpret_cast<int64_t*>(shared + args.at.firsts)[e * P + p];
  }
  SELFREG_DEVICE int size_of(int e) const { return args.size_number[e]; }
  SELFREG_DEVICE Axis rows_of(int s) const { return {a.from[args.size_first[s]].x, a.cut.height, a.align_corners}; }
  SELFREG_DEVICE Axis columns_of(int s) const { return {a.from[args.size_first[s]].y, a.cut.width, a.align_corners}; }
  SELFREG_DEVICE A* column_weights(int s) const { return shared + args.at.columns + s * column_numbers(slots()); }
  SELFREG_DEVICE int32_t* column_lows(int s) const { return reinterpret_cast<int32_t*>(column_weights(s) + slots()); }
  SELFREG_DEVICE uint16_t* column_firsts(int s) const { return reinterpret_cast<uint16_t*>(column_lows(s) + slots()); }
  SELFREG_DEVICE int entry(int r, int e) const { return e * (a.T + 1) + r; }  // so an exit's lie side by side
  SELFREG_DEVICE A gain(int r, int e) const { return shared[args.at.gains + entry(r, e)]; }
  SELFREG_DEVICE A* weights() const { return counted(a.T + 1); }
  SELFREG_DEVICE A* counted(int r) const { return shared + args.at.counted + (r * threads() + thread()) * P; }
  SELFREG_DEVICE bool teaches(int r, int e) const { return r == 0 || a.teachers[r - 1] != e; }  // 0: labels

  SELFREG_DEVICE void put_loss(int r, int e, A sum) const {
#pragma unroll
    for (int other = 1; other < kSumTogether; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (thread() % kSumTogether == 0)
      shared[args.at.sums + (entry(r, e) * threads() + thread()) / kSumTogether] += sum;  // group 0's will count
  }

  template <int n, class Op>
  SELFREG_DEVICE void across_groups(A (&x)[n], Op op) {
    if constexpr (Shape::kSpread) {
      // Two buffers in turn: who writes one again has passed the barrier after which all had read it.
      A* const buffer = shared + args.at.exchange + turn * threads() * P;
      turn ^= 1;
      store_shared(buffer + thread() * P, x);
      __syncthreads();
      load_shared(buffer + slot() * P, x);
#pragma unroll 1
      for (int g = 1; g < a.groups; ++g) {
        A y[n];
        load_shared(buffer + (g * slots() + slot()) * P, y);
#pragma unroll
        for (int p = 0; p < n; ++p) x[p] = op(x[p], y[p]);
      }
    }
  }
  template <int n>
  SELFREG_DEVICE void sum_across_groups(A (&x)[n]) {
    across_groups(x, [](A u, A v) { return u + v; });
  }

  // What most launches do without.
  SELFREG_DEVICE bool argmax() const { return !Shape::kPlain && a.target == Target::argmax; }
  SELFREG_DEVICE bool smoothed() const { return !Shape::kPlain && a.smoothing != 0; }
  SELFREG_DEVICE bool two_rates() const { return !Shape::kPlain && a.two_rates(); }
  SELFREG_DEVICE bool mixed() const { return !Shape::kPlain && args.mixed; }
  // An exit of the output's size.
  SELFREG_DEVICE bool full(int e) const { return mixed() && a.from[e].x == 0; }

  // ---- bands and tiles ----

  SELFREG_DEVICE void begin_band(int number) {
    const Cut& cut = a.cut;
    const int line = unsigned(number) / unsigned(cut.strips), strip = number - line * cut.strips;
    const int image = unsigned(line) / unsigned(cut.bands);
    const int band = line - image * cut.bands, begin = strip * cut.columns;
    const int width = min(int(cut.width) - begin, cut.columns);
    row = band * cut.rows;
    __syncthreads();  // all are done with the last one
    for (int s = 0, added = args.at.added; s < args.sizes; ++s) {
      const Axis axis = columns_of(s);
      const int64_t first = axis.low(begin);
      const int added_row = added_columns(args, s, slots()) * args.pitch;
      for (int k = thread(); k < slots() + 3; k += threads()) {
        const int64_t from = axis.first(first - 1 + k) - begin;
        column_firsts(s)[k] = uint16_t(from < 0 ? 0 : from < width ? from : width);
        if (k >= slots()) continue;
        const int64_t at = begin + (k < width ? k : width - 1), low = axis.low(at);
        column_lows(s)[k] = int32_t(low - first);
        column_weights(s)[k] = axis.template weight<A>(at, low);
      }
      if (thread() == 0) {
        const Axis rows = rows_of(s);
        const Copies copies(cut, rows.from, axis.from, a.align_corners);
        Under& u = under(s);
        u.copy_row = int(copies.columns) * args.pitch;
        u.copy = copies.begin(cut, image, band, strip, args.pitch);
        u.image = image, u.begin = begin, u.width = width;
        u.row = int(rows.low(row));
        u.column = int(first);
        u.columns = int(axis.high(begin + width - 1) - first) + 1;
        u.cells.set(u.columns > 1 ? u.columns - 1 : 1);
        u.parts.set(groups() * kParts);
        u.drawn = threads() / u.cells.divisor;
        u.last = -1;
        u.added = added, u.added_row = added_row;
      }
      added += args.vectors[s] * 2 * added_row;
    }
  }

  // How many rows the tile has. Where a span of the finest exit ends, it does, too, unless it had a single row: then
  // fewer tiles have more than one span.
  SELFREG_DEVICE int tile_rows() const {
    const Axis axis = rows_of(args.finest);
    const int in_band = int(unsigned(row) % unsigned(a.cut.rows));
    const int most = min(P, min(int(a.cut.height) - row, a.cut.rows - in_band));
    for (int n = most; n > (in_band == 0 ? 0 : 1); --n)
      if (row + n < a.cut.height && axis.low(row + n) != axis.low(row + n - 1)) return n;
    return most;
  }

  // What lies under the tile at `row`. All threads of the block.
  SELFREG_DEVICE void place_tile() {
    __syncthreads();  // all are done with the last one, or have begun the band
    for (int task = thread(); task < a.N + args.sizes; task += threads()) {
      const bool is_exit = task < a.N;
      const int rows = tile_rows(), s = is_exit ? size_of(task) : task - a.N;
      const Axis axis = rows_of(s);
      Under& u = under(s);
      int low[P];
#pragma unroll
      for (int p = 0; p < P; ++p) low[p] = int(axis.low(row + min(p, rows - 1)));
      if (is_exit && full(task)) continue;
      if (is_exit) {
        const PixelView& view = a.exits[task];
#pragma unroll
        for (int p = 0; p < P; ++p)
          first_of(task, p) = u.image * view.step[0] + low[p] * view.step[1] + u.column * view.step[2];
        continue;
      }
      if (row % a.cut.rows != 0) u.last = u.low[P - 1];
      u.rows = rows;
      int end = P;
#pragma unroll
      for (int p = P; p-- > 0;) {
        u.low[p] = low[p];
        u.peak[p] = int((u.image * axis.from + low[p]) * columns_of(s).from) + u.column;
        u.weight[p] = axis.template weight<A>(row + min(p, rows - 1), low[p]);
        u.end[p] = end;
        if (p > 0 && low[p] != low[p - 1]) end = p;
      }
    }
    __syncthreads();
  }
};

}  // namespace selfreg

// Exits that are all resized, none larger than the output, with nothing rare asked for: the exit-loss matrix, phases 1
// and 2. exit_loss.cu launches it, launch.cu plans it; how an output is cut, and an exit's geometry: resize.h.
//
// Interpolation is linear, y_c(p) = sum_k a_kp y_kc over an exit's positions k, so that at the exit's own resolution
//   sum_p w_p sum_c target_rc(p) y_c(p) = sum_kc y_kc Q_rkc          with Q_rkc = sum_p a_kp w_p target_rc(p)
//   gradient_kc                         = S_kc - sum_r gain_r Q_rkc  with S_kc = sum_p a_kp f_p exp(y_c(p))
// Q is the same for all exits of a size: a teacher's target goes there once, is read by no student, and is kept
// nowhere. Labels are one more teacher. At the output's resolution remain an exit's exponentials and their sum, and S.
// The last kernel (combine_kernel) adds up the blocks' parts of S and Q, and takes the sums over k and c.
//
// No maximum is looked for: every position of an exit is taken less its own (peak_kernel), so that but for rounding no
// y_kc is above 0, nor what is interpolated from them. Where peaks are of other channels, all of a pixel's exponentials
// may be small: then its own maximum is found after all, slowly.
//
// A tile is up to four rows of a strip of 128 columns. Per exit: lines are drawn (draw_lines), each thread interpolates
// its pixels from them, takes exponentials and their sums; then adds up its rows for the exit's row above and the one
// below; cells of pixels between the same two columns are summed for both of these; sums of cells are added to the
// exit's two rows under the tile, which stay in shared memory until the band has passed them: so each is written once.
//
// Counted, not measured: no GPU has run this. Instructions an output pixel, channel and exit, for one block of five
// exits at an eighth of (8, 21, 512, 512), two of them teachers, float32, sm_90, 168 registers, 12 warps, no spills: in
// all 25 (0.19 ms in all issue slots of an H200), of which drawing lines 3, interpolating 3, exponentials 3, sums over
// rows 4, cells 5, columns 2, losses 3; combine_kernel takes another 0.02 ms. Where targets stay in shared memory, for
// students to read: 37 with tiles of four rows (90 KB of targets, 8 warps), 45 with two.
#pragma once

#include <type_traits>

#include "args.h"
#include "device.h"

namespace selfreg {

// Channels of a thread, and of all that share its pixels.
constexpr int kMostOfThread = 22, kMostSmallChannels = 16 * kMostOfThread;

// A thread has up to K channels of four rows of a column of the output; `spread`: some threads share them.
template <class S_, int K_, bool spread>
struct SmallShape {
  using S = S_;
  static constexpr int K = K_, P = 4, kParts = K / 2;  // a part: two channels, for the exit's rows above and below
  static constexpr bool kSpread = spread;
  static constexpr int kMaxThreads = spread ? 256 : 128, kMinBlocks = spread ? 1 : K <= 16 ? 4 : 3;
  static constexpr int kSure = spread ? (K > 16 ? 16 : 8) : K == 22 ? 20 : K == 20 ? 16 : K - 8;  // channels that exist
  // From one column to the next, in numbers: odd numbers of fours, so that a warp's threads meet in no bank.
  static constexpr int kLine = (K | 1) * 4, kScattered = (kParts | 1) * 4;
  static constexpr int kSumTogether = 4;  // how many threads share their sums of losses
};

// What of the exits of one size lies under a block's band, and under the tile at hand; in shared memory. A span: the
// tile's rows that lie between the same two of the exit's; it goes by the first of them.
struct alignas(16) Under {
  float weight[4];               // of each row of the tile: that of the exit's row below it
  int32_t low[4], end[4];        // likewise: the exit's row above it; of each span, the row after its last
  int32_t peak[4];               // likewise: where its first peak is
  int32_t rows;                  // of the tile
  int32_t image, begin, width;   // of the band: its image, its first column and how many, of the output
  int32_t row, column, columns;  // the exit's first row, its columns
  int32_t added, added_row;      // where the rows are that tiles add to; numbers of one
  int64_t copy;                  // where in the copies of a vector
  int32_t copy_row;              // of these, numbers from a row to the next
  Divisor cells, parts;          // pairs of neighbouring columns; a column's parts
  int32_t drawn;                 // channels of a line that the block draws at a time
  int32_t last;                  // row above the last tile's last row; -1: there was none
};

// What multiplies a loss's terms in gradients: i = r N + e.
SELFREG_DEVICE float small_gain(const Args<float>& a, int i, double label_norm, double soft_norm) {
  return product(a.grad_losses ? a.grad_losses[i] : a.weights[i], float(i < a.N ? label_norm : soft_norm)) *
         (i < a.N ? 1 : a.tau);
}

struct SmallLayout {
  int32_t sums;      // [N, T + 1, threads / kSumTogether]
  int32_t gains;     // [N, T + 1], of the whole block
  int32_t counted;   // [T + 1, threads, P]: a pixel's weight times the sum of its target; then [threads, P]: its weight
  int32_t exchange;  // [2, groups, columns, P], where threads share pixels
  int32_t under;     // [sizes]
  int32_t firsts;    // [N, P] of int64_t: of each row of the tile, where an exit's first number under it is
  int32_t columns;   // [sizes] of column_numbers()
  int32_t lines;     // [groups, line_columns, kLine]: what is interpolated from; then sums of cells take its place
  int32_t scattered;  // [threads, kScattered]
  int32_t added;      // of each size: [vectors, 2, columns, groups, K]: rows that tiles still add to, by their parity
  int32_t line_columns;
  int32_t total;
};

// A vector: Q of a size and a teacher or the labels, or S of an exit.
struct SmallArgs {
  Args<float> all;
  int32_t size_first[kMaxExits];    // an exit of the size
  int32_t finest;                   // the size with the most rows
  int64_t copies_from[kMaxExits];   // of each size: where the copies of its vectors begin
  int64_t copy_numbers[kMaxExits];  // of each size: those of a vector
  int64_t peaks_from[kMaxExits];
  uint8_t vectors[kMaxExits];  // of each size: its targets, first labels', then teachers'; then its exits' sums
  uint8_t rank[kMaxExits];     // of each exit, among them
  int32_t bands;               // of all strips of all images
  int32_t pitch;  // from a column of a copy to the next: groups K; channel c is at (c % groups) K + c / groups
  float *peaks, *copies;
  int64_t copies_begin;  // numbers of A from the first to the second
  double* combined;      // [T + 1, N, combined_blocks]: of losses, what combine_kernel sums
  int64_t combined_blocks;
  bool taken;  // the kernel was launched
  SmallLayout at;
};

static_assert(sizeof(SmallArgs) <= 4096, "all that a kernel is given");

// Where the copies of vectors are, once it is known how the output is cut; returns how many numbers they are.
inline int64_t place_vectors(SmallArgs& small) {
  const Args<float>& a = small.all;
  int64_t numbers = 0;
  for (int s = 0; s < a.sizes; ++s) {
    const int2 from = a.from[small.size_first[s]];
    small.copies_from[s] = numbers;
    small.copy_numbers[s] = Copies(a.cut, from.x, from.y, a.align_corners).begin(a.cut, a.size[0], 0, 0, small.pitch);
    numbers += small.vectors[s] * small.copy_numbers[s];
  }
  return numbers;
}

// The most columns of an exit of size s that lie under `columns` of the output.
SELFREG_AXIS int added_columns(const SmallArgs& args, int s, int columns) {
  return int(Axis{args.all.from[args.size_first[s]].y, args.all.size[2], args.all.align_corners}.most(columns));
}

template <class Shape>
SmallLayout small_layout(const SmallArgs& args, int threads) {
  const Args<float>& a = args.all;
  SmallLayout at{};
  auto take = [&at](int numbers) {
    const int begin = at.total;
    at.total += (numbers + 3) / 4 * 4;
    return begin;
  };
  const int columns = threads / a.groups;
  at.sums = take((a.T + 1) * a.N * threads / Shape::kSumTogether);
  at.gains = take((a.T + 1) * a.N);
  at.counted = take((a.T + 2) * threads * Shape::P);
  at.exchange = take(Shape::kSpread ? 2 * threads * Shape::P : 0);
  at.under = take(a.sizes * int(sizeof(Under) / sizeof(float)));
  at.firsts = take(a.N * Shape::P * 2);
  at.columns = take(a.sizes * column_numbers<float>(columns));
  int added = 0;
  at.line_columns = 1;
  for (int s = 0; s < a.sizes; ++s) {
    const int under = added_columns(args, s, columns);
    added += args.vectors[s] * 2 * under * a.groups * Shape::K;
    if (at.line_columns < under - 1) at.line_columns = under - 1;
  }
  at.lines = take(a.groups * at.line_columns * Shape::kLine);
  at.scattered = take(threads * Shape::kScattered);
  at.added = take(added);
  return at;
}

template <class Shape>
struct SmallWorker {
  using A = float;
  using S = typename Shape::S;
  static constexpr int K = Shape::K, P = Shape::P, kParts = Shape::kParts, kSumTogether = Shape::kSumTogether;

  const SmallArgs& args;
  const Args<A>& a;
  A* const shared;
  const int channels;  // of this thread
  int turn = 0;        // of the two exchange buffers

  int row;         // the tile's first
  bool all_count;  // the thread's pixels

  __device__ SmallWorker(const SmallArgs& small, A* numbers)
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
  SELFREG_DEVICE int size_of(int e) const { return a.size_number[e]; }
  SELFREG_DEVICE Axis rows_of(int s) const { return {a.from[args.size_first[s]].x, a.cut.height, a.align_corners}; }
  SELFREG_DEVICE Axis columns_of(int s) const { return {a.from[args.size_first[s]].y, a.cut.width, a.align_corners}; }
  SELFREG_DEVICE A* column_weights(int s) const { return shared + args.at.columns + s * column_numbers<A>(slots()); }
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

  SELFREG_DEVICE void sum_across_groups(A (&x)[P]) {
    if constexpr (Shape::kSpread) {
      // Two buffers in turn: who writes one again has passed the barrier after which all had read it.
      A* const buffer = shared + args.at.exchange + turn * threads() * P;
      turn ^= 1;
      store_shared(buffer + thread() * P, x);
      __syncthreads();
#pragma unroll
      for (int p = 0; p < P; ++p) x[p] = 0;
#pragma unroll 1
      for (int g = 0; g < a.groups; ++g) {
        A y[P];
        load_shared(buffer + (g * slots() + slot()) * P, y);
#pragma unroll
        for (int p = 0; p < P; ++p) x[p] += y[p];
      }
    }
  }

  // ---- bands and tiles ----

  SELFREG_DEVICE void begin_band(int number) {
    const Cut& cut = a.cut;
    const int line = unsigned(number) / unsigned(cut.strips), strip = number - line * cut.strips;
    const int image = unsigned(line) / unsigned(cut.bands);
    const int band = line - image * cut.bands, begin = strip * cut.columns;
    const int width = min(int(cut.width) - begin, cut.columns);
    row = band * cut.rows;
    __syncthreads();  // all are done with the last one
    for (int s = 0, added = args.at.added; s < a.sizes; ++s) {
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

  SELFREG_DEVICE int64_t read_label(int64_t pixel) const {
    switch (a.label_type) {
      case LabelType::uint8: return static_cast<const uint8_t*>(a.labels)[pixel];
      case LabelType::int32: return static_cast<const int32_t*>(a.labels)[pixel];
      default: return static_cast<const int64_t*>(a.labels)[pixel];
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

  SELFREG_DEVICE void begin_tile() {
    __syncthreads();  // all are done with the last one, or have begun the band
    for (int task = thread(); task < a.N + a.sizes; task += threads()) {
      const bool is_exit = task < a.N;
      const int rows = tile_rows(), s = is_exit ? size_of(task) : task - a.N;
      const Axis axis = rows_of(s);
      Under& u = under(s);
      int low[P];
#pragma unroll
      for (int p = 0; p < P; ++p) low[p] = int(axis.low(row + min(p, rows - 1)));
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
    const Under& u = under(0);
    const bool inside = slot() < u.width;
    const int64_t pixel = (int64_t(u.image) * a.cut.height + row) * a.cut.width + u.begin + (inside ? slot() : 0);
    A soft_w[P], label_w[P];  // label_w: times the class's weight
    int label[P];
    all_count = true;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t at = pixel + p * a.cut.width;
      soft_w[p] = !inside || p >= u.rows ? A(0) : a.pixel_weight ? a.pixel_weight[at] : A(1);
      label_w[p] = 0, label[p] = 0;
      if (a.labels && soft_w[p] != 0) {
        const int64_t y = read_label(at);
        const bool good = uint64_t(y) < uint64_t(a.C);
        if (good) label[p] = int(y);
        // Neither a class nor ignored: shows in the loss and in the gradient.
        label_w[p] = !good ? A(NAN) : a.class_weight ? soft_w[p] * a.class_weight[label[p]] : soft_w[p];
        if (y == a.ignore_index) {
          label_w[p] = A(-0.0);
          if (a.mask_soft || a.T == 0) soft_w[p] = 0;
        }
      }
      all_count = all_count && soft_w[p] != 0;
    }
    store_shared(counted(0), label_w);
    store_shared(weights(), soft_w);
    if (a.labels)
      for (int s = 0; s < a.sizes; ++s) scatter_labels(s, label, label_w);
  }

  // ---- interpolation ----

  // The exit's numbers under a span, of all channels: for each of its columns y, the step to the next column, the step
  // to the row below, and that of the next column less that; all times `rate`. All threads of the block; says whether
  // something is not finite.
  SELFREG_DEVICE bool draw_lines(int e, int span, A rate) const {
    const Under& u = under(size_of(e));
    const PixelView& view = a.exits[e];
    const int h = a.from[e].x, w = a.from[e].y, drawn = u.drawn;
    int c = u.cells.of(thread());
    const int x = thread() - c * u.cells.divisor;
    if (c >= drawn) return false;
    const int64_t right = w > 1 ? view.step[2] : 0, below = h > 1 ? view.step[1] : 0, step = drawn * view.channel;
    const S* from = static_cast<const S*>(view.data) + first_of(e, span) + (x * view.step[2] + c * view.channel);
    const A* const peak = args.peaks + args.peaks_from[e] + (u.peak[span] + x);
    const int next = w > 1, down = h > 1 ? w : 0;
    const A peaks[4] = {__ldg(peak), __ldg(peak + next), __ldg(peak + down), __ldg(peak + down + next)};
    A zero = 0;  // or NaN
#pragma unroll 1
    for (; c < a.C; c += drawn, from += step) {
      const S* const lower_from = from + below;
      const A left = to_number(__ldg(from)) - peaks[0], right_ = to_number(__ldg(from + right)) - peaks[1];
      const A lower = to_number(__ldg(lower_from)) - peaks[2];
      const A lower_right = to_number(__ldg(lower_from + right)) - peaks[3];
      const A across = right_ - left;
      const A line[4] = {left * rate, across * rate, (lower - left) * rate, ((lower_right - lower) - across) * rate};
      zero += (line[1] + line[2] + line[3]) * 0;
      store_shared(line_at(c, x), line);
    }
    return zero != 0;
  }
  // Of channel c.
  SELFREG_DEVICE A* line_at(int c, int x) const {
    const int g = Shape::kSpread ? int(unsigned(c) % unsigned(a.groups)) : 0;
    const int i = Shape::kSpread ? int(unsigned(c) / unsigned(a.groups)) : c;
    return shared + args.at.lines + (g * args.at.line_columns + x) * Shape::kLine + i * 4;
  }

  // y of exit e at the thread's pixels, times `rate`. Where there is no channel: so that its exponential is 0.
  SELFREG_DEVICE void interpolate(int e, A rate, A (&y)[K][P]) const {
    const Under& u = under(size_of(e));
    bool odd = false;
    auto draw = [&](int span) {
      __syncthreads();  // all have read the last lines
      odd |= __syncthreads_or(draw_lines(e, span, rate));
    };
    draw(0);
    read_lines<true>(e, 0, y);
#pragma unroll 1
    for (int span = u.end[0]; span < P; span = u.end[span]) {
      draw(span);
      read_lines<false>(e, span, y);
    }
    if (__builtin_expect(odd, false)) correct(e, rate, y);
    if (__builtin_expect(!all_count, false)) {  // what does not count is taken as zeros
      A weight[P];
      load_shared(weights(), weight);
      each([&](int i, int p) { y[i][p] = weight[p] != 0 ? y[i][p] : A(0); });
    }
  }

  // Of the span's rows, or of all: then the registers hold nothing before.
  template <bool all>
  SELFREG_DEVICE void read_lines(int e, int span, A (&y)[K][P]) const {
    const int s = size_of(e);
    const Under& u = under(s);
    const A weight = column_weights(s)[slot()];
    const A* const line = kept_shared(line_at(group(), column_lows(s)[slot()]));
    A below[P];
    load_shared(u.weight, below);
    bool here[P];
#pragma unroll
    for (int p = 0; p < P; ++p) here[p] = all || (p >= span && p < u.end[span]);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      A x[4];
      if (exists(i)) load_shared(line + i * 4, x);
      const A above = x[0] + weight * x[1], down = x[2] + weight * x[3];
#pragma unroll
      for (int p = 0; p < P; ++p)
        if (here[p]) y[i][p] = exists(i) ? above + below[p] * down : A(-1e30);
    }
  }

  // What is not finite is computed anew: where a weight is 0, the other number does not matter.
  SELFREG_DEVICE void correct(int e, A rate, A (&y)[K][P]) const {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      unsigned odd = 0;
#pragma unroll
      for (int i = 0; i < K; ++i) odd |= unsigned(!(y[i][p] - y[i][p] == 0)) << i;
#pragma unroll 1
      for (int k = 0; odd >> k != 0; ++k) {
        if (!(odd >> k & 1)) continue;
        const A number = interpolated(e, p, channel(k)) * rate;
#pragma unroll
        for (int i = 0; i < K; ++i) y[i][p] = i == k ? number : y[i][p];
      }
    }
  }
  SELFREG_DEVICE A interpolated(int e, int p, int c) const {
    const int s = size_of(e), h = a.from[e].x, w = a.from[e].y;
    const Under& u = under(s);
    const PixelView& view = a.exits[e];
    const int x = u.column + column_lows(s)[slot()];
    auto at = [&](int down, int right) {
      const int64_t i = u.low[p] + (h > 1 ? down : 0), j = x + (w > 1 ? right : 0);
      const S* const data = static_cast<const S*>(view.data);
      const A number =
          to_number(__ldg(data + u.image * view.step[0] + i * view.step[1] + j * view.step[2] + c * view.channel));
      return number - args.peaks[args.peaks_from[e] + (int64_t(u.image) * h + i) * w + j];
    };
    auto mix = [](A v, A n, A weight) { return weight == 0 ? v : weight == 1 ? n : (1 - weight) * v + weight * n; };
    const A weight = column_weights(s)[slot()];
    return mix(mix(at(0, 0), at(0, 1), weight), mix(at(1, 0), at(1, 1), weight), u.weight[p]);
  }

  // y becomes exp2(y), of which Z is the sum. Where all are small: exp2(y - rate * shift).
  SELFREG_DEVICE void exponentials(int e, A rate, A (&y)[K][P], A (&Z)[P], A (&shift)[P]) {
#pragma unroll
    for (int p = 0; p < P; ++p) Z[p] = shift[p] = 0;
    each([&](int i, int p) { Z[p] += y[i][p] = exp2_fast(y[i][p]); });
    sum_across_groups(Z);
    // That of e^-30, times `rate`: of teachers, sums of powers of these numbers are not to underflow, either.
    const A tiny = exp2_fast(A(-30) * (rate < A(kLog2e) ? rate : A(kLog2e)));
    bool small = false;
#pragma unroll
    for (int p = 0; p < P; ++p) small = small || Z[p] < tiny;
    if (Shape::kSpread) small = __syncthreads_or(small);
    if (__builtin_expect(small, false)) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (!(Z[p] < tiny)) {
          if (Shape::kSpread) Z[p] = group() == 0 ? Z[p] : A(0);
          continue;
        }
        A most = kLowest<A>;
#pragma unroll 1
        for (int c = 0; c < a.C; ++c) most = larger(most, interpolated(e, p, c));
        shift[p] = most == kLowest<A> ? A(NAN) : most;  // NaN: all are -infinity
        Z[p] = 0;
#pragma unroll 1
        for (int k = 0; k < channels; ++k) {
          const A number = exp2_fast((interpolated(e, p, channel(k)) - shift[p]) * rate);
          Z[p] += number;
#pragma unroll
          for (int i = 0; i < K; ++i) y[i][p] = i == k ? number : y[i][p];
        }
      }
      sum_across_groups(Z);
    }
  }

  // ---- the way back ----

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
  SELFREG_DEVICE void scatter_labels(int s, const int (&label)[P], const A (&label_w)[P]) const {
    const Under& u = under(s);
    scatter(s, 0, [&](int span) {
      A* const to = mine();
#pragma unroll
      for (int i = 0; i < K; i += 2) store_shared<4>(to + 2 * i, {0, 0, 0, 0});
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const bool here = p >= span && p < u.end[span];
        const int i = Shape::kSpread ? int(unsigned(label[p]) / unsigned(a.groups)) : label[p];
        if (!here || label_w[p] == 0 || (Shape::kSpread && label[p] - i * a.groups != group())) continue;
        A x[2];
        load_shared(to + 2 * i, x);
        x[0] += (1 - u.weight[p]) * label_w[p], x[1] += u.weight[p] * label_w[p];
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
    for (int s = 0; s < a.sizes; ++s)
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

  // ---- losses ----

  // -0 is what an ignored label counts; if the pixel counts for soft losses, it may be NaN.
  SELFREG_DEVICE static bool ignored(A x) { return x == 0 && copysign(A(1), x) < 0; }

  // Beside u = sum exp(y / tau), a raw power of tau != 1 needs Z = sum exp(y); at tau = 2 that is a sum of squares.
  SELFREG_DEVICE bool two_sums() const { return a.target == Target::raw && a.tau != A(1); }
  SELFREG_DEVICE bool squares() const { return two_sums() && a.tau == A(2); }

  // y: exponentials of y / tau, of teacher r, and u their sum; which becomes that of exp(y) if it is another. What y is
  // to be taken times to be the target, and the pixel's weight.
  SELFREG_DEVICE void teach(int r, const A (&y)[K][P], A (&u)[P], A (&times)[P]) {
    A Z[P] = {}, sum[P];
    if (squares()) {
      each([&](int i, int p) { Z[p] += power<2>(y[i][p]); });
    } else if (two_sums()) {
      each([&](int i, int p) { Z[p] += exp2_fast(log2_fast(y[i][p]) * a.tau); });
    }
    if (two_sums()) sum_across_groups(Z);
    load_shared(weights(), times);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      sum[p] = times[p];
      times[p] *= two_sums() ? exp2_fast(log2_fast(Z[p]) * (a.rate_tau * A(-kLn2))) : reciprocal(u[p]);
      if (two_sums()) sum[p] = u[p] * times[p], u[p] = Z[p];
    }
    store_shared(counted(r), sum);
  }

  // Of exit e, the parts of losses that are sums over pixels. What its exponentials, of which Z is the sum, are to be
  // taken times for the gradient.
  SELFREG_DEVICE void student(int e, const A (&Z)[P], const A (&shift)[P], A (&times)[P]) const {
    A log_z[P];
#pragma unroll
    for (int p = 0; p < P; ++p) log_z[p] = log_normalizer(Z[p]) + shift[p] * (a.rate * A(kLn2)), times[p] = 0;
#pragma unroll 1
    for (int r = a.labels ? 0 : 1; r <= a.T; ++r) {
      if (!teaches(r, e)) continue;
      const A g = gain(r, e);
      A sum[P], loss = 0;
      load_shared(counted(r), sum);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        loss += ignored(sum[p]) ? A(0) : sum[p] * log_z[p];
        if (g != 0 && sum[p] != 0) times[p] += sum[p] * g;  // else what the other is, be it infinite, is left out
      }
      put_loss(r, e, r == 0 ? loss : loss * a.log_z_scale);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) times[p] *= reciprocal(Z[p]);
  }

  // First teachers teach, then every exit learns; the last teacher first, as all it takes is at hand if tau is 1 or 2.
  SELFREG_DEVICE void tile() {
    begin_tile();
    const bool at_hand = a.T > 0 && (!two_sums() || squares());
#pragma unroll 1
    for (int step = 0; step < a.T + a.N; ++step) {
      bool teacher = step < a.T;
      const int e = teacher ? a.teachers[step] : a.order[step - a.T];
      const A rate = teacher ? a.rate_tau : a.rate;
      A y[K][P], Z[P], shift[P], times[P];
      interpolate(e, rate, y);
      exponentials(e, rate, y, Z, shift);
#pragma unroll 1
      while (true) {
        teacher ? teach(step + 1, y, Z, times) : student(e, Z, shift, times);
        const int first = teacher ? 0 : size_of(e), count = teacher ? a.sizes : a.grads[e].data ? 1 : 0;
        const int rank = teacher ? step + 1 : args.rank[e];
#pragma unroll 1
        for (int s = first; s < first + count; ++s) scatter_row(s, rank, y, times);
        if (!teacher || !at_hand || step < a.T - 1) break;
        teacher = false;
        ++step;
        if (squares()) each([&](int i, int p) { y[i][p] *= y[i][p]; });
      }
    }
  }

  SELFREG_DEVICE void run() {
    double label = 0, soft = 0;
    if (a.counts) {
#pragma unroll 1
      for (int i = thread(); i < a.count_blocks; i += threads()) label += a.counts[2 * i], soft += a.counts[2 * i + 1];
      label = block_sum(label);
      soft = block_sum(soft);
    }
    const bool mean = a.reduction == Reduction::mean;
    label = mean ? norm_of(label) : 1;
    soft = !mean ? 1 : !a.counts ? a.soft_norm : norm_of(soft);
    if (blockIdx.x == 0 && thread() == 0) a.norm[0] = label, a.norm[1] = soft;
    const int entries = (a.T + 1) * a.N;
#pragma unroll 1
    for (int i = thread(); i < entries; i += threads())
      shared[args.at.gains + entry(i / a.N, i % a.N)] = small_gain(a, i, label, soft);
    if (thread() % kSumTogether == 0)
#pragma unroll 1
      for (int i = 0; i < entries; ++i) shared[args.at.sums + (i * threads() + thread()) / kSumTogether] = 0;

#pragma unroll 1
    for (int band = blockIdx.x; band < args.bands; band += gridDim.x) {
      begin_band(band);
      do {
        tile();
        row += under(0).rows;
      } while (row < a.cut.height && unsigned(row) % unsigned(a.cut.rows) != 0);
      end_band();
    }

    __syncthreads();
    for (int i = thread() / 32; i < entries; i += threads() / 32) {  // a warp an entry
      double sum = 0;
      const A* const sums = shared + args.at.sums + entry(i / a.N, i % a.N) * threads() / kSumTogether;
#pragma unroll 1
      for (int k = thread() % 32; k < slots() / kSumTogether; k += 32) sum += double(sums[k]);
      sum = warp_sum(sum);
      if (thread() % 32 == 0) a.partial[int64_t(i) * gridDim.x + blockIdx.x] = sum;
    }
  }
};

// ---- before and after ------------------------------------------------------------------------------------------

constexpr int kSmallThreads = 256;
constexpr int64_t kMaxCombineBlocks = 512;

// The largest logit of each position of each exit.
template <class S>
__global__ void __launch_bounds__(kSmallThreads) peak_kernel(const __grid_constant__ SmallArgs a) {
  const int e = blockIdx.y;
  const PixelView& view = a.all.exits[e];
  const int64_t h = a.all.from[e].x, w = a.all.from[e].y, step = int64_t(gridDim.x) * kSmallThreads;
  for (int64_t i = int64_t(blockIdx.x) * kSmallThreads + threadIdx.x; i < a.all.size[0] * h * w; i += step) {
    const int64_t line = quotient(i, w), x = i - line * w, image = quotient(line, h), y = line - image * h;
    const S* from = static_cast<const S*>(view.data) + image * view.step[0] + y * view.step[1] + x * view.step[2];
    float peak = kLowest<float>;
#pragma unroll 8
    for (int c = 0; c < a.all.C; ++c, from += view.channel) peak = larger(peak, to_number(__ldg(from)));
    a.peaks[a.peaks_from[e] + i] = peak;
  }
}

// A thread an element of an exit's plane: of all copies that have it, S and Q, some channels at a time; the gradient,
// and each block's part of the losses.
template <class S>
__global__ void __launch_bounds__(kSmallThreads, 2) combine_kernel(const __grid_constant__ SmallArgs a) {
  constexpr int kChannels = 8;
  const Args<float>& all = a.all;
  const Cut& cut = all.cut;
  const int e = blockIdx.y, s = all.size_number[e], first_target = all.labels ? 0 : 1, row = a.pitch / all.groups;
  const PixelView &view = all.exits[e], &grad = all.grads[e];
  const int h = all.from[e].x, w = all.from[e].y;
  const Axis rows{h, cut.height, all.align_corners}, columns{w, cut.width, all.align_corners};
  const Copies copies(cut, h, w, all.align_corners);
  const float* const vectors = a.copies + a.copies_from[s];
  __shared__ float gains[kMaxExits + 1];
  __shared__ double dots[kMaxExits + 1][kSmallThreads];  // of any number of positions
  for (int r = threadIdx.x; r <= all.T; r += kSmallThreads)
    gains[r] = small_gain(all, r * all.N + e, all.norm[0], all.norm[1]);
  for (int r = 0; r <= all.T; ++r) dots[r][threadIdx.x] = 0;
  __syncthreads();

#pragma unroll 1
  for (int i = blockIdx.x * kSmallThreads + threadIdx.x; i < int(all.size[0]) * h * w; i += gridDim.x * kSmallThreads) {
    const int line = i / w, x = i - line * w, image = line / h, y = line - image * h;
    // The output's rows that lie on row y are those on y - 1 and on y: of some bands; and likewise of some strips.
    const int band0 = int(quotient(rows.first(y - 1), cut.rows));
    const int band1 = int(quotient(rows.first(y + 1) - 1, cut.rows));
    const int strip0 = int(quotient(columns.first(x - 1), cut.columns));
    const int strip1 = int(quotient(columns.first(x + 1) - 1, cut.columns));
    // Where in the copies of a vector: of a band's row and a strip's column. Rarely, there are more than two.
    const int copy_columns = int(copies.columns), copy = int(copies.rows) * copy_columns;
    auto row_of = [&](int band) {
      const int below = y - int(rows.low(int64_t(band) * cut.rows));
      return ((image * cut.bands + band) * cut.strips * copy + below * copy_columns) * a.pitch;
    };
    auto column_of = [&](int strip) {
      return (strip * copy + x - int(columns.low(int64_t(strip) * cut.columns))) * a.pitch;
    };
    const int row0 = row_of(band0), row1 = row_of(band1), column0 = column_of(strip0), column1 = column_of(strip1);
    const float peak = a.peaks[a.peaks_from[e] + i];
#pragma unroll 1
    for (int task = 0; task < all.groups * ((row + kChannels - 1) / kChannels); ++task) {
      const int first = task / all.groups * kChannels, g = task - task / all.groups * all.groups;
      const int number = g * row + first, channel = g + first * all.groups;  // in the copies, and of the exit
      const int count = min(kChannels, (all.C - channel + all.groups - 1) / all.groups);
      float z[kChannels], total[kChannels] = {}, sum[kChannels];
      const S* from = static_cast<const S*>(view.data) + image * view.step[0] + y * view.step[1] + x * view.step[2] +
                      channel * view.channel;
#pragma unroll
      for (int j = 0; j < kChannels; ++j, from += all.groups * view.channel)
        z[j] = j < count ? to_number(__ldg(from)) - peak : 0;
      auto add_copies = [&](int rank) {
        const float* const vector = vectors + rank * a.copy_numbers[s] + number;
#pragma unroll
        for (int j = 0; j < kChannels; ++j) sum[j] = 0;
#pragma unroll 1
        for (int band = band0; band <= band1; ++band) {
          const float* const band_row = vector + (band == band0 ? row0 : band == band1 ? row1 : row_of(band));
#pragma unroll 1
          for (int strip = strip0; strip <= strip1; ++strip) {
            const float* const at = band_row + (strip == strip0   ? column0
                                                : strip == strip1 ? column1
                                                                  : column_of(strip));
#pragma unroll
            for (int j = 0; j < kChannels; j += 2) {
              if (j >= count) continue;
              const float2 two = *reinterpret_cast<const float2*>(at + j);
              sum[j] += two.x, sum[j + 1] += two.y;
            }
          }
        }
      };
#pragma unroll 1
      for (int r = first_target; r <= all.T; ++r) {
        if (r > 0 && all.teachers[r - 1] == e) continue;
        add_copies(r);
        float dot = 0;
#pragma unroll
        for (int j = 0; j < kChannels; ++j) {
          if (sum[j] == 0) continue;
          dot += sum[j] * z[j];
          if (gains[r] != 0) total[j] -= gains[r] * sum[j];
        }
        dots[r][threadIdx.x] += double(dot);
      }
      if (!grad.data) continue;
      add_copies(a.rank[e]);
      S* to = static_cast<S*>(grad.data) + image * grad.step[0] + y * grad.step[1] + x * grad.step[2] +
              channel * grad.channel;
#pragma unroll
      for (int j = 0; j < kChannels; ++j, to += all.groups * grad.channel)
        if (j < count) *to = to_storage<S>(total[j] + sum[j]);
    }
  }
  __syncthreads();
  for (int r = threadIdx.x / 32; r <= all.T; r += kSmallThreads / 32) {  // a warp a target
    double sum = 0;
    for (int k = threadIdx.x % 32; k < kSmallThreads; k += 32) sum += dots[r][k];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0)
      a.combined[int64_t(r * all.N + e) * gridDim.x + blockIdx.x] = sum * (r == 0 ? -1 : -double(all.dot_scale));
  }
}

}  // namespace selfreg

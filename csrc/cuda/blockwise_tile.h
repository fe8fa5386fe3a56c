// A launch in passes over blocks of channels: what a block holds of its tile. blockwise.h says what it is for.
#pragma once

#include "args.h"
#include "phases.h"
#include "planning.h"

namespace selfreg {

constexpr int kBlockChannels = 8;  // of a thread, at a time

// What is kept of a teacher, a number a pixel: the sum of its target; its maximum, or its argmax; log2 of what its
// exponentials are taken times; the sum of exponentials of its softmax; where it learns, the factors of its gradient.
enum Taught { kSum, kMax, kLogFactor, kNormalizer, kLabelFactor, kSoftFactor, kTaught, kArgmax = kMax };

// Where a block keeps what in shared memory, counted in numbers of A.
struct BlockwiseLayout {
  int32_t teachers;  // [T, kTaught, threads]: see Taught
  int32_t students;  // [N, 2, threads], where teachers learn: their maxima, and log-normalisers of soft losses
  int32_t sums;      // [(T + 1) N, threads], of losses
  int32_t gains;     // [(T + 1) N], of the whole block
  int32_t exchange;  // [2, threads]
  int32_t columns;   // [N, slots, 2], where exits are resized: a pixel's column of the exit, the weight of the next one
  int32_t gradient;  // [kBlockChannels groups, slots], likewise
  int32_t total;
};

template <class A>
struct BlockwiseArgs {
  Args<A> all;
  bool by_lanes;         // neighbouring threads share a pixel, where its channels lie together; else warps do
  A* copies[kMaxExits];  // of the gradients of resized exits, or null
  BlockwiseLayout at;
};

static_assert(sizeof(BlockwiseArgs<double>) <= 4096, "all that a kernel is given");

// A block's band and tile: how its threads share pixels and channels, read exits and write gradients.
template <class S>
struct BlockwiseTile {
  using A = typename Accumulator<S>::type;
  static constexpr int I = kBlockChannels;
  static constexpr A kNoChannel = A(-1e30);  // the y of channels that do not exist: exp(y) = 0, and 0 y = 0

  const BlockwiseArgs<A>& args;
  const Args<A>& a;
  A* const shared;
  const int groups, slots, group, slot, thread;
  int turn = 0;  // of the two exchange buffers
  A all_class_weights = 0;
  // The tile: its image, row, first column and how many; the thread's column, its pixel, whether it exists, and what it
  // counts.
  int64_t image, row, begin, width, column, pixel;
  bool inside, counts;
  PixelWeights<A> weights;

  __device__ BlockwiseTile(const BlockwiseArgs<A>& arguments, A* numbers)
      : args(arguments),
        a(arguments.all),
        shared(numbers),
        groups(a.groups),
        slots(threads_of_block() / groups),
        group(args.by_lanes ? thread_of_block() % groups : thread_of_block() / slots),
        slot(args.by_lanes ? thread_of_block() / groups : thread_of_block() % slots),
        thread(thread_of_block()) {}

  // ---- helpers ----

  SELFREG_DEVICE A* column_of(int begin, int i) const { return shared + begin + i * threads_of_block() + thread; }
  SELFREG_DEVICE A& taught(int r, Taught what) const { return *column_of(args.at.teachers, r * kTaught + what); }
  SELFREG_DEVICE A& peak_of_student(int e) const { return *column_of(args.at.students, e * 2); }
  SELFREG_DEVICE A& log_z_of_student(int e) const { return *column_of(args.at.students, e * 2 + 1); }
  SELFREG_DEVICE bool resized(int e) const { return a.from[e].x != 0; }
  SELFREG_DEVICE bool argmax() const { return a.target == Target::argmax; }
  SELFREG_DEVICE int teacher_of(int e) const {
    for (int r = 0; r < a.T; ++r)
      if (a.teachers[r] == e) return r;
    return -1;
  }

  // Combines a number over the threads that share a pixel; all of them get it.
  template <class Op>
  SELFREG_DEVICE A across(A x, Op op) {
    if (groups == 1) return x;
    // Two buffers in turn: who writes one again has passed the barrier after which all had read it.
    A* const buffer = shared + args.at.exchange + turn * threads_of_block() + slot * groups;
    turn ^= 1;
    buffer[group] = x;
    __syncthreads();
    x = buffer[0];
#pragma unroll 1
    for (int g = 1; g < groups; ++g) x = op(x, buffer[g]);
    return x;
  }
  SELFREG_DEVICE A sum_across(A x) {
    return across(x, [](A u, A v) { return u + v; });
  }

  // f(first) for every block of channels: the thread has channels first + i groups below C.
  template <class F>
  SELFREG_DEVICE void over_blocks(F f) const {
#pragma unroll 1
    for (int first = 0; first < a.C; first += I * groups) f(first + group);
  }
  // f(i, channel) for those of a block that exist.
  template <class F>
  SELFREG_DEVICE void each(int first, F f) const {
#pragma unroll
    for (int i = 0; i < I; ++i)
      if (first + i * groups < a.C) f(i, first + i * groups);
  }

  // ---- reading ----

  // An exit at the thread's pixel.
  struct Source {
    const S* data;
    int64_t channel, right, below;  // in numbers: to the next channel, column, row
    A weight_right, weight_below;
    bool interpolated, counts;

    SELFREG_DEVICE A operator()(int64_t c) const {
      const S* const at = data + c * channel;
      if (!counts) return A(0);  // what a pixel has that does not count, be it NaN, plays no part
      if (!interpolated) return to_number(__ldg(at));
      // Where a weight is 0, the other number does not matter, be it infinite.
      auto mix = [](A u, A v, A w) { return w == 0 ? u : w == 1 ? v : (1 - w) * u + w * v; };
      const A upper = mix(to_number(__ldg(at)), to_number(__ldg(at + right)), weight_right);
      return mix(upper, mix(to_number(__ldg(at + below)), to_number(__ldg(at + below + right)), weight_right),
                 weight_below);
    }
  };
  SELFREG_DEVICE Source source(int e) const {
    const PixelView& view = a.exits[e];
    const S* const data = static_cast<const S*>(view.data) + image * view.step[0];
    if (!resized(e))
      return {data + row * view.step[1] + column * view.step[2], view.channel, 0, 0, 0, 0, false, counts};
    const Axis rows = rows_of(e);
    const int64_t low = rows.low(row);
    const A* const mine = under(e) + slot * 2;
    return {data + low * view.step[1] + int64_t(mine[0]) * view.step[2],
            view.channel,
            a.from[e].y > 1 ? view.step[2] : 0,
            a.from[e].x > 1 ? view.step[1] : 0,
            mine[1],
            rows.template weight<A>(row, low),
            true,
            counts};
  }
  // Numbers of a block of channels less `peak`.
  SELFREG_DEVICE void read(const Source& from, int first, A peak, A (&y)[I]) const {
#pragma unroll
    for (int i = 0; i < I; ++i) y[i] = first + i * groups < a.C ? from(first + i * groups) - peak : kNoChannel;
  }
  SELFREG_DEVICE A maximum(const Source& from) {
    A most = kLowest<A>;
    over_blocks([&](int first) { each(first, [&](int, int c) { most = larger(most, from(c)); }); });
    return across(most, [](A u, A v) { return larger(u, v); });
  }

  // Targets of teacher r, of a block of channels.
  SELFREG_DEVICE void read_targets(int r, const Source& teacher, int first, A (&q)[I]) const {
    read(teacher, first, taught(r, kMax), q);
#pragma unroll
    for (int i = 0; i < I; ++i) q[i] = exp2_fast(q[i] * a.rate_tau + taught(r, kLogFactor));
  }

  // ---- writing ----

  SELFREG_DEVICE void store(int e, int first, const A (&g)[I]) const {
    if (!inside) return;
    const PixelView& view = a.grads[e];
    S* const at = static_cast<S*>(view.data) + image * view.step[0] + row * view.step[1] + column * view.step[2];
    each(first, [&](int i, int c) { at[c * view.channel] = to_storage<S>(g[i]); });
  }

  SELFREG_DEVICE Axis rows_of(int e) const { return {a.from[e].x, a.cut.height, a.align_corners}; }
  SELFREG_DEVICE Axis columns_of(int e) const { return {a.from[e].y, a.cut.width, a.align_corners}; }
  SELFREG_DEVICE Copies copies_of(int e) const { return {a.cut, a.from[e].x, a.from[e].y, a.align_corners}; }
  // [slots, 2]: each pixel's column of exit e, and the weight of the column to its right.
  SELFREG_DEVICE A* under(int e) const { return shared + args.at.columns + e * slots * 2; }
  SELFREG_DEVICE A* copy_of(int e) const {
    const int64_t band = row / a.cut.rows, strip = begin / a.cut.columns;
    return args.copies[e] + copies_of(e).begin(a.cut, image, band, strip, a.C);
  }

  // Adds a block of channels of a resized exit's gradient, at the tile's pixels, to the band's copy. A thread takes a
  // column of the exit and a channel, and sums the pixels that lie on it, in order.
  SELFREG_DEVICE void scatter(int e, int first, const A (&g)[I]) const {
    A* const tile = shared + args.at.gradient;
#pragma unroll
    for (int i = 0; i < I; ++i) tile[(i * groups + group) * slots + slot] = inside ? g[i] : A(0);
    __syncthreads();
    const Axis rows = rows_of(e), columns = columns_of(e);
    const int64_t low = rows.low(row), column0 = columns.low(begin), copy_columns = copies_of(e).columns;
    const A weight = rows.template weight<A>(row, low);
    const int count = int(columns.high(begin + width - 1) - column0) + 1;
    const int channel0 = first - group, channels = min(a.C - channel0, I * groups);
    A* const copy = copy_of(e) + (low - rows.low(row / a.cut.rows * a.cut.rows)) * copy_columns * a.C + channel0;
#pragma unroll 1
    for (int task = thread; task < count * channels; task += threads_of_block()) {
      const int x = task % count, k = task / count;
      const int64_t from = columns.first(column0 + x - 1) - begin, end = columns.first(column0 + x + 1) - begin;
      A sum = 0;
#pragma unroll 1
      for (int p = from < 0 ? 0 : int(from); p < min(end, width); ++p) {
        const A* const mine = under(e) + p * 2;
        sum += (mine[0] == A(column0 + x) ? 1 - mine[1] : mine[1]) * tile[k * slots + p];
      }
      A* const to = copy + x * a.C + k;
      to[0] += (1 - weight) * sum;
      if (low + 1 < rows.from) to[copy_columns * a.C] += weight * sum;
    }
    __syncthreads();  // all are done with the tile
  }

  // ---- bands ----

  SELFREG_DEVICE void begin_band(int64_t number) {
    const Cut& cut = a.cut;
    const int64_t line = quotient(number, cut.strips);
    image = quotient(line, cut.bands);
    row = (line - image * cut.bands) * cut.rows;
    begin = (number - line * cut.strips) * cut.columns;
    width = min(cut.width - begin, int64_t(cut.columns));
    inside = slot < width;
    column = inside ? begin + slot : begin;
    __syncthreads();  // all are done with the last one
    for (int e = 0; e < a.N; ++e) {
      if (!resized(e)) continue;
      if (group == 0) {
        const Axis axis = columns_of(e);
        const int64_t low = axis.low(column);
        under(e)[slot * 2] = A(low);
        under(e)[slot * 2 + 1] = axis.template weight<A>(column, low);
      }
      if (!args.copies[e]) continue;
      const Copies copies = copies_of(e);
      A* const copy = copy_of(e);
#pragma unroll 1
      for (int64_t i = thread; i < copies.rows * copies.columns * a.C; i += threads_of_block()) copy[i] = 0;
    }
    __syncthreads();
  }
};

}  // namespace selfreg

// What the CUDA kernels are given, and how their blocks are laid out. launch.cu fills it, exit_loss.cu reads it.
#pragma once

#include <cuda_runtime.h>

#include "cuda_launch.h"
#include "resize.h"

namespace selfreg {

constexpr int kMaxExits = kMaxCudaExits;  // so that everything travels as kernel parameters, which end at 4 KB

// A tensor (C, pixels): pixel (i0, i1, i2) of channel c is at c * channel + i0 * step[0] + i1 * step[1] + i2 * step[2].
struct PixelView {
  void* data;
  int64_t channel, step[3];
};

// Where a block keeps what in shared memory, counted in numbers of A. What has a dimension of threads is theirs alone.
struct SharedLayout {
  int32_t targets;   // [T, threads, kTargetRow]
  int32_t scalars;   // [T, kScalars, threads, P]
  int32_t said;      // [N, 2, P, threads], where teachers learn
  int32_t sums;      // [N, T + 1, threads]
  int32_t gains;     // [N, T + 1], of the whole block
  int32_t ratios;    // [N], likewise: an exit's gain of the label loss by that of its first teacher's
  int32_t exchange;  // [2, P, threads] or [2, P, pixel threads, exchange_pitch], where several threads share a pixel
  int32_t staged;    // [threads, staged_row] of the storage type, Layout::staged
  int32_t staged_row;
  uint32_t staged_gaps;  // j staged_gaps / 2^32: the gaps of one word of 16 bytes before the j-th such word
  int32_t places;        // [N] Place, of the whole block, Layout::resized
  int32_t columns;       // [sizes] of column_numbers(), likewise
  int32_t lines;         // [groups, line_columns, kLine, 4], likewise
  int32_t line_columns;
  int32_t scattered;  // [threads, kScattered, 2], likewise
  int32_t total;
};

// Quotients by the same number, in two instructions; exact where number times divisor is below 2^32.
struct Divisor {
  int32_t divisor;
  uint32_t inverse;  // 2^32 / divisor, rounded up; 0 of 1
  SELFREG_AXIS void set(int d) { divisor = d, inverse = d > 1 ? 0xffffffffu / unsigned(d) + 1 : 0; }
  SELFREG_AXIS int of(int n) const { return inverse ? int(uint64_t(unsigned(n)) * inverse >> 32) : n; }
};

// What of a resized exit lies under a block's band, and under the tile at hand; in shared memory. A span: the tile's
// rows that lie between the same two of the exit's; it goes by the first of them.
template <class A, int P>
struct Place {
  A* copy;                       // the band's own copy of the gradient, or null
  int32_t copy_columns;          // its row, in columns
  int32_t row, column, columns;  // the exit's first row, its columns
  int32_t pixels;                // of the output, in a row of the strip
  Divisor cells;                 // of a line
  int32_t drawn;                 // how many channels of a line the block draws at a time
  int64_t right, below;          // in the exit, in numbers: from a column to the next, from a row to the next
  A weight[P];                   // of each row of the tile: that of the exit's row below it
  int64_t first[P];              // likewise: where the first number of the exit's row above it is, from its first one
  int32_t end[P];                // of each span: the row after its last
  A* copy_rows[2 * P];           // likewise: where its gradient is added to, for the row above and the row below
  int32_t more;                  // bits, likewise: whether there is something already
};
// Under a strip of columns, for each: the weight of the column to its right, [columns] of A; its column [columns] of
// int32_t; then where each of the exit's begins, [columns + 3] of uint16_t, unless there are more.
template <class A>
SELFREG_AXIS constexpr int column_numbers(int columns) {
  return columns + (columns * 4 + (columns + 3) * 2 + int(sizeof(A)) - 1) / int(sizeof(A));
}

// How many columns an interpolated line has, of an exit of which so many lie under a strip of `columns`: the pairs of
// neighbours that pixels lie between, or the pixels, where there are fewer.
SELFREG_AXIS constexpr bool is_wide(int64_t under, int columns) { return under > columns + 1; }
SELFREG_AXIS constexpr int line_columns(int64_t under, int columns) {
  return is_wide(under, columns) ? columns : under > 1 ? int(under) - 1 : 1;
}

template <class A>
struct Args {
  PixelView exits[kMaxExits], grads[kMaxExits];
  int32_t order[kMaxExits];     // exits in the order they are processed: the last teacher, the other teachers, the rest
  int32_t teachers[kMaxExits];  // [T]
  A weights[(kMaxExits + 1) * kMaxExits];  // [T + 1, N], where grad_losses is null
  int32_t N, T, C;
  int64_t pixels, size[3];  // pixels = size[0] * size[1] * size[2], the dimensions of `step`
  int32_t dims;             // how many of them are not 1; those come last
  bool alike;               // all exits and gradients have the same steps
  bool align_corners;
  int2 from[kMaxExits];  // Layout::resized: the sizes (h, w) of exits that are resized; 0 of the others
  int32_t sizes;         // likewise, how many there are; which one it is of each exit, numbered as they come
  uint8_t size_number[kMaxExits];
  Cut cut;              // likewise; `grads` of resized exits are then their private copies
  Divisor added_parts;  // likewise: tasks of a column

  const void* labels;  // [pixels], or null
  LabelType label_type;
  const A* class_weight;  // [C], or null
  const A* pixel_weight;  // [pixels], or null
  const A* grad_losses;   // [T + 1, N], or [T + 1, N, pixels] with Reduction::none, or null
  Target target;
  Reduction reduction;
  A tau, rate_tau;           // temperature, log2(e) / temperature
  A rate;                    // of exponentials that label and soft losses share: log2(e), or rate_tau
  A log_z_scale, dot_scale;  // of soft losses, as pixel_math.h has them; 1 and 1 for argmax
  A hot_weight, smoothing;   // what label smoothing leaves at the label, and gives to every class
  int64_t ignore_index;
  bool mask_soft, teacher_learns;

  const double* counts;  // [count_blocks, 2]: phase 0's sums for label and soft losses; null: nothing to divide by
  int32_t count_blocks;
  double soft_norm;  // of soft losses where `counts` is null
  double* norm;      // [2], what the sums of label and of soft losses are multiplied by; written for phase 3
  double* partial;   // [T + 1, N, blocks]: each block's sums of losses
  A* maps;           // [T + 1, N, pixels] with Reduction::none

  int32_t groups;  // Layout::planes: over how many threads the channels of a pixel are spread
  int32_t rows;    // accesses in which a thread covers its channels
  SharedLayout at;
};

static_assert(sizeof(Args<double>) <= 4096, "all that a kernel is given");

// How the threads of a block share pixels and channels.
enum class Layout {
  planes,   // neighbouring threads on neighbouring pixels, channels `groups` apart; any strides
  staged,   // channels_last, few channels: a thread one or two pixels; a warp's rows go through shared memory
  lanes,    // channels_last: the channels of a pixel across some lanes of a warp
  resized,  // as planes, but a thread's pixels lie below each other, and some exits are of another size: resize.h
};

// For how many channels there are kernels: 8, 16, 24, 32; and where most of the work is also 20 and 22, for 19 and 21,
// or 28 and 30, so that few of a thread's channels may not exist.
constexpr bool has_fine_steps(Layout layout, int V, bool plain) {
  return plain && layout != Layout::lanes && layout != Layout::resized && V == 2;
}
constexpr bool has_fine_last_steps(Layout layout, int V, bool plain) {
  return plain && layout == Layout::planes && V == 1;
}
// The largest number of channels below K for which there is a kernel.
constexpr int next_fewer(int K, Layout layout, int V, bool plain) {
  if (has_fine_steps(layout, V, plain) && K > 16 && K <= 24) return K == 20 ? 16 : K - 2;
  if (has_fine_last_steps(layout, V, plain) && K > 24) return K == 28 ? 24 : K - 2;
  return K - 8;
}

// The shape of a thread's work: K channels in accesses of V numbers, neighbouring pixels except in lanes: channels.
// resized: of one pixel each, V of them.
// kWhole: they are all the thread has to do with, and stay in registers; else it takes one block of channels after the
// other, and every pass reads them again.
// kPlain: none of what is rarely asked for, or costs much where it is: argmax, label smoothing, maps instead of sums,
// and label losses beside renormalised ones.
template <Layout layout, int K_, int V_, int lanes, bool whole, bool plain>
struct Shape {
  static constexpr Layout kLayout = layout;
  static constexpr int K = K_, V = V_, kLanes = lanes;
  static constexpr bool kWhole = whole, kPlain = plain;
  static constexpr int kPixels = layout == Layout::lanes ? 1 : V;  // of a thread
  static constexpr int kAccesses = layout == Layout::lanes ? K / V : K;
  // The launch takes the smallest K that will do: as many channels as the next one has exist for sure.
  static constexpr int kSureAccesses = !whole || layout == Layout::lanes ? 0 : next_fewer(K, layout, V, plain);
  // A thread's target row in shared memory: an odd number of accesses, so that a warp's threads meet in no bank.
  static constexpr int kTargetVector = kAccesses * V % 4 == 0 ? 4 : 2;
  static constexpr int kTargetRow = (kAccesses * V / kTargetVector | 1) * kTargetVector;
  // Bounds that leave a thread about 64 registers beside its row. More threads only where a pixel is spread over warps.
  static constexpr bool kSpread = layout == Layout::planes || layout == Layout::resized;
  static constexpr int kMaxThreads = !kSpread || K <= 16 ? 128 : K * V > 32 || layout == Layout::resized ? 384 : 512;
  static constexpr int kMinBlocks = kMaxThreads > 128                                              ? 1
                                    : !whole || layout == Layout::resized || K * V > 24            ? 3
                                    : K * V <= 8                                                   ? 6
                                    : K * V > 16 || V == 2 || (layout == Layout::staged && !plain) ? 4
                                                                                                   : 5;
  // What of a row is stored a target and pixel beside it.
  static constexpr int kScalars = whole ? 2 : 3;
  static_assert(layout != Layout::resized || kAccesses < 32);
  // How many channels of a gradient are scattered at a time: half a row, for with all of it a multiprocessor would have
  // room for two blocks only. A multiple of four numbers, which are one access.
  static constexpr int kScattered = !whole ? kAccesses : (kAccesses + 3) / 4 * 2;
  static constexpr int kAddedTogether = 2;  // when they are added to a column's gradient
  // Of a column of an interpolated line, with room for what is scattered, the distance to the next: odd, so that they
  // are in different banks. Channels that do not exist may be read from beyond it.
  static constexpr int kLine = (kAccesses + kScattered - 1) / kScattered * kScattered | 1;
};

// Whether threads that share a pixel read its numbers four at a time: they then lie side by side, and those of pixels
// an odd number of fours apart, so that a warp's threads meet in no bank.
template <class Shape, class A>
constexpr bool exchanges_fours = Shape::kLayout == Layout::planes && sizeof(A) == 4;
SELFREG_AXIS constexpr int exchange_pitch(int groups) { return groups < 4 ? groups | 1 : ((groups + 3) / 4 | 1) * 4; }

// Where a thread's numbers lie among those that are scattered. Where that is not an odd number of fours, two or four
// threads of a warp meet in a bank; of the longest rows, gaps would cost a block of three.
template <class Shape>
SELFREG_AXIS constexpr int scattered_at(int thread) {
  return thread * Shape::kScattered * 2;
}

template <class Shape, class A>
SharedLayout shared_layout(const Args<A>& a, int threads, int storage_bytes) {
  const int per_thread = threads * Shape::kPixels;
  SharedLayout at{};
  auto take = [&at](int numbers) {
    const int begin = at.total;
    at.total += (numbers + 3) / 4 * 4;
    return begin;
  };
  at.targets = take(Shape::kWhole && a.target != Target::argmax ? a.T * threads * Shape::kTargetRow : 0);
  at.scalars = take(a.T * Shape::kScalars * per_thread);
  at.said = take(a.teacher_learns ? a.N * 2 * per_thread : 0);
  at.sums = take(a.reduction == Reduction::none ? 0 : (a.T + 1) * a.N * threads);
  at.gains = take((a.T + 1) * a.N);
  at.ratios = take(a.N);
  const int numbers = exchanges_fours<Shape, A> ? threads / a.groups * exchange_pitch(a.groups) : threads;
  at.exchange = take(Shape::kSpread && a.groups > 1 ? 2 * Shape::kPixels * numbers : 0);
  if (Shape::kLayout == Layout::staged) {
    // Where threads lie an even number of accesses apart they meet in banks. Of 16 bytes there is one more; otherwise
    // two of them meet at most.
    at.staged_row = Shape::kPixels * a.C;
    if (at.staged_row * storage_bytes % 32 == 0) {
      at.staged_gaps = 0xffffffffu / unsigned(at.staged_row * storage_bytes / 16) + 1;
      at.staged_row += 16 / storage_bytes;
    }
    at.staged = take((threads * at.staged_row * storage_bytes + 15) / int(sizeof(A)));
  }
  if (Shape::kLayout == Layout::resized) {
    const int columns = threads / a.groups;
    at.places = take(a.N * int(sizeof(Place<A, Shape::kPixels>) / sizeof(A)));
    at.columns = take(a.sizes * column_numbers<A>(columns));
    for (int e = 0; e < a.N; ++e) {
      if (!a.from[e].x) continue;
      const int needed = line_columns(Axis{a.from[e].y, a.size[2], a.align_corners}.most(columns), columns);
      if (at.line_columns < needed) at.line_columns = needed;
    }
    at.lines = take(a.groups * at.line_columns * Shape::kLine * 4);
    at.scattered = take(scattered_at<Shape>(threads));
  }
  return at;
}

}  // namespace selfreg

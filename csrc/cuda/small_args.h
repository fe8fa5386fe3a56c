// What the kernels of small exits are given, and where their blocks keep what: see small_exits.h.
#pragma once

#include "access.h"
#include "phases.h"

namespace selfreg {

// Channels of a thread, and of all that share its pixels.
constexpr int kMostOfThread = 22, kMostSmallChannels = 16 * kMostOfThread;

// A thread has up to K channels of four rows of a column of the output; `spread`: some threads share them.
template <class S_, int K_, bool spread, bool plain>
struct SmallShape {
  using S = S_;
  static constexpr int K = K_, P = 4, kParts = K / 2;  // a part: two channels, for the exit's rows above and below
  static constexpr bool kSpread = spread, kPlain = plain;
  static constexpr int kMaxThreads = spread ? 256 : 128, kMinBlocks = spread ? 1 : !plain ? 2 : K <= 16 ? 4 : 3;
  static constexpr int kSure = spread && !plain ? 0
                               : spread         ? (K > 16 ? 16 : 8)  // channels that exist
                               : plain          ? next_fewer<8, 16, 20, 22>(K)
                                                : next_fewer<8, 16, 22>(K);
  // From one column to the next, in numbers: odd numbers of fours, so that a warp's threads meet in no bank.
  static constexpr int kLine = (K | 1) * 4, kScattered = (kParts | 1) * 4;
  static constexpr int kSumTogether = 4;  // how many threads share their sums of losses
};

// Under a strip of columns, for each: the weight of the column to its right, [columns] of float; its column [columns]
// of int32_t; then where each of the exit's begins, [columns + 3] of uint16_t.
SELFREG_AXIS constexpr int column_numbers(int columns) { return columns + (columns * 4 + (columns + 3) * 2 + 3) / 4; }

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

struct SmallLayout {
  int32_t sums;      // [N, T + 1, threads / kSumTogether]
  int32_t gains;     // [N, T + 1], of the whole block
  int32_t counted;   // [T + 1, threads, P]: a pixel's weight times the sum of its target; then [threads, P]: its weight
  int32_t exchange;  // [2, groups, columns, P], where threads share pixels
  int32_t kept;      // [T, 2, threads, P], where exits are of the output's size
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
  int32_t sizes;  // how many there are; which one it is of each exit, numbered as they come
  uint8_t size_number[kMaxExits];
  int32_t size_first[kMaxExits];    // an exit of the size
  int32_t finest;                   // the size with the most rows
  bool mixed;                       // some exits are of the output's size
  int64_t copies_from[kMaxExits];   // of each size: where the copies of its vectors begin
  int64_t copy_numbers[kMaxExits];  // of each size: those of a vector
  int64_t peaks_from[kMaxExits];
  uint8_t vectors[kMaxExits];  // of each size: its targets, first labels', then teachers'; then its exits' sums
  uint8_t rank[kMaxExits];     // of each exit, among them
  int32_t bands;               // of all strips of all images
  int32_t pitch;  // from a column of a copy to the next: groups K; channel c is at (c % groups) K + c / groups
  float *peaks, *copies;
  double* combined;  // [T + 1, N, blocks of combine_kernel]: of losses, what it sums
  SmallLayout at;
};

static_assert(sizeof(SmallArgs) <= 4096, "all that a kernel is given");

// Where the copies of vectors are, once it is known how the output is cut; returns how many numbers they are.
inline int64_t place_vectors(SmallArgs& small) {
  const Args<float>& a = small.all;
  int64_t numbers = 0;
  for (int s = 0; s < small.sizes; ++s) {
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
  auto take = [&at](int numbers) { return take_shared(at.total, numbers); };
  const int columns = threads / a.groups;
  at.sums = take((a.T + 1) * a.N * threads / Shape::kSumTogether);
  at.gains = take((a.T + 1) * a.N);
  at.counted = take((a.T + 2) * threads * Shape::P);
  at.exchange = take(Shape::kSpread ? 2 * threads * Shape::P : 0);
  at.kept = take(args.mixed ? a.T * 2 * threads * Shape::P : 0);
  at.under = take(args.sizes * int(sizeof(Under) / sizeof(float)));
  at.firsts = take(a.N * Shape::P * 2);
  at.columns = take(args.sizes * column_numbers(columns));
  int added = 0;
  at.line_columns = 1;
  for (int s = 0; s < args.sizes; ++s) {
    const int under = added_columns(args, s, columns);
    added += args.vectors[s] * 2 * under * a.groups * Shape::K;
    if (at.line_columns < under - 1) at.line_columns = under - 1;
  }
  at.lines = take(a.groups * at.line_columns * Shape::kLine);
  at.scattered = take(threads * Shape::kScattered);
  at.added = take(added);
  return at;
}

}  // namespace selfreg

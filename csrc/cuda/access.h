// How the threads of a block share the pixels and channels of exits of the output's size, and read and write them: one
// struct a layout, in planes.h, staged.h and lanes.h, with the same members, which full_size.h is written with. Each
// holds a row of a few channels of one or two pixels a thread:
//
//   planes   a thread   pixel(s) side by side, channels group, group + groups, ...   neighbours: the next pixels
//   staged   a thread   one or two pixels, all channels                              neighbours: the next pixels
//   lanes    8 or 32 threads share a pixel; a thread V channels side by side, then those 8 V or 32 V further on
//
// Template parameters, of all of them:
//   S   the storage type of exits and gradients
//   K   channels of a thread, at most
//   V   numbers of an access: neighbouring pixels, and of lanes neighbouring channels
// and constants:
//   P   pixels of a thread            I   accesses in which it has its channels of them
//   kLanes  lanes of a warp that share a pixel
//   kRare   whether there are registers for what few launches ask for: see Args::plain
//   kSure   accesses that exist for sure, for the launch takes the smallest K that will do
//   kMaxThreads, kMinBlocks   the launch bounds, which leave a thread about 64 registers beside its row
#pragma once

#include <type_traits>

#include "args.h"
#include "device.h"

namespace selfreg {

// Where a block keeps what in shared memory, counted in numbers. What has a dimension of threads is theirs alone, and
// needs no barrier.
struct FullSizeLayout {
  int32_t targets;   // [T, threads, kTargetRow]
  int32_t scalars;   // [T, 2, threads, P]: the sum of a target; the argmax it is of
  int32_t sums;      // [N, T + 1, threads], of losses
  int32_t gains;     // [N, T + 1], of the whole block
  int32_t ratios;    // [N], likewise: an exit's gain of the label loss by that of its first teacher's
  int32_t exchange;  // planes: [2, P, slots, exchange_pitch], where several threads share a pixel
  int32_t staged;    // staged: [threads, staged_row] of S
  int32_t staged_row;
  uint32_t staged_gaps;  // j staged_gaps / 2^32: the gaps of one word of 16 bytes before the j-th such word
  int32_t total;
};

struct FullSizeArgs {
  Args<float> all;
  FullSizeLayout at;
};
static_assert(sizeof(FullSizeArgs) <= 4096, "all that a kernel is given");

// Room for `numbers` more of them, aligned to 16 bytes: where it begins.
inline int32_t take_shared(int32_t& total, int numbers) {
  const int32_t begin = total;
  total += (numbers + 3) / 4 * 4;
  return begin;
}

// The largest K below `K` in a list of them, or 0: a row of K channels has more than that.
template <int... Ks>
constexpr int next_fewer(int K) {
  int fewer = 0;
  ((fewer = Ks < K && Ks > fewer ? Ks : fewer), ...);
  return fewer;
}

// Of a row of so many numbers. (Some shapes have one block fewer: what few launches ask for would spill there.)
constexpr int min_blocks(int max_threads, int row) {
  return max_threads > 128 ? 1 : row > 24 ? 3 : row > 16 ? 4 : row > 8 ? 5 : 6;
}

// What all layouts share: the thread's pixels, and where they are in a view.
template <class S_, int K_, int V_, int P_>
struct Access {
  using S = S_;
  using A = float;
  static constexpr int K = K_, V = V_, P = P_;

  const Args<A>& a;
  const FullSizeLayout& at;
  A* const shared;
  // The tile's pixels of this thread: the first, whether it exists; and where it is in views with the same steps.
  int64_t pixel, i2, offset;
  int i0, i1;
  bool inside;

  __device__ Access(const FullSizeArgs& args, A* numbers) : a(args.all), at(args.at), shared(numbers) {}

  SELFREG_DEVICE void begin_tile(int64_t first) {
    pixel = first;
    inside = pixel < a.pixels;  // P divides the number of pixels
    locate();
    offset = offset_in(a.exits[0]);
  }
  SELFREG_DEVICE void locate() {
    i0 = i1 = 0;
    i2 = inside ? pixel : 0;  // what does not exist is read as the first pixel
    if (a.dims <= 1) return;
    const int64_t place = i2;
    int64_t rows;
    if (a.pixels <= 0xffffffffll) {  // several times as fast
      rows = unsigned(place) / unsigned(a.size[2]);
      if (a.dims == 3) i0 = unsigned(rows) / unsigned(a.size[1]);
    } else {
      rows = place / a.size[2];
      if (a.dims == 3) i0 = int(rows / a.size[1]);
    }
    i2 = place - rows * a.size[2];
    i1 = int(rows - i0 * a.size[1]);
  }
  SELFREG_DEVICE int64_t offset_in(const PixelView& view) const {
    int64_t to = i2 * view.step[2];
    if (a.dims > 1) to += i1 * view.step[1];
    if (a.dims > 2) to += i0 * view.step[0];
    return to;
  }
  SELFREG_DEVICE S* origin_of(const PixelView& view) const {
    return static_cast<S*>(view.data) + (a.same_steps ? offset : offset_in(view));
  }
};

}  // namespace selfreg

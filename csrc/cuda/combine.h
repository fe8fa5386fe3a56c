// Small exits, before and after the main kernel: the largest logit of each position; and the sum of the blocks' copies,
// of which the gradients and the losses' last parts are made.
#pragma once

#include "small_args.h"

namespace selfreg {

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
  const int e = blockIdx.y, s = a.size_number[e], first_target = all.labels ? 0 : 1, row = a.pitch / all.groups;
  const PixelView &view = all.exits[e], &grad = all.grads[e];
  const int h = all.from[e].x, w = all.from[e].y;
  const Axis rows{h, cut.height, all.align_corners}, columns{w, cut.width, all.align_corners};
  const Copies copies(cut, h, w, all.align_corners);
  const float* const vectors = a.copies + a.copies_from[s];
  __shared__ float gains[kMaxExits + 1];
  __shared__ double dots[kMaxExits + 1][kSmallThreads];  // of any number of positions
  for (int r = threadIdx.x; r <= all.T; r += kSmallThreads)
    gains[r] = gain_of(all, r * all.N + e, Norms{all.norm[0], all.norm[1]});
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

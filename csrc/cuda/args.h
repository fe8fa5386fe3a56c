// What the CUDA kernels are given. launch.cu fills it in; every kernel reads it.
#pragma once

#include <cuda_runtime.h>

#include "../axis.h"
#include "cuda_launch.h"

namespace selfreg {

constexpr int kMaxExits = kMaxCudaExits;  // so that everything travels as kernel parameters, which end at 4 KB

// A tensor (C, pixels): pixel (i0, i1, i2) of channel c is at c * channel + i0 * step[0] + i1 * step[1] + i2 * step[2].
struct PixelView {
  void* data;
  int64_t channel, step[3];
};

// Quotients by the same number, in two instructions; exact where number times divisor is below 2^32.
struct Divisor {
  int32_t divisor;
  uint32_t inverse;  // 2^32 / divisor, rounded up; 0 of 1
  SELFREG_AXIS void set(int d) { divisor = d, inverse = d > 1 ? 0xffffffffu / unsigned(d) + 1 : 0; }
  SELFREG_AXIS int of(int n) const { return inverse ? int(uint64_t(unsigned(n)) * inverse >> 32) : n; }
};

// How an output is cut where exits are interpolated: into bands of rows and strips of columns. A block takes a band of
// a strip at a time, walks down it, and alone adds to its private copy of the part of a gradient that lies under it.
// Copies overlap by a few rows and columns; a last kernel adds them up, in order.
struct Cut {
  int64_t height, width;                 // of the output
  int32_t rows, columns, bands, strips;  // of a band, of a strip; bands of a strip, strips of an image
};

// The private copies of an exit's gradient: [B, bands, strips, rows, columns, channels] of A.
struct Copies {
  int64_t rows, columns;  // at most
  SELFREG_AXIS Copies(const Cut& cut, int64_t h, int64_t w, bool align_corners)
      : rows(Axis{h, cut.height, align_corners}.most(cut.rows)),
        columns(Axis{w, cut.width, align_corners}.most(cut.columns)) {}
  // In numbers: where the copy of one band begins.
  SELFREG_AXIS int64_t begin(const Cut& cut, int64_t image, int64_t band, int64_t strip, int64_t channels) const {
    return ((image * cut.bands + band) * cut.strips + strip) * rows * columns * channels;
  }
};

// How the threads of a block share pixels and channels.
enum class Layout {
  planes,  // neighbouring threads on neighbouring pixels, the channels of a pixel spread over warps; any strides
  staged,  // channels_last, few channels: a thread one or two pixels; a warp's rows go through shared memory
  lanes,   // channels_last: the channels of a pixel across some lanes of a warp
};

template <class A>
struct Args {
  PixelView exits[kMaxExits], grads[kMaxExits];
  uint8_t order[kMaxExits];     // exits in the order they are processed: the last teacher, the other teachers, the rest
  uint8_t teachers[kMaxExits];  // [T]
  A weights[(kMaxExits + 1) * kMaxExits];  // [T + 1, N], where grad_losses is null
  int32_t N, T, C;
  int64_t pixels, size[3];  // pixels = size[0] * size[1] * size[2], the dimensions of `step`
  int32_t dims;             // how many of them are not 1; those come last
  bool same_steps;          // all exits and gradients have the same ones
  bool align_corners;
  int2 from[kMaxExits];  // the sizes (h, w) of exits that are resized; 0 of the others
  Cut cut;

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

  int32_t groups;  // over how many threads the channels of a pixel are spread, where they are spread over warps

  // Label losses take exp(y); renormalised ones of another temperature than 1 take exp(y / tau): beside each other they
  // need both.
  SELFREG_AXIS bool two_rates() const { return target == Target::renormalized && labels && T > 0; }
  // Nothing that few launches ask for. The fast kernels are compiled with and without: to ask at every turn, and the
  // registers for it, would cost all others some percent.
  SELFREG_AXIS bool plain() const { return target != Target::argmax && smoothing == 0 && !two_rates(); }
};

static_assert(sizeof(Args<double>) <= 4096, "all that a kernel is given");

}  // namespace selfreg

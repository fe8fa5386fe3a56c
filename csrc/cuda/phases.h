// What the kernels of phases 1 and 2 begin and end with, whichever way they take.
#pragma once

#include "args.h"
#include "device.h"

namespace selfreg {

// The thread's place among all of the block.
SELFREG_DEVICE int thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }
SELFREG_DEVICE int threads_of_block() { return blockDim.x * blockDim.y; }

// What the sums of label and of soft losses are multiplied by, from the partial sums of phase 0. All threads of the
// block; the first block writes it down for phase 3.
struct Norms {
  double label, soft;
};
template <class A>
SELFREG_DEVICE Norms find_norms(const Args<A>& a) {
  double label = 0, soft = 0;
  if (a.counts) {
#pragma unroll 1
    for (int i = thread_of_block(); i < a.count_blocks; i += threads_of_block())
      label += a.counts[2 * i], soft += a.counts[2 * i + 1];
    label = block_sum(label);
    soft = block_sum(soft);
  }
  const bool mean = a.reduction == Reduction::mean;
  const Norms norms{mean ? norm_of(label) : 1, !mean ? 1 : !a.counts ? a.soft_norm : norm_of(soft)};
  if (blockIdx.x == 0 && thread_of_block() == 0) a.norm[0] = norms.label, a.norm[1] = norms.soft;
  return norms;
}

// What multiplies sigma - target in the gradients, entry i = r N + e: the loss's own gradient times the mean's divisor,
// and tau of soft targets.
template <class A>
SELFREG_DEVICE A gain_of(const Args<A>& a, int i, const Norms& norms) {
  const bool of_labels = i < a.N;
  const A rate = of_labels || a.target == Target::argmax ? A(1) : a.tau;
  if (a.reduction == Reduction::none) return rate;
  return product(a.grad_losses ? a.grad_losses[i] : a.weights[i], A(of_labels ? norms.label : norms.soft)) * rate;
}

template <class A>
SELFREG_DEVICE A class_weight(const Args<A>& a, int c) {
  return a.class_weight ? a.class_weight[c] : A(1);
}
// The sum of all class weights, which label smoothing needs; all threads of the block.
template <class A>
SELFREG_DEVICE A sum_class_weights(const Args<A>& a) {
  if (a.smoothing == 0) return A(0);
  double sum = 0;
#pragma unroll 1
  for (int c = thread_of_block(); c < a.C; c += threads_of_block()) sum += double(class_weight(a, c));
  return A(block_sum(sum));
}

template <class A>
SELFREG_DEVICE int64_t label_at(const Args<A>& a, int64_t pixel) {
  switch (a.label_type) {
    case LabelType::uint8: return static_cast<const uint8_t*>(a.labels)[pixel];
    case LabelType::int32: return static_cast<const int32_t*>(a.labels)[pixel];
    default: return static_cast<const int64_t*>(a.labels)[pixel];
  }
}

// A pixel's weights and label.
template <class A>
struct PixelWeights {
  A soft, label;  // of soft losses, of label losses
  A hot;          // what the label's class counts there, less what smoothing gives to all
  int label_class;
};
template <class A>
SELFREG_DEVICE PixelWeights<A> weigh_pixel(const Args<A>& a, bool exists, int64_t pixel) {
  PixelWeights<A> w{A(exists), A(0), A(0), 0};
  if (exists && a.pixel_weight) w.soft = a.pixel_weight[pixel];
  if (!a.labels) return w;
  const int64_t y = exists ? label_at(a, pixel) : a.ignore_index;
  const bool good = uint64_t(y) < uint64_t(a.C);
  if (y != a.ignore_index) {
    w.label = w.soft;
    if (good) w.label_class = int(y);
    // Neither a class nor ignored: shows in the loss and in the gradient.
    if (w.label != 0) w.hot = good ? class_weight(a, w.label_class) * a.hot_weight : A(NAN);
  }
  if (a.mask_soft) w.soft = w.label;
  return w;
}

// For an argmax as torch's: the first of the largest, of which NaN is one. Where all are -infinity, `top` stays the
// lowest number, and any channel is as large.
template <class A>
SELFREG_DEVICE A larger_or_nan(A u, A v) {
  return u != u ? u : v != v ? v : larger(u, v);
}
template <class A>
SELFREG_DEVICE bool is_largest(A x, A top) {
  return x == top || (x != x && top != top) || top == kLowest<A>;
}

// Writes the block's part of every loss, from sums [entries, threads] in shared memory, `pitch` numbers an entry; of
// them count `count`, `apart` from each other. entry(i) is where entry i stands. All threads of the block.
template <class A, class Entry>
SELFREG_DEVICE void write_partial_sums(const Args<A>& a, const A* sums, int pitch, int count, int apart, Entry entry) {
  __syncthreads();
  for (int i = thread_of_block() / 32; i < (a.T + 1) * a.N; i += threads_of_block() / 32) {  // a warp an entry
    double sum = 0;
#pragma unroll 1
    for (int k = thread_of_block() % 32; k < count; k += 32) sum += double(sums[entry(i) * pitch + k * apart]);
    sum = warp_sum(sum);
    if (thread_of_block() % 32 == 0) a.partial[int64_t(i) * gridDim.x + blockIdx.x] = sum;
  }
}

}  // namespace selfreg

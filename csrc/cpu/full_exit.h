// An exit of the output's size among smaller ones: what is taught it stays in the block, and so does its gradient.
#pragma once

#include "frame.h"
#include "pixel_weights.h"
#include "storage.h"

namespace {

template <class A>
struct FullExit {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const View *exit, *grad;
  bool here;  // whether the exit is of that size
  int C;
  int64_t apart;
  V* y;  // [C, apart] of a block, less the pixel's maximum, in units of ln 2

  void lay_out(Memory& m, const Frame<A>& frame, int e) {
    exit = &frame.L.exits[e], grad = &frame.L.grads[e];
    here = !frame.plan.resizes[e].needed;
    C = frame.C, apart = frame.apart;
    y = here ? m.template take<V>(C * apart) : nullptr;
  }

  // Pixels that do not count are cleared: a NaN there reaches nothing.
  void read(const Frame<A>& frame, const PixelWeights<A>& pixels, int64_t b) const {
    over_numbers(frame, *exit, b, [](auto* from, A* to, int64_t n) { convert(to, from, n); }, y, true);
    const V lowest = fill<V>(A(sizeof(A) == 4 ? -3.402823466e38 : -1.7976931348623157e308));
    for (int r = 0; r < frame.rows; ++r) {
      const V counted = pixels.counted(frame.L)[r];
      V most = lowest;
      for (int64_t at = r; at < C * apart; at += apart) {
        y[at] = counted == A(0) ? V{} : y[at];
        most = larger(y[at], most);
      }
      for (int64_t at = r; at < C * apart; at += apart) y[at] = (y[at] - most) * A(kLog2e);
    }
  }
  // As Exponentials::take.
  template <class Job>
  void take(int rows, A scale, const Job job, V* Z1, V* Z2) const {
    for (int r = 0; r < rows; ++r) {
      V first{}, second{};
      for (int64_t at = r; at < C * apart; at += apart)
        job.put(at, y[at] * scale, first, second, [](V x) { return exp2_of(x, A(1)); });
      Z1[r] = first, Z2[r] = second;
    }
  }
  // The sum over pixels of weight * sum_c target(c, row) y_c. 0 log 0 = 0.
  template <class From>
  double dot(int rows, const From target, const V* weight) const {
    using Sums = typename VecOf<A>::Sums;
    V sum{};
    for (int r = 0; r < rows; ++r) {
      V of_pixel{};
      for (int c = 0; c < C; ++c) {
        const V share = target(c, r);
        of_pixel += share == A(0) ? V{} : share * y[c * apart + r];
      }
      sum += weight[r] == A(0) ? V{} : weight[r] * of_pixel;
    }
    const Sums wide = __builtin_convertvector(sum, Sums);
    double all_lanes = 0;
    for (int k = 0; k < kLanes; ++k) all_lanes += wide[k];
    return all_lanes;
  }

  // The block's gradient g [C, apart]: factor[row] * from(c, row); less gain * weight[row] * target(c, row).
  template <class From>
  void set(int rows, const From from, const V* factor, V* g) const {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < C; ++c) g[c * apart + r] = from(c, r) * factor[r];
  }
  template <class From>
  void subtract(int rows, const From target, A gain, const V* weight, V* g) const {
    for (int r = 0; r < rows && gain != 0; ++r) {
      const V k = weight[r] == A(0) ? V{} : weight[r] * gain;
      for (int c = 0; c < C; ++c) g[c * apart + r] -= k * target(c, r);
    }
  }
  void write(const Frame<A>& frame, int64_t b, V* g) const {
    over_numbers(frame, *grad, b, [](auto* to, const A* from, int64_t n) { convert(to, from, n); }, g, false);
  }
  void write_zeros(const Frame<A>& frame, int64_t b, V* g) const {
    memset(g, 0, C * apart * sizeof(V));
    write(frame, b, g);
  }

 private:
  // Block b of a tensor, number by number side by side: copy(tensor's, block's, how many), to the block or from it.
  template <class Copy>
  void over_numbers(const Frame<A>& frame, const View& v, int64_t b, Copy copy, V* block, bool to_block) const {
    if constexpr (sizeof(A) == 8) {
      over_numbers_as<double>(frame, v, b, copy, block, to_block);
    } else {
      switch (frame.L.dtype) {
        case DType::float32: over_numbers_as<float>(frame, v, b, copy, block, to_block); break;
        case DType::float16: over_numbers_as<Half>(frame, v, b, copy, block, to_block); break;
        default: over_numbers_as<BFloat>(frame, v, b, copy, block, to_block);
      }
    }
  }
  template <class S, class Copy>
  void over_numbers_as(const Frame<A>& frame, const View& v, int64_t b, Copy copy, V* block, bool to_block) const {
    const int64_t x = b * kLanes, left = v.W - x;
    const int columns = int(left < kLanes ? left : kLanes);
    const bool channels_together = v.stride_c == 1 && v.stride_w != 1 && C >= kLanes && columns == kLanes;
    for (int r = 0; r < frame.rows; ++r) {
      S* const row = static_cast<S*>(v.data) + frame.image * v.stride_b + (frame.top + r) * v.stride_h + x * v.stride_w;
      if (channels_together) {
        for (int c0 = 0; c0 < C; c0 += kLanes) {  // the last vector overlaps the one before
          const int c = c0 + kLanes <= C ? c0 : C - kLanes;
          V pixels[kLanes];
          if (!to_block) {
            for (int k = 0; k < kLanes; ++k) pixels[k] = block[(c + k) * apart + r];
            transpose<V, VInt>(pixels);
          }
          for (int k = 0; k < kLanes; ++k) copy(row + k * v.stride_w + c, reinterpret_cast<A*>(pixels + k), kLanes);
          if (!to_block) continue;
          transpose<V, VInt>(pixels);
          for (int k = 0; k < kLanes; ++k) block[(c + k) * apart + r] = pixels[k];
        }
        continue;
      }
      for (int c = 0; c < C; ++c) {
        A* const numbers = reinterpret_cast<A*>(block + c * apart + r);
        S* const there = row + c * v.stride_c;
        if (v.stride_w == 1 && columns == kLanes) {
          copy(there, numbers, kLanes);
          __builtin_prefetch(there + int64_t(4) * kLanes, 0, 2);
        } else {
          for (int k = 0; k < columns; ++k) copy(there + k * v.stride_w, numbers + k, 1);
        }
        for (int k = columns; k < kLanes && to_block; ++k) numbers[k] = 0;
      }
    }
  }
};

}  // namespace

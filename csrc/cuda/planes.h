// NCHW, and any other strides: neighbouring threads on neighbouring pixels. Where a pixel has more channels than a
// thread can hold, `groups` warps share it, and exchange through shared memory.
#pragma once

#include "access.h"

namespace selfreg {

template <class S_, int K_, int V_>
struct Planes : Access<S_, K_, V_, V_> {
  using Base = Access<S_, K_, V_, V_>;
  using Base::K, Base::P, Base::V, Base::a, Base::at, Base::shared;
  using typename Base::A;
  using typename Base::S;
  static constexpr int I = K, kLanes = 1;
  static constexpr bool kRare = V < 4;
  static constexpr int kSure = V == 2 ? next_fewer<8, 16, 20, 22, 24>(K) : next_fewer<8, 16, 24, 30, 32>(K);
  static constexpr int kMaxThreads = K <= 16 ? 128 : K * V > 32 ? 384 : 512;  // more only where warps share a pixel
  static constexpr int kMinBlocks = V == 2 && K == 8 ? 4 : min_blocks(kMaxThreads, K* V);

  const bool alone;    // on its pixels
  const int accesses;  // that are this thread's
  int turn = 0;        // of the two exchange buffers

  __device__ Planes(const FullSizeArgs& args, A* numbers)
      : Base(args, numbers), alone(a.groups == 1), accesses(alone ? a.C : (a.C - group() + a.groups - 1) / a.groups) {}

  SELFREG_DEVICE static int slot() { return threadIdx.x; }
  SELFREG_DEVICE static int slots() { return blockDim.x; }
  SELFREG_DEVICE static int group() { return threadIdx.y; }
  SELFREG_DEVICE static constexpr int pixel_of(int v) { return v; }
  SELFREG_DEVICE int channel(int i, int) const { return group() + i * a.groups; }
  SELFREG_DEVICE bool exists(int i) const { return i < kSure || i < accesses; }
  // Which access channel c is of: negative or beyond, if it is not of this thread.
  SELFREG_DEVICE int place_of(int c) const {
    if (alone) return c;
    const int ahead = c - group();
    return ahead >= 0 && ahead % a.groups == 0 ? ahead / a.groups : -1;
  }
  SELFREG_DEVICE static constexpr int place(int i, int) { return i; }

  // Combines a number of every pixel over the threads that share the pixel; all of them get it. Their numbers lie side
  // by side and are read four at a time; those of pixels an odd number of fours apart, so that a warp's threads meet in
  // no bank.
  SELFREG_AXIS static constexpr int exchange_pitch(int groups) {
    return groups < 4 ? groups | 1 : ((groups + 3) / 4 | 1) * 4;
  }
  template <class Op>
  SELFREG_DEVICE void across(A (&x)[P], Op op) {
    if (alone) return;
    const int pitch = exchange_pitch(a.groups), size = slots() * pitch;
    // Two buffers in turn: who writes one again has passed the barrier after which all had read it.
    A* const buffer = shared + at.exchange + turn * P * size + slot() * pitch;
    turn ^= 1;
#pragma unroll
    for (int p = 0; p < P; ++p) buffer[p * size + group()] = x[p];
    __syncthreads();
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const A* const row = buffer + p * size;
      x[p] = row[0];
      A y[4];
      int g = 0;
#pragma unroll 1
      for (; g + 4 <= a.groups; g += 4) {
        load_shared(row + g, y);
        y[0] = op(op(y[0], y[1]), op(y[2], y[3]));
        x[p] = g == 0 ? y[0] : op(x[p], y[0]);
      }
      for (g += g == 0; g < a.groups; ++g) x[p] = op(x[p], row[g]);
    }
  }

  // One number of exit e.
  SELFREG_DEVICE A number(int e, int p, int c) const {
    const PixelView& view = a.exits[e];
    return to_number(__ldg(this->origin_of(view) + uint32_t(c) * uint32_t(view.channel) + p));
  }

  // The row of exit e, where there is no channel the lowest number; and its maxima. `again`: it will be read once more.
  SELFREG_DEVICE void load(int e, bool again, A (&to)[I][V], A (&peak)[P]) const {
    const PixelView& view = a.exits[e];
    const S* const from = this->origin_of(view);
    const uint32_t step = uint32_t(a.groups) * uint32_t(view.channel);
    typename Word<sizeof(S) * V>::type words[I];
    auto load_all = [&](auto once) {
      const S* p = opaque(from + uint32_t(group()) * uint32_t(view.channel));
#pragma unroll
      for (int i = 0; i < I; ++i, p += step) {
        A lowest[V];
#pragma unroll
        for (int v = 0; v < V; ++v) lowest[v] = kLowest<A>;
        words[i] = exists(i) ? selfreg::load<S, V, decltype(once)::value>(p) : pack<S, V>(lowest);
      }
    };
    again ? load_all(std::false_type()) : load_all(std::true_type());
#pragma unroll
    for (int i = 0; i < I; ++i) unpack<S, V>(words[i], to[i]);
    if constexpr (sizeof(S) == 2 && V % 2 == 0) {
      // Pairs of halves are compared as such: half the instructions, and exact.
      const unsigned (&pairs)[I][V / 2] = reinterpret_cast<const unsigned (&)[I][V / 2]>(words);
#pragma unroll
      for (int k = 0; k < V / 2; ++k) {
        unsigned top = pairs[0][k];
#pragma unroll
        for (int i = 1; i < I; ++i) top = larger_of_pairs<S>(top, pairs[i][k]);
        A two[2];
        unpack<S, 2>(top, two);
        peak[2 * k] = two[0], peak[2 * k + 1] = two[1];
      }
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        peak[v] = to[0][v];
#pragma unroll
        for (int i = 1; i < I; ++i) peak[v] = larger(peak[v], to[i][v]);
      }
    }
  }

  SELFREG_DEVICE void store(int e, const A (&from)[I][V]) const {
    if (!this->inside) return;
    const PixelView& view = a.grads[e];
    S* p = this->origin_of(view) + uint32_t(group()) * uint32_t(view.channel);
    if constexpr (I > 8) p = opaque(p);  // a short row's kernels would spill
    const uint32_t step = uint32_t(a.groups) * uint32_t(view.channel);
#pragma unroll
    for (int i = 0; i < I; ++i, p += step)
      if (exists(i)) selfreg::store<S, V>(p, from[i]);
  }

  static void take(const Args<A>& args, int threads, FullSizeLayout& to) {
    const int numbers = 2 * P * (threads / args.groups) * exchange_pitch(args.groups);
    to.exchange = take_shared(to.total, args.groups > 1 ? numbers : 0);
  }
};

}  // namespace selfreg

// channels_last: the channels of a pixel lie together, and some lanes of a warp share it.
#pragma once

#include "access.h"

namespace selfreg {

// L: how many lanes share a pixel.
template <class S_, int K_, int V_, int L>
struct Lanes : Access<S_, K_, V_, 1> {
  using Base = Access<S_, K_, V_, 1>;
  using Base::K, Base::P, Base::V, Base::a;
  using typename Base::A;
  using typename Base::S;
  static constexpr int I = K / V, kLanes = L, kSure = 0;
  static constexpr bool kRare = true;
  static constexpr int kMaxThreads = 128, kMinBlocks = K == 16 ? 4 : min_blocks(kMaxThreads, K);

  const int accesses;  // of which the thread has a channel

  __device__ Lanes(const FullSizeArgs& args, A* numbers)
      : Base(args, numbers), accesses((a.C - group() * V + L * V - 1) / (L * V)) {}

  SELFREG_DEVICE static int slot() { return threadIdx.x / L; }
  SELFREG_DEVICE static int slots() { return blockDim.x / L; }
  SELFREG_DEVICE static int group() { return threadIdx.x % L; }
  SELFREG_DEVICE static constexpr int pixel_of(int) { return 0; }
  SELFREG_DEVICE int channel(int i, int v) const { return group() * V + v + i * L * V; }
  SELFREG_DEVICE bool exists(int i) const { return i < accesses; }
  // Where in the thread's row channel c is: negative or beyond, if it is not.
  SELFREG_DEVICE int place_of(int c) const {
    const int ahead = c - group() * V, v = ahead % (L * V);
    return ahead >= 0 && v < V ? ahead / (L * V) * V + v : -1;
  }
  SELFREG_DEVICE static constexpr int place(int i, int v) { return i * V + v; }

  template <class Op>
  SELFREG_DEVICE void across(A (&x)[P], Op op) const {
#pragma unroll
    for (int other = 1; other < L; other *= 2) x[0] = op(x[0], __shfl_xor_sync(0xffffffffu, x[0], other));
  }

  SELFREG_DEVICE A number(int e, int, int c) const {
    const PixelView& view = a.exits[e];
    return to_number(__ldg(this->origin_of(view) + uint32_t(c) * uint32_t(view.channel)));
  }

  SELFREG_DEVICE void load(int e, bool again, A (&to)[I][V], A (&peak)[P]) const {
    const PixelView& view = a.exits[e];
    const S* const from = this->origin_of(view);
    const uint32_t step = L * V * uint32_t(view.channel);
    typename Word<sizeof(S) * V>::type words[I];
    auto load_all = [&](auto once) {
      const S* p = opaque(from + uint32_t(group() * V) * uint32_t(view.channel));
#pragma unroll
      for (int i = 0; i < I; ++i, p += step) {
        A lowest[V];
#pragma unroll
        for (int v = 0; v < V; ++v) lowest[v] = kLowest<A>;
        words[i] = exists(i) ? selfreg::load<S, V, decltype(once)::value>(p) : pack<S, V>(lowest);
      }
    };
    again ? load_all(std::false_type()) : load_all(std::true_type());
    peak[0] = kLowest<A>;
#pragma unroll
    for (int i = 0; i < I; ++i) {
      unpack<S, V>(words[i], to[i]);
#pragma unroll
      for (int v = 0; v < V; ++v) peak[0] = larger(peak[0], to[i][v]);
    }
  }

  SELFREG_DEVICE void store(int e, const A (&from)[I][V]) const {
    if (!this->inside) return;
    const PixelView& view = a.grads[e];
    S* p = this->origin_of(view) + uint32_t(group() * V) * uint32_t(view.channel);
    if constexpr (I > 8) p = opaque(p);  // a short row's kernels would spill
    const uint32_t step = L * V * uint32_t(view.channel);
#pragma unroll
    for (int i = 0; i < I; ++i, p += step)
      if (exists(i)) selfreg::store<S, V>(p, from[i]);
  }

  static void take(const Args<A>&, int, FullSizeLayout&) {}
};

}  // namespace selfreg

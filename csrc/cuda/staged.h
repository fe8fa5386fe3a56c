// channels_last, few channels: a thread has whole pixels. The rows of a warp's pixels lie one after the other in
// memory, and are copied to shared memory and back, neighbouring threads neighbouring words.
#pragma once

#include "access.h"

namespace selfreg {

template <class S_, int K_, int V_>
struct Staged : Access<S_, K_, V_, V_> {
  using Base = Access<S_, K_, V_, V_>;
  using Base::K, Base::P, Base::V, Base::a, Base::at, Base::shared;
  using typename Base::A;
  using typename Base::S;
  static constexpr int I = K, kLanes = 1;
  static constexpr bool kRare = V == 1;
  static constexpr int kSure = V == 2 ? next_fewer<8, 16, 20, 22, 24>(K) : next_fewer<8, 16, 24, 32>(K);
  static constexpr int kMaxThreads = 128;
  static constexpr int kMinBlocks = V == 2 && K == 8 ? 4 : K == 16 && V == 1 ? 4 : min_blocks(kMaxThreads, K* V);

  using Base::Base;

  SELFREG_DEVICE static int slot() { return threadIdx.x; }
  SELFREG_DEVICE static int slots() { return blockDim.x; }
  SELFREG_DEVICE static constexpr int group() { return 0; }
  SELFREG_DEVICE static constexpr int pixel_of(int v) { return v; }
  SELFREG_DEVICE static constexpr int channel(int i, int) { return i; }
  SELFREG_DEVICE bool exists(int i) const { return i < kSure || i < a.C; }
  SELFREG_DEVICE static int place_of(int c) { return c; }
  SELFREG_DEVICE static constexpr int place(int i, int) { return i; }
  template <class Op>
  SELFREG_DEVICE void across(A (&)[P], Op) const {}

  SELFREG_DEVICE A number(int e, int p, int c) const {
    const PixelView& view = a.exits[e];
    return to_number(__ldg(this->origin_of(view) + p * a.C + c));
  }

  // Room for the rows of this warp's pixels, and for those of this thread's.
  SELFREG_DEVICE S* staged_rows() const {
    return reinterpret_cast<S*>(shared + at.staged) + threadIdx.x / 32 * 32 * at.staged_row;
  }
  SELFREG_DEVICE S* staged_row() const { return staged_rows() + threadIdx.x % 32 * at.staged_row; }

  // Numbers lying side by side in a staged row, in one access.
  template <int n>
  SELFREG_DEVICE static void get(const S* from, A (&to)[n]) {
    unpack<S, n>(*reinterpret_cast<const typename Word<sizeof(S) * n>::type*>(from), to);
  }
  template <int n>
  SELFREG_DEVICE static void put(S* to, const A (&from)[n]) {
    *reinterpret_cast<typename Word<sizeof(S) * n>::type*>(to) = pack<S, n>(from);
  }
  // f(std::integral_constant of how many numbers an access to a row takes): as many as divide it.
  template <int n = 16 / sizeof(S), class F>
  SELFREG_DEVICE void with_access(F f) const {
    if constexpr (n == 1) {
      f(std::integral_constant<int, 1>());
    } else if constexpr (I % n == 0) {
      a.C % n == 0 ? f(std::integral_constant<int, n>()) : with_access<n / 2>(f);
    } else {
      with_access<n / 2>(f);
    }
  }
  // Two rows of an odd number of channels are read and written in pairs that both share in the middle, which are an odd
  // number: threads meet in no bank. The second row's pairs begin with the first one's last number.
  SELFREG_DEVICE bool in_pairs() const { return P == 2 && a.C % 2 == 1; }

  SELFREG_DEVICE void load(int e, bool again, A (&to)[I][V], A (&peak)[P]) const {
    copy_rows<true>(static_cast<S*>(a.exits[e].data), again);
    const S* const row = staged_row();
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) to[i][v] = kLowest<A>;
    if (in_pairs()) {
#pragma unroll
      for (int i = 0; i < I; i += 2) {
        if (!exists(i)) continue;
        A x[2];
        get(row + i, x);
        to[i][0] = x[0];
        if (exists(i + 1)) to[i + 1][0] = x[1];
        get(row + a.C - 1 + i, x);
        if (i > 0) to[i - 1][V - 1] = x[0];
        to[i][V - 1] = x[1];
      }
    } else {
      with_access([&](auto numbers) {
        constexpr int n = decltype(numbers)::value;
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int i = 0; i < I; i += n) {
            if (!exists(i)) continue;
            A x[n];
            get(row + v * a.C + i, x);
#pragma unroll
            for (int k = 0; k < n; ++k) to[i + k][v] = x[k];
          }
        }
      });
    }
    __syncwarp();
#pragma unroll
    for (int v = 0; v < V; ++v) {
      peak[v] = to[0][v];
#pragma unroll
      for (int i = 1; i < I; ++i) peak[v] = larger(peak[v], to[i][v]);
    }
  }

  SELFREG_DEVICE void store(int e, const A (&from)[I][V]) const {
    S* const row = staged_row();
    if (in_pairs()) {
#pragma unroll
      for (int i = 0; i < I; i += 2) {
        if (!exists(i)) continue;
        put<2>(row + i, {from[i][0], exists(i + 1) ? from[i + 1][0] : from[0][V - 1]});
        if (i > 0) put<2>(row + a.C - 1 + i, {from[i - 1][V - 1], from[i][V - 1]});
      }
    } else {
      with_access([&](auto numbers) {
        constexpr int n = decltype(numbers)::value;
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int i = 0; i < I; i += n) {
            if (!exists(i)) continue;
            A x[n];
#pragma unroll
            for (int k = 0; k < n; ++k) x[k] = from[i + k][v];
            put(row + v * a.C + i, x);
          }
        }
      });
    }
    __syncwarp();
    copy_rows<false>(static_cast<S*>(a.grads[e].data), false);
  }

  // The rows of a warp's pixels, one after the other in memory, to their places in shared memory, or back. Some of a
  // thread's words are on their way at a time.
  template <bool load>
  SELFREG_DEVICE void copy_rows(S* pixels, bool again) const {
    constexpr int kVector = 16 / sizeof(S), kWords = (I * P + kVector - 1) / kVector, kAtOnce = kWords < 5 ? kWords : 3;
    S* const rows = staged_rows();
    const int lane = threadIdx.x % 32;
    const int64_t first = this->pixel - lane * P, left = a.pixels - first;
    const int count = left <= 0 ? 0 : int(left < 32 * P ? left : 32 * P) * a.C, words = count / kVector;
    pixels += first * a.C;
    auto place = [&](int j) {  // with the gaps before it
      return reinterpret_cast<uint4*>(rows) + j + int(uint64_t(unsigned(j)) * at.staged_gaps >> 32);
    };
#pragma unroll
    for (int k0 = 0; k0 < kWords; k0 += kAtOnce) {
      uint4 word[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int j = lane + 32 * (k0 + k);
        const uint4* const from = reinterpret_cast<const uint4*>(pixels) + j;
        if (j < words) word[k] = !load ? *place(j) : again ? __ldg(from) : __ldcs(from);
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int j = lane + 32 * (k0 + k);
        if (j >= words) continue;
        if constexpr (load) {
          *place(j) = word[k];
        } else {
          __stcs(reinterpret_cast<uint4*>(pixels) + j, word[k]);
        }
      }
    }
    // Where words do not divide what the last warp has, there are no gaps.
    for (int i = words * kVector + lane; i < count; i += 32) (load ? rows : pixels)[i] = (load ? pixels : rows)[i];
    __syncwarp();
  }

  static void take(const Args<A>& args, int threads, FullSizeLayout& to) {
    // Where threads lie an even number of accesses apart they meet in banks. Of 16 bytes there is one more; otherwise
    // two of them meet at most.
    constexpr int bytes = sizeof(S);
    to.staged_row = P * args.C;
    if (to.staged_row * bytes % 32 == 0) {
      to.staged_gaps = 0xffffffffu / unsigned(to.staged_row * bytes / 16) + 1;
      to.staged_row += 16 / bytes;
    }
    to.staged = take_shared(to.total, (threads * to.staged_row * bytes + 15) / int(sizeof(A)));
  }
};

}  // namespace selfreg

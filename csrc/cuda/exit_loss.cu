// The exit-loss matrix on a GPU: phases 1 and 2 in one kernel. Compiled once for each storage type (SELFREG_STORAGE).
// What is commonly asked of small exits has a kernel of its own: small_exits.h.
// Forward, forward with gradients and the recomputing backward are all this kernel: gradients are written where there
// is room for them.
//
// A block takes tiles of pixels in turn. A thread holds some channels of one or V pixels; what it shares with nobody
// (targets, sums) has its own column in shared memory, which needs no barrier. Per tile:
//   phase 1  each teacher: read, maximum, exponentials and their sums; its target row goes to shared memory
//   phase 2  each exit: read and maximum, if not just done; sums of exponentials; each loss; its gradient
// Phase 0 (what the means divide by) comes before, the fixed-order sum over blocks (phase 3) after, in launch.cu.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "device.h"
#include "launch.h"
#include "small_exits.h"

namespace selfreg {
namespace {

#if SELFREG_STORAGE == 0
using S = float;
#elif SELFREG_STORAGE == 1
using S = double;
#elif SELFREG_STORAGE == 2
using S = __half;
#else
using S = __nv_bfloat16;
#endif
using A = Accumulator<S>::type;

// The y of channels that do not exist: exp(y) = 0, and 0 y = 0.
constexpr A kNoChannel = A(-1e30);

template <class Shape>
struct Worker {
  static constexpr Layout kLayout = Shape::kLayout;
  static constexpr int V = Shape::V, P = Shape::kPixels, I = Shape::kAccesses, kLanes = Shape::kLanes;
  static constexpr int kTargetVector = Shape::kTargetVector;
  static constexpr bool kWhole = Shape::kWhole, kPlain = Shape::kPlain;
  static constexpr bool kResized = kLayout == Layout::resized;

  // A channel's distance from the first one, in numbers. The launch has seen to it that those of whole rows fit.
  using Offset = std::conditional_t<kWhole, uint32_t, int64_t>;

  const Args<A>& a;
  A* const shared;
  A *const my_targets, *const my_scalars, *const my_sums;  // the thread's columns in shared memory
  const int C;
  const bool alone, leads;  // on its pixels; in putting down their losses
  const A rate;             // of exponentials: exp(y) = 2^(y rate), or exp(y / tau) where that is all there is
  A all_weights;            // sum of all class weights
  int turn = 0;             // of the two exchange buffers

  // The tile's pixels of this thread: the first, its coordinates and where they are in views that are laid out alike,
  // whether it exists; their weights and labels.
  int64_t pixel, i2, offset;
  int i0, i1;
  bool inside, all_count;
  A label_w[P], soft_w[P], hot[P];
  int label[P];
  // Where a label is in a whole target row, and its hot if it is there; else any place, and 0.
  int place_in_row[P];
  A hot_in_row[P];

  // The exit at hand: where its pixel lies, its maxima, logits at the labels, and y, its logits less the maxima, of
  // channels from c0 on.
  const S* origin;
  A m[P], label_z[P], z[I][V];
  int c0, accesses;  // the block of channels: where it begins, how many accesses of it are this thread's

  __device__ Worker(const Args<A>& args, A* numbers)
      : a(args),
        shared(numbers),
        my_targets(kept_shared(shared + a.at.targets + thread() * Shape::kTargetRow)),
        my_scalars(kept_shared(shared + a.at.scalars + thread() * P)),
        my_sums(kept_shared(shared + a.at.sums + thread())),
        C(args.C),
        alone(kLayout != Layout::lanes && a.groups == 1),
        leads(group() == 0),
        rate(soft_two() && !a.labels ? a.rate_tau : A(kLog2e)) {}

  // ---- helpers ----

  // The thread's place among those with other pixels, and among those with other channels of the same ones.
  SELFREG_DEVICE static int thread() { return threadIdx.y * blockDim.x + threadIdx.x; }
  SELFREG_DEVICE static int threads() { return blockDim.x * blockDim.y; }
  SELFREG_DEVICE static int slot() { return kLayout == Layout::lanes ? threadIdx.x / kLanes : threadIdx.x; }
  SELFREG_DEVICE static int pixel_threads() { return kLayout == Layout::lanes ? blockDim.x / kLanes : blockDim.x; }
  SELFREG_DEVICE static int group() { return kLayout == Layout::lanes ? threadIdx.x % kLanes : threadIdx.y; }

  SELFREG_DEVICE static int pixel_of(int v) { return kLayout == Layout::lanes ? 0 : v; }
  SELFREG_DEVICE int stride() const { return kLayout == Layout::lanes ? kLanes * V : a.groups; }
  SELFREG_DEVICE int channel(int i, int v) const {
    return c0 + (kLayout == Layout::lanes ? group() * V + v : group()) + i * stride();
  }
  // Where among the thread's numbers of a pixel channel c is: negative or beyond, if it is not.
  SELFREG_DEVICE int place_of(int c) const {
    const int ahead = c - channel(0, 0);
    if constexpr (kLayout == Layout::lanes) {
      const int i = ahead / (kLanes * V), v = ahead % (kLanes * V);
      return ahead >= 0 && v < V ? i * V + v : -1;
    }
    if (alone) return ahead;
    return ahead >= 0 && ahead % a.groups == 0 ? ahead / a.groups : -1;
  }
  SELFREG_DEVICE static int place(int i, int v) { return kLayout == Layout::lanes ? i * V + v : i; }
  // The block of channels that begins at c.
  SELFREG_DEVICE void begin_block(int c) {
    c0 = c;
    const int left = C - channel(0, 0);
    accesses = alone ? left : (left + stride() - 1) / stride();
  }
  SELFREG_DEVICE bool exists(int i) const { return i < Shape::kSureAccesses || i < accesses; }
  // f(access, element) for all numbers of the thread.
  template <class F>
  SELFREG_DEVICE void each(F f) const {
#pragma unroll
    for (int i = 0; i < I; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) f(i, v);
    }
  }

  // Combines a number of every pixel over the threads that share the pixel; all of them get it.
  template <class Op>
  SELFREG_DEVICE void across_groups(A (&x)[P], Op op) {
    if constexpr (kLayout == Layout::lanes) {
#pragma unroll
      for (int other = 1; other < kLanes; other *= 2) x[0] = op(x[0], __shfl_xor_sync(0xffffffffu, x[0], other));
    }
    if constexpr (Shape::kSpread) {
      if (alone) return;
      constexpr bool fours = exchanges_fours<Shape, A>;
      const int pitch = fours ? exchange_pitch(a.groups) : 1, apart = fours ? 1 : pixel_threads();
      const int size = fours ? pixel_threads() * pitch : threads();
      // Two buffers in turn: who writes one again has passed the barrier after which all had read it.
      A* const buffer = shared + a.at.exchange + turn * P * size + slot() * pitch;
      turn ^= 1;
#pragma unroll
      for (int p = 0; p < P; ++p) buffer[p * size + group() * apart] = x[p];
      __syncthreads();
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const A* const row = buffer + p * size;
        x[p] = row[0];
        int g = 1;
        if constexpr (fours) {
          A y[4];
#pragma unroll 1
          for (g = 0; g + 4 <= a.groups; g += 4) {
            load_shared(row + g, y);
            y[0] = op(op(y[0], y[1]), op(y[2], y[3]));
            x[p] = g == 0 ? y[0] : op(x[p], y[0]);
          }
          g += g == 0;
        }
        for (; g < a.groups; ++g) x[p] = op(x[p], row[g * apart]);
      }
    }
  }
  SELFREG_DEVICE void sum_across_groups(A (&x)[P]) {
    across_groups(x, [](A u, A v) { return u + v; });
  }

  // Columns of shared memory.
  SELFREG_DEVICE A* target(int r) const { return my_targets + r * threads() * Shape::kTargetRow; }  // [I][V]
  // P of a target row; m of its logits, or their argmax; log2 of its factor.
  enum Scalar { kSum, kMax, kArgmax = kMax, kLogFactor };
  SELFREG_DEVICE A* scalars(int r, Scalar s) const {  // [P]
    return my_scalars + (r * Shape::kScalars + s) * threads() * P;
  }
  SELFREG_DEVICE A scalar(int r, Scalar s, int p) const { return scalars(r, s)[p]; }
  enum Said { kPeak, kLogNormalizer };
  SELFREG_DEVICE A& saying(int e, Said s, int p) const {
    return shared[a.at.said + ((e * 2 + s) * P + p) * threads() + thread()];
  }

  // Label losses take exp(y); soft ones the same, or exp(y / tau).
  SELFREG_DEVICE bool soft_two() const { return a.target == Target::renormalized; }
  SELFREG_DEVICE bool teaches(int r, int e) const { return a.teachers[r] != e; }
  SELFREG_DEVICE int entry(int r, int e) const { return r * a.N + e; }
  SELFREG_DEVICE int shared_entry(int r, int e) const { return e * (a.T + 1) + r; }  // so an exit's lie side by side

  // What plain kernels are spared.
  SELFREG_DEVICE bool two_rates() const { return !kPlain && a.labels && soft_two() && a.T > 0; }
  SELFREG_DEVICE bool argmax() const { return !kPlain && a.target == Target::argmax; }
  SELFREG_DEVICE bool smoothed() const { return !kPlain && a.smoothing != 0; }
  SELFREG_DEVICE bool summed() const { return kPlain || a.reduction != Reduction::none; }
  SELFREG_DEVICE bool teacher_learns() const { return !kWhole && a.teacher_learns; }

  // ---- pixels ----

  // A thread's pixels are neighbours: side by side, or below each other, where the last ones may be none.
  SELFREG_DEVICE int64_t pixel_at(int p) const { return pixel + (kResized ? p * a.cut.width : p); }
  SELFREG_DEVICE bool exists_pixel(int p) const { return inside && (!kResized || p == 0 || i1 + p < a.cut.height); }

  SELFREG_DEVICE void locate() {
    i0 = i1 = 0;
    i2 = inside ? pixel : 0;
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
    int64_t at = i2 * view.step[2];
    if (a.dims > 1) at += i1 * view.step[1];
    if (a.dims > 2) at += i0 * view.step[0];
    return at;
  }
  SELFREG_DEVICE S* origin_of(const PixelView& view) const {
    if (kResized) return nullptr;  // see interpolate()
    return static_cast<S*>(view.data) + (a.alike ? offset : offset_in(view));
  }

  template <class Label>
  SELFREG_DEVICE void read_labels() {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int64_t y = exists_pixel(p) ? int64_t(static_cast<const Label*>(a.labels)[pixel_at(p)]) : a.ignore_index;
      const bool valid = y != a.ignore_index, good = uint64_t(y) < uint64_t(C);
      label_w[p] = valid ? soft_w[p] : A(0);
      label[p] = valid && good ? int(y) : 0;
      // Neither a class nor ignored: shows in the loss and in the gradient.
      hot[p] = label_w[p] == 0 ? A(0) : good ? class_weight(label[p]) * a.hot_weight : A(NAN);
      if constexpr (kWhole) {
        const int place = place_of(label[p]);
        const bool here = uint32_t(place) < uint32_t(kLayout == Layout::lanes ? I * V : I);
        place_in_row[p] = !here ? 0 : kLayout == Layout::lanes ? place : place * V + p;
        hot_in_row[p] = here ? hot[p] : A(0);
      }
    }
  }

  // Weights and labels of the tile's pixels. The logits of a pixel that does not count are taken as zeros, and those of
  // one that does not exist are the first pixel's.
  SELFREG_DEVICE void begin_tile(int64_t first) {
    if constexpr (kResized) {
      begin_rows();
    } else {
      pixel = first + int64_t(slot()) * P;
      inside = pixel < a.pixels;  // V divides the number of pixels
      locate();
      offset = offset_in(a.exits[0]);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      soft_w[p] = A(exists_pixel(p));
      label_w[p] = hot[p] = hot_in_row[p] = 0;
      label[p] = place_in_row[p] = 0;
    }
    if (a.pixel_weight) {
#pragma unroll
      for (int p = 0; p < P; ++p)
        if (exists_pixel(p)) soft_w[p] = a.pixel_weight[pixel_at(p)];
    }
    if (a.labels) {
      switch (a.label_type) {
        case LabelType::uint8: read_labels<uint8_t>(); break;
        case LabelType::int32: read_labels<int32_t>(); break;
        default: read_labels<int64_t>();
      }
    }
    all_count = true;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      if (a.labels && a.mask_soft) soft_w[p] = label_w[p];
      all_count = all_count && counted(p);
    }
  }
  // A pixel that counts for the labels counts for soft losses, if there are any.
  SELFREG_DEVICE bool counted(int p) const { return (a.T ? soft_w[p] : label_w[p]) != 0; }

  // ---- reading and writing ----

  // Room for the rows of this warp's pixels, and for those of this thread's.
  SELFREG_DEVICE S* staged_rows() const {
    return reinterpret_cast<S*>(shared + a.at.staged) + thread() / 32 * 32 * a.at.staged_row;
  }
  SELFREG_DEVICE S* staged_row() const { return staged_rows() + threadIdx.x % 32 * a.at.staged_row; }

  // Numbers lying side by side in a staged row, in one access.
  template <int n>
  SELFREG_DEVICE static void get_staged(const S* from, A (&to)[n]) {
    unpack<S, n>(*reinterpret_cast<const typename Word<sizeof(S) * n>::type*>(from), to);
  }
  template <int n>
  SELFREG_DEVICE static void put_staged(S* to, const A (&from)[n]) {
    *reinterpret_cast<typename Word<sizeof(S) * n>::type*>(to) = pack<S, n>(from);
  }
  // f(std::integral_constant of how many numbers an access to a row takes): as many as divide it.
  template <int n = 16 / sizeof(S), class F>
  SELFREG_DEVICE void with_staged_access(F f) const {
    if constexpr (n == 1) {
      f(std::integral_constant<int, 1>());
    } else if constexpr (I % n == 0) {
      if (C % n == 0) {
        f(std::integral_constant<int, n>());
      } else {
        with_staged_access<n / 2>(f);
      }
    } else {
      with_staged_access<n / 2>(f);
    }
  }
  // Two rows of an odd number of channels are read and written in pairs that both share in the middle, which are an odd
  // number: threads meet in no bank. The second row's pairs begin with the first one's last number.
  SELFREG_DEVICE bool staged_pairs() const { return P == 2 && C % 2 == 1; }

  SELFREG_DEVICE void read_staged(A (&to)[I][V]) const {
    const S* const row = staged_row();
#pragma unroll
    for (int i = 0; i < I; ++i)
#pragma unroll
      for (int v = 0; v < V; ++v) to[i][v] = kLowest<A>;
    if (staged_pairs()) {
#pragma unroll
      for (int i = 0; i < I; i += 2) {
        if (!exists(i)) continue;
        A x[2];
        get_staged(row + i, x);
        to[i][0] = x[0];
        if (exists(i + 1)) to[i + 1][0] = x[1];
        get_staged(row + C - 1 + i, x);
        if (i > 0) to[i - 1][V - 1] = x[0];
        to[i][V - 1] = x[1];
      }
    } else {
      with_staged_access([&](auto numbers) {
        constexpr int n = decltype(numbers)::value;
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int i = 0; i < I; i += n) {
            if (!exists(i)) continue;
            A x[n];
            get_staged(row + v * C + i, x);
#pragma unroll
            for (int k = 0; k < n; ++k) to[i + k][v] = x[k];
          }
        }
      });
    }
    __syncwarp();
  }
  SELFREG_DEVICE void write_staged() const {
    S* const row = staged_row();
    if (staged_pairs()) {
#pragma unroll
      for (int i = 0; i < I; i += 2) {
        if (!exists(i)) continue;
        put_staged<2>(row + i, {z[i][0], exists(i + 1) ? z[i + 1][0] : z[0][V - 1]});
        if (i > 0) put_staged<2>(row + C - 1 + i, {z[i - 1][V - 1], z[i][V - 1]});
      }
    } else {
      with_staged_access([&](auto numbers) {
        constexpr int n = decltype(numbers)::value;
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int i = 0; i < I; i += n) {
            if (!exists(i)) continue;
            A x[n];
#pragma unroll
            for (int k = 0; k < n; ++k) x[k] = z[i + k][v];
            put_staged(row + v * C + i, x);
          }
        }
      });
    }
    __syncwarp();
  }

  // One number of exit e, which lies at `from`.
  SELFREG_DEVICE A number(const S* from, int e, int p, int c) const {
    if constexpr (kResized) return interpolated(e, p, c);
    const PixelView& view = a.exits[e];
    from += Offset(c) * Offset(view.channel);
    if (kLayout == Layout::planes) from += p;  // V pixels lie side by side, or one row after the other
    if (kLayout == Layout::staged) from += p * C;
    return to_number(__ldg(from));
  }

  // Logits of exit e, which lies at `from`, from channel c0 on, and raises `peak` to the largest; `again`: they will be
  // read once more. Where there is no channel: the lowest number, or less.
  // Of a resized exit, `with_labels`, also those at the labels.
  SELFREG_DEVICE void load_block(int e, const S* from, A (&to)[I][V], bool again, A (&peak)[P],
                                 bool with_labels = false) {
    // Pairs of halves are compared as such: half the instructions, and exact. A pixel is either of a pair.
    constexpr bool kPairs = kLayout == Layout::planes && sizeof(S) == 2 && V % 2 == 0;
    [[maybe_unused]] unsigned top[(V + 1) / 2];
    if constexpr (kLayout == Layout::staged) {
      copy_rows<true>(static_cast<S*>(a.exits[e].data), again);
      read_staged(to);
    } else if constexpr (kResized) {
      a.from[e].x ? interpolate(e, to, with_labels) : load_rows(e, to);
    } else {
      const PixelView& view = a.exits[e];
      const Offset step = Offset(stride()) * Offset(view.channel);
      typename Word<sizeof(S) * V>::type words[I];
      auto load_all = [&](auto once) {
        const S* p = opaque(from + Offset(channel(0, 0)) * Offset(view.channel));
#pragma unroll
        for (int i = 0; i < I; ++i, p += step) {
          A lowest[V];
#pragma unroll
          for (int v = 0; v < V; ++v) lowest[v] = kLowest<A>;
          words[i] = exists(i) ? load<S, V, decltype(once)::value>(p) : pack<S, V>(lowest);
        }
      };
      if (again) {
        load_all(std::false_type());
      } else {
        load_all(std::true_type());
      }
#pragma unroll
      for (int i = 0; i < I; ++i) unpack<S, V>(words[i], to[i]);
      if constexpr (kPairs) {
        const unsigned (&pairs)[I][V / 2] = reinterpret_cast<const unsigned (&)[I][V / 2]>(words);
#pragma unroll
        for (int k = 0; k < V / 2; ++k) {
          top[k] = pairs[0][k];
#pragma unroll
          for (int i = 1; i < I; ++i) top[k] = larger_of_pairs<S>(top[k], pairs[i][k]);
        }
      }
    }
    if (__builtin_expect(!all_count, false))
      each([&](int i, int v) { to[i][v] = counted(pixel_of(v)) ? to[i][v] : A(0); });
    if constexpr (kPairs) {
      A tops[V];
#pragma unroll
      for (int k = 0; k < V / 2; ++k) {
        A two[2];
        unpack<S, 2>(top[k], two);
        tops[2 * k] = two[0], tops[2 * k + 1] = two[1];
      }
#pragma unroll
      for (int p = 0; p < P; ++p) peak[p] = larger(peak[p], counted(p) ? tops[p] : A(0));
    } else {
      each([&](int i, int v) { peak[pixel_of(v)] = larger(peak[pixel_of(v)], to[i][v]); });
    }
  }
  SELFREG_DEVICE void load_block(int e, const S* from, A (&to)[I][V], bool again) {
    A peak[P] = {};
    load_block(e, from, to, again, peak);
  }

  // The rows of a warp's pixels, one after the other in memory, to their places in shared memory, or back. Some of a
  // thread's words are on their way at a time.
  template <bool load>
  SELFREG_DEVICE void copy_rows(S* pixels, bool again) const {
    constexpr int kVector = 16 / sizeof(S), kWords = (I * P + kVector - 1) / kVector, kAtOnce = kWords < 5 ? kWords : 3;
    S* const rows = staged_rows();
    const int lane = threadIdx.x % 32;
    const int64_t first = pixel - lane * P, left = a.pixels - first;
    const int count = left <= 0 ? 0 : int(left < 32 * P ? left : 32 * P) * C, words = count / kVector;
    pixels += first * C;
    auto place = [&](int j) {  // with the gaps before it
      return reinterpret_cast<uint4*>(rows) + j + int(uint64_t(unsigned(j)) * a.at.staged_gaps >> 32);
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

  // Writes z as the gradient of exit e from channel c0 on.
  SELFREG_DEVICE void store_block(int e) const {
    const PixelView& view = a.grads[e];
    if constexpr (kLayout == Layout::staged) {
      write_staged();
      copy_rows<false>(static_cast<S*>(view.data), false);
      return;
    }
    if constexpr (kResized) {
      a.from[e].x ? scatter(e, z) : store_rows(e);
      return;
    }
    if (!inside) return;
    S* p = origin_of(view) + Offset(channel(0, 0)) * Offset(view.channel);
    if constexpr (I > 8) p = opaque(p);  // a short row's kernels would spill
    const Offset step = Offset(stride()) * Offset(view.channel);
#pragma unroll
    for (int i = 0; i < I; ++i, p += step)
      if (exists(i)) store<S, V>(p, z[i]);
  }

  // ---- exits of another size ----

  using ThePlace = Place<A, P>;
  SELFREG_DEVICE ThePlace& place_under(int e) const { return reinterpret_cast<ThePlace*>(shared + a.at.places)[e]; }
  SELFREG_DEVICE static int end_of(const ThePlace& place, int span) { return P == 1 ? 1 : place.end[span]; }
  SELFREG_DEVICE A* column_weights(int e) const {
    return shared + a.at.columns + a.size_number[e] * column_numbers<A>(pixel_threads());
  }
  SELFREG_DEVICE int32_t* column_lows(int e) const {
    return reinterpret_cast<int32_t*>(column_weights(e) + pixel_threads());
  }
  SELFREG_DEVICE uint16_t* column_firsts(int e) const {
    return reinterpret_cast<uint16_t*>(column_lows(e) + pixel_threads());
  }
  SELFREG_DEVICE Axis rows_of(int e) const { return {a.from[e].x, a.cut.height, a.align_corners}; }
  SELFREG_DEVICE Axis columns_of(int e) const { return {a.from[e].y, a.cut.width, a.align_corners}; }

  // Goes to the first row of a band, with what lies under it and its columns.
  SELFREG_DEVICE void begin_band(int64_t number) {
    const Cut& cut = a.cut;
    const int64_t line = quotient(number, cut.strips), strip = number - line * cut.strips;
    const int64_t image = quotient(line, cut.bands), band = line - image * cut.bands;
    const int64_t begin = strip * cut.columns, x = begin + slot(), left = cut.width - begin;
    const int64_t width = left < cut.columns ? left : cut.columns;
    i0 = int(image), i1 = int(band * cut.rows);
    inside = x < cut.width;
    i2 = inside ? x : cut.width - 1;
    __syncthreads();  // all are done with the last one
    for (int e = 0, sizes = 0; e < a.N; ++e) {
      if (!a.from[e].x) continue;
      const Axis axis = columns_of(e);
      const int64_t column = axis.low(begin);
      int32_t* const low = column_lows(e);
      const bool same = a.size_number[e] < sizes;  // as that of an exit before it
      sizes += !same;
      for (int k = same ? pixel_threads() + 3 : thread(); k < pixel_threads() + 3; k += threads()) {
        const int64_t from = axis.first(column - 1 + k) - begin;
        column_firsts(e)[k] = uint16_t(from < 0 ? 0 : from < width ? from : width);
        if (k >= pixel_threads()) continue;
        const int64_t at = begin + (k < width ? k : width - 1), l = axis.low(at);
        low[k] = int32_t(l - column);
        column_weights(e)[k] = axis.template weight<A>(at, l);
      }
      if (thread() == 0) {
        const Copies copies(cut, a.from[e].x, a.from[e].y, a.align_corners);
        ThePlace& place = place_under(e);
        place.copy = static_cast<A*>(a.grads[e].data);
        if (place.copy) place.copy += copies.begin(cut, image, band, strip, C);
        place.copy_columns = int(copies.columns);
        place.row = int(rows_of(e).low(i1));
        place.right = a.from[e].y > 1 ? a.exits[e].step[2] : 0;
        place.below = a.from[e].x > 1 ? a.exits[e].step[1] : 0;
        place.column = int(column);
        place.columns = int(axis.high(begin + width - 1) - column) + 1;
        place.pixels = int(width);
        place.cells.set(is_wide(place.columns, pixel_threads()) ? place.pixels
                                                                : line_columns(place.columns, pixel_threads()));
        place.drawn = threads() / place.cells.divisor;
      }
    }
  }

  // The band that has ended at row i1: its number would else be in two registers all the time.
  SELFREG_DEVICE int64_t band_at() const {
    const Cut& cut = a.cut;
    return (int64_t(i0) * cut.bands + unsigned(i1 - 1) / unsigned(cut.rows)) * cut.strips + i2 / unsigned(cut.columns);
  }

  // The tile at row i1 of the band.
  SELFREG_DEVICE void begin_rows() {
    const int64_t y = i1;
    __syncthreads();  // all are done with the last ones, or have begun the band
    for (int e = thread(); e < a.N; e += threads()) {
      if (!a.from[e].x) continue;
      const Axis axis = rows_of(e);
      const PixelView& view = a.exits[e];
      ThePlace& place = place_under(e);
      // Rows from here on have got nothing yet.
      int64_t fresh = y % a.cut.rows != 0 ? axis.high(y - 1) + 1 : 0, last = -1;
      int span = 0;
      place.more = 0;
#pragma unroll 1
      for (int p = 0; p < P; ++p) {
        const int64_t row = y + p < a.cut.height ? y + p : a.cut.height - 1, low = axis.low(row);
        place.weight[p] = axis.template weight<A>(row, low);
        place.first[p] = i0 * view.step[0] + low * view.step[1] + place.column * view.step[2];
        if (low != last) {
          span = p;
          for (int r = 0; r < 2; ++r) {
            const int64_t to = low + r;
            place.copy_rows[2 * p + r] =
                place.copy && to < axis.from ? place.copy + (to - place.row) * place.copy_columns * C : nullptr;
            place.more |= int(to < fresh) << (2 * p + r);
          }
          fresh = low + 2;
          last = low;
        }
        place.end[span] = p + 1;
      }
    }
    __syncthreads();
    pixel = (i0 * a.cut.height + y) * a.cut.width + i2;
  }

  // The exit's numbers under a span, of channels from c0 on: for each of its columns the number of the row above, the
  // step to the next column, the step to the row below, and that of the next column less that. Of an exit that is wider
  // than the strip: for each pixel, with steps to the row below only. All threads of the block; says whether something
  // is not finite.
  SELFREG_DEVICE bool draw_lines(int e, int span) const {
    const ThePlace& place = place_under(e);
    const PixelView& view = a.exits[e];
    const bool wide = is_wide(place.columns, pixel_threads());
    const int channels = min(C - c0, I * a.groups), drawn = place.drawn;
    const Offset right = Offset(place.right), below = Offset(place.below);
    int c = place.cells.of(thread());
    const int column = thread() - c * place.cells.divisor;
    if (c >= drawn) return false;
    const S* from = static_cast<const S*>(view.data) + place.first[span] + (c0 + c) * view.channel +
                    (wide ? column_lows(e)[column] : column) * view.step[2];
    const A weight = wide ? column_weights(e)[column] : A(0);
    A zero = 0;  // or NaN
#pragma unroll 1
    for (; c < channels; c += drawn, from += drawn * view.channel) {
      const A left = to_number(__ldg(from)), next = to_number(__ldg(from + right));
      const S* const under = from + below;
      const A down = to_number(__ldg(under)) - left, next_down = to_number(__ldg(under + right)) - next;
      A line[4] = {left, next - left, down, next_down - down};
      zero += line[3] * 0;
      if (wide) {
        line[0] += weight * line[1], line[2] += weight * line[3];
        line[1] = line[3] = 0;
      }
      store_shared(line_at(group_of(c), column) + access_of(c) * 4, line);
    }
    return zero != 0;
  }
  // Whose channel c of the block is, and which of its accesses.
  SELFREG_DEVICE int group_of(int c) const { return alone ? 0 : int(unsigned(c) % unsigned(a.groups)); }
  SELFREG_DEVICE int access_of(int c) const { return alone ? c : int(unsigned(c) / unsigned(a.groups)); }
  SELFREG_DEVICE A* line_at(int g, int column) const {
    return shared + a.at.lines + (g * a.at.line_columns + column) * Shape::kLine * 4;
  }
  // The column of its line that the thread's pixels are right of.
  SELFREG_DEVICE int line_column(int e) const {
    const ThePlace& place = place_under(e);
    return is_wide(place.columns, pixel_threads()) ? min(slot(), place.pixels - 1) : column_lows(e)[slot()];
  }

  // Channels from c0 on of a resized exit, at the thread's pixels; and, if asked for, those at their labels.
  SELFREG_DEVICE void interpolate(int e, A (&to)[I][V], bool with_labels) {
    const ThePlace& place = place_under(e);
    bool odd = false;
#pragma unroll 1
    for (int span = 0; span < P; span = end_of(place, span)) {
      __syncthreads();  // all have read the last lines
      odd |= __syncthreads_or(draw_lines(e, span));
      const A weight = column_weights(e)[slot()];
      const int column = line_column(e);
      const A* const line = kept_shared(line_at(group(), column));
      bool here[P];
      A below[P];
#pragma unroll
      for (int p = 0; p < P; ++p) here[p] = p >= span && p < end_of(place, span), below[p] = place.weight[p];
#pragma unroll
      for (int i = 0; i < I; ++i) {
        A x[4];
        if (exists(i)) load_shared(line + i * 4, x);
        const A above = x[0] + weight * x[1], down = x[2] + weight * x[3];
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (here[v]) to[i][v] = exists(i) ? above + below[v] * down : kLowest<A>;
      }
      if (!with_labels) continue;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (!here[p]) continue;
        A x[4];
        load_shared(alone ? line + label[p] * 4 : line_at(group_of(label[p]), column) + access_of(label[p]) * 4, x);
        const A number = x[0] + weight * x[1] + below[p] * (x[2] + weight * x[3]);
        label_z[p] = number - number == 0 ? number : interpolated(e, p, label[p]);
      }
    }
    if (__builtin_expect(odd, false)) correct(e, to);
  }

  // What is not finite is computed anew: where a weight is 0, the other number does not matter.
  SELFREG_DEVICE void correct(int e, A (&to)[I][V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      unsigned odd = 0;
#pragma unroll
      for (int i = 0; i < I; ++i) odd |= unsigned(!(to[i][v] - to[i][v] == 0)) << i;
#pragma unroll 1
      for (int k = 0; odd >> k != 0; ++k) {
        if (!(odd >> k & 1)) continue;
        const A number = interpolated(e, v, channel(k, v));
#pragma unroll
        for (int i = 0; i < I; ++i) to[i][v] = i == k ? number : to[i][v];
      }
    }
  }

  // One number, the same as above where it is finite.
  SELFREG_DEVICE A interpolated(int e, int p, int c) const {
    const PixelView& view = a.exits[e];
    if (!a.from[e].x) return to_number(__ldg(row_of(view, p) + c * view.channel));
    const ThePlace& place = place_under(e);
    const Offset right = Offset(place.right), below = Offset(place.below);
    const S* const at =
        static_cast<const S*>(view.data) + place.first[p] + c * view.channel + column_lows(e)[slot()] * view.step[2];
    const A left = to_number(__ldg(at)), next = to_number(__ldg(at + right));
    const A low_left = to_number(__ldg(at + below)), low_next = to_number(__ldg(at + below + right));
    const A step = next - left, down = low_left - left, next_down = low_next - next;
    const A w = place.weight[p], w_x = column_weights(e)[slot()];
    const A number = left + w_x * step + w * (down + w_x * (next_down - down));
    if (number - number == 0) return number;
    auto mix = [](A u, A v, A weight) { return weight == 0 ? u : weight == 1 ? v : (1 - weight) * u + weight * v; };
    return mix(mix(left, low_left, w), mix(next, low_next, w), w_x);
  }

  // Exits of the output's size beside them.
  SELFREG_DEVICE S* row_of(const PixelView& view, int p) const {
    return static_cast<S*>(view.data) + offset_in(view) + (exists_pixel(p) ? p : 0) * view.step[1];
  }
  SELFREG_DEVICE void load_rows(int e, A (&to)[I][V]) const {
    const PixelView& view = a.exits[e];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const S* p = row_of(view, v) + channel(0, 0) * view.channel;
#pragma unroll
      for (int i = 0; i < I; ++i, p += stride() * view.channel) to[i][v] = exists(i) ? to_number(__ldg(p)) : kLowest<A>;
    }
  }
  SELFREG_DEVICE void store_rows(int e) const {
    const PixelView& view = a.grads[e];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (!exists_pixel(v)) continue;
      S* p = row_of(view, v) + channel(0, 0) * view.channel;
#pragma unroll
      for (int i = 0; i < I; ++i, p = opaque(p + stride() * view.channel))
        if (exists(i)) *p = to_storage<S>(z[i][v]);
    }
  }

  // The first of so many pixels whose column is `column` or one to its right; their number where there is none.
  SELFREG_DEVICE int find_first(int e, int pixels, int column) const {
    const int32_t* const low = column_lows(e);
    int first = 0;
    while (first < pixels) {
      const int middle = (first + pixels) / 2;
      low[middle] < column ? first = middle + 1 : pixels = middle;
    }
    return first;
  }

  // Adds a gradient at the tile's pixels, of channels from c0 on, to the band's copy of the exit's, a span at a time:
  // first sums of each column of pixels for the rows above and below; then of the pixels between the same two columns,
  // for the left one and the right one, which take the place of the lines; then a thread takes a column of the exit and
  // some channels, and adds what is to its left and right, in order.
  SELFREG_DEVICE void scatter(int e, const A (&gradient)[I][V]) const {
    constexpr int kTogether = sizeof(A) == 8 ? 1 : 2;
    const ThePlace& place = place_under(e);
    const bool wide = is_wide(place.columns, pixel_threads());
    const int cells = place.cells.divisor;
    A* const mine = shared + a.at.scattered + scattered_at<Shape>(thread());
#pragma unroll 1
    for (int span = 0; span < P; span = end_of(place, span)) {
      bool here[P];
      A below[P];
#pragma unroll
      for (int p = 0; p < P; ++p) here[p] = p >= span && p < end_of(place, span), below[p] = place.weight[p];
#pragma unroll 1
      for (int begin = 0; begin < I; begin += Shape::kScattered) {
        const int left = C - c0 - begin * stride();
        if (left <= 0) break;
#pragma unroll
        for (int part = 0; part < I; part += Shape::kScattered) {
          if (part != begin) continue;
#pragma unroll
          for (int j = 0; j < Shape::kScattered; j += kTogether) {
            A x[2 * kTogether] = {};
#pragma unroll
            for (int k = 0; k < kTogether; ++k) {
              if (part + j + k >= I) continue;
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const A g = gradient[part + j + k][v];
                if (here[v]) x[2 * k] += (1 - below[v]) * g, x[2 * k + 1] += below[v] * g;
              }
            }
            store_shared(mine + 2 * j, x);
          }
        }
        __syncthreads();
        sum_cells(e, begin, cells, wide);
        __syncthreads();
      }
      add_columns(e, span, cells, wide);
    }
  }
  // A cell: the pixels between two neighbouring columns; of a wide exit, each pixel.
  SELFREG_DEVICE void sum_cells(int e, int begin, int cells, bool wide) const {
    constexpr int kAccess = sizeof(A) == 8 ? 2 : 4, kTogether = 4, kTasks = Shape::kScattered * 2 / kTogether;
    const A *const numbers = shared + a.at.scattered, *const weights = column_weights(e);
    const uint16_t* const firsts = column_firsts(e);
#pragma unroll 1
    for (int task = thread(); task < cells * kTasks * a.groups; task += threads()) {
      const int number = task / kTasks, part = (task - number * kTasks) * kTogether;
      const int g = alone ? 0 : int(unsigned(number) / unsigned(cells)), cell = number - g * cells;
      const int end = wide ? cell + 1 : firsts[cell + 2];
      A sum[kTogether] = {}, right[kTogether] = {};
      const int first = wide ? cell : firsts[cell + 1];
      const A *from = numbers + scattered_at<Shape>(g * pixel_threads() + first) + part, *weight = weights + first;
      auto add = [&](int x) {
        const A w = weight[x];
#pragma unroll
        for (int j = 0; j < kTogether; j += kAccess) {
          A n[kAccess];
          load_shared(from + scattered_at<Shape>(x) + j, n);
#pragma unroll
          for (int k = 0; k < kAccess; ++k) sum[j + k] += n[k], right[j + k] += w * n[k];
        }
      };
      int left = end - first;
#pragma unroll 1
      for (; left > 1; left -= 2, from += scattered_at<Shape>(2), weight += 2) add(0), add(1);
      if (left > 0) add(0);
      A* const to = kept_shared(line_at(g, cell) + (begin * 2 + part) * 2);
#pragma unroll
      for (int j = 0; j < kTogether; j += 2)
        store_shared<4>(to + 2 * j, {sum[j] - right[j], sum[j + 1] - right[j + 1], right[j], right[j + 1]});
    }
  }
  SELFREG_DEVICE void add_columns(int e, int span, int cells, bool wide) const {
    constexpr int kTogether = Shape::kAddedTogether;  // of a group's accesses, so that they lie side by side
    const ThePlace& place = place_under(e);
    const Divisor parts = a.added_parts;
    const int columns = place.columns, apart = alone ? 1 : stride();
#pragma unroll 1
    for (int task = thread(); task < columns * parts.divisor; task += threads()) {
      const int column = parts.of(task), part = task - column * parts.divisor;
      const int g = group_of(part), first = access_of(part) * kTogether, c = first * apart + g;
      A sum[kTogether][2] = {};
      auto add = [&](int cell, int side) {
        const A* const from = kept_shared(line_at(g, cell) + (first * 2 + side) * 2);
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          A x[2];
          load_shared(from + j * 4, x);
          sum[j][0] += x[0], sum[j][1] += x[1];
        }
      };
      if (wide) {
        const int middle = find_first(e, cells, column), end = find_first(e, cells, column + 1);
        for (int cell = find_first(e, cells, column - 1); cell < middle; ++cell) add(cell, 1);
        for (int cell = middle; cell < end; ++cell) add(cell, 0);
      } else {
        if (column > 0) add(column - 1, 1);
        if (column < cells) add(column, 0);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        A* to = place.copy_rows[2 * span + r];
        if (!to) continue;
        const bool more = place.more >> (2 * span + r) & 1;
        to += Offset(column) * Offset(C) + Offset(c0 + c);
#pragma unroll
        for (int j = 0; j < kTogether; ++j, to += apart)
          if (c0 + c + j * apart < C) *to = more ? *to + sum[j][r] : sum[j][r];
      }
    }
  }

  SELFREG_DEVICE void subtract_maximum(A (&from)[I][V], const A (&peak)[P]) const {
    each([&](int i, int v) { from[i][v] = exists(i) ? from[i][v] - peak[pixel_of(v)] : kNoChannel; });
  }

  // So that the compiler keeps no second row of registers in kernels that have none to spare.
  SELFREG_DEVICE void forget_exponentials() {
    if constexpr (kWhole && !kPlain) each([&](int i, int v) { z[i][v] = opaque(z[i][v]); });
  }

  // The maximum over channels of exit e; where kWhole, z becomes its logits less the maximum.
  SELFREG_DEVICE void read(int e, bool again, bool with_labels) {
    origin = origin_of(a.exits[e]);
#pragma unroll
    for (int p = 0; p < P; ++p) m[p] = kLowest<A>, label_z[p] = 0;
    const bool in_lines = kResized && kWhole && a.from[e].x;
    if (with_labels && leads && !in_lines) {  // with the row, of which they are part
#pragma unroll
      for (int p = 0; p < P; ++p) label_z[p] = number(origin, e, p, label[p]);
    }
    if constexpr (kWhole) {
      load_block(e, origin, z, again, m, with_labels && leads && in_lines);
    } else {
      for (int c = 0; c < C; c += I * stride()) {
        begin_block(c);
        load_block(e, origin, z, true, m);
      }
    }
    across_groups(m, [](A u, A v) { return larger(u, v); });
    if constexpr (kWhole) subtract_maximum(z, m);
  }

  // f() for every block of channels of exit e, which stand in z less the maximum.
  template <class F>
  SELFREG_DEVICE void over_blocks(int e, F f) {
    if constexpr (kWhole) {
      f();
    } else {
      for (int c = 0; c < C; c += I * stride()) {
        begin_block(c);
        load_block(e, origin, z, true);
        subtract_maximum(z, m);
        f();
      }
    }
  }

  // f(access, element, target_rc) for every number of the block at hand.
  template <class F>
  SELFREG_DEVICE void each_target(int r, F f) {
    if constexpr (kWhole) {
      const A* const row = target(r);
#pragma unroll
      for (int j = 0; j < I * V; j += kTargetVector) {
        A q[kTargetVector];
        load_shared(row + j, q);
#pragma unroll
        for (int k = 0; k < kTargetVector; ++k) f((j + k) / V, (j + k) % V, q[k]);
      }
    } else {
      A t[I][V], peak[P], log_factor[P];
#pragma unroll
      for (int p = 0; p < P; ++p) peak[p] = scalar(r, kMax, p), log_factor[p] = scalar(r, kLogFactor, p);
      load_block(a.teachers[r], origin_of(a.exits[a.teachers[r]]), t, true);
      subtract_maximum(t, peak);
      each([&](int i, int v) { f(i, v, exp2_fast(t[i][v] * a.rate_tau + log_factor[pixel_of(v)])); });
    }
  }

  // ---- phase 1 ----

  // Of the exit at hand.
  SELFREG_DEVICE void teach(int r) {
    const int e = a.teachers[r];
    if (argmax()) {
      find_argmax(r, e);
      return;
    }
    // Beside u = sum exp(y / tau), a raw power of tau != 1 needs Z = sum exp(y); at tau = 2 that is a sum of squares.
    const bool two = a.target == Target::raw && a.tau != A(1), squares = two && a.tau == A(2);
    A row[I][V], u[P] = {}, Z[P] = {};
    over_blocks(e, [&] {
      each([&](int i, int v) { u[pixel_of(v)] += row[i][v] = exp2_of(z[i][v], a.rate_tau); });
      if (squares) {
        each([&](int i, int v) { Z[pixel_of(v)] += power<2>(row[i][v]); });
      } else if (two) {
        each([&](int i, int v) { Z[pixel_of(v)] += exp2_of(z[i][v], A(kLog2e)); });
      }
    });
    sum_across_groups(u);
    if (two) sum_across_groups(Z);
    forget_exponentials();
    A factor[P], log_factor[P], sum[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      log_factor[p] = two ? log2_fast(Z[p]) * (a.rate_tau * A(-kLn2)) : -log2_fast(u[p]);
      factor[p] = exp2_fast(log_factor[p]);
      sum[p] = two ? u[p] * factor[p] : A(1);
    }
    store_shared(scalars(r, kSum), sum);
    store_shared(scalars(r, kMax), m);
    if constexpr (!kWhole) {
      store_shared(scalars(r, kLogFactor), log_factor);
    } else {
#pragma unroll
      for (int j = 0; j < I * V; j += kTargetVector) {
        A q[kTargetVector];
#pragma unroll
        for (int k = 0; k < kTargetVector; ++k) {
          const int i = (j + k) / V, v = (j + k) % V;
          q[k] = kPlain ? row[i][v] * factor[pixel_of(v)] : exp2_fast(z[i][v] * a.rate_tau + log_factor[pixel_of(v)]);
        }
        store_shared(target(r) + j, q);
      }
    }
  }

  // The first of the largest, as torch.argmax; NaN counts as the largest.
  SELFREG_DEVICE void find_argmax(int r, int e) {
    auto nan_or_larger = [](A u, A v) { return u != u ? u : v != v ? v : larger(u, v); };
    auto same = [](A u, A v) { return u == v || (u != u && v != v); };
    A top[P], first[P];
#pragma unroll
    for (int p = 0; p < P; ++p) top[p] = kLowest<A>, first[p] = A(C);
    over_blocks(e, [&] {
      each([&](int i, int v) {
        if (exists(i)) top[pixel_of(v)] = nan_or_larger(top[pixel_of(v)], z[i][v]);
      });
    });
    across_groups(top, nan_or_larger);
    over_blocks(e, [&] {
      each([&](int i, int v) {
        const int p = pixel_of(v);
        // All are -infinity: none is as large as the lowest number, and the first stands for them.
        const bool here = exists(i) && (same(z[i][v], top[p]) || top[p] == kLowest<A>);
        if (here && A(channel(i, v)) < first[p]) first[p] = A(channel(i, v));
      });
    });
    across_groups(first, [](A u, A v) { return u < v ? u : v; });
#pragma unroll
    for (int p = 0; p < P; ++p) top[p] = 1;
    store_shared(scalars(r, kArgmax), first);
    store_shared(scalars(r, kSum), top);
  }

  // ---- phase 2 ----

  // What multiplies sigma - target in the gradient: the loss's own gradient x the mean's divisor x the pixel's weight,
  // and tau for soft targets.
  SELFREG_DEVICE A gain(int r, int e) const { return shared[a.at.gains + shared_entry(r, e)]; }
  SELFREG_DEVICE void gradient_of_loss(int r, int e, A (&k)[P]) const {
    const A g = gain(r, e);
#pragma unroll
    for (int p = 0; p < P; ++p) k[p] = product(r == 0 ? label_w[p] : soft_w[p], g);
    if (summed() || !a.grad_losses) return;  // no gradient is written where there is no map of them
    const A* const map = a.grad_losses + int64_t(entry(r, e)) * a.pixels + pixel;
#pragma unroll
    for (int p = 0; p < P; ++p)
      if (k[p] != 0) k[p] *= map[pixel_at(p) - pixel];
  }

  // `loss`: times the pixels' weights.
  SELFREG_DEVICE void put_loss(int r, int e, const A (&loss)[P]) const {
    if (!summed()) {
#pragma unroll
      for (int p = 0; p < P; ++p)
        if (exists_pixel(p) && leads) a.maps[int64_t(entry(r, e)) * a.pixels + pixel_at(p)] = loss[p];
    } else {
      A sum = loss[0];
#pragma unroll
      for (int p = 1; p < P; ++p) sum += loss[p];
      my_sums[shared_entry(r, e) * threads()] += sum;  // those that lead will count
    }
  }

  // Losses of the exit at hand, e, and its gradient. `as_teacher`: not its losses, but its gradient with what its
  // students make of it.
  SELFREG_DEVICE void student(int e, bool as_teacher) {
    int self = -1;
    if constexpr (!kWhole)
      for (int r = 0; r < a.T; ++r)
        if (!teaches(r, e)) self = r;
    const bool with_losses = !as_teacher;
    const bool with_gradient = a.grads[e].data && (teacher_learns() && self >= 0) == as_teacher;

    // Sums of exponentials. All losses share exp(y), or exp(y / tau); only label losses beside renormalised ones need
    // both. Plain kernels have the registers to keep them, others compute them again.
    const bool both = two_rates();
    A u[I][V], Z[P] = {}, soft_Z[P] = {}, smooth_dot[P] = {};
    over_blocks(e, [&] {
      each([&](int i, int v) { Z[pixel_of(v)] += u[i][v] = exp2_of(z[i][v], rate); });
      if (both) each([&](int i, int v) { soft_Z[pixel_of(v)] += exp2_of(z[i][v], a.rate_tau); });
      if (smoothed())
        each([&](int i, int v) {
          const A w = exists(i) ? class_weight(channel(i, v)) : A(0);
          if (w != 0) smooth_dot[pixel_of(v)] += w * z[i][v];
        });
    });
    sum_across_groups(Z);
    if (both) sum_across_groups(soft_Z);
    if (smoothed()) sum_across_groups(smooth_dot);

    // Losses, and the sums of the targets times what multiplies them in the gradient.
    A label_k[P], self_sum[P] = {}, soft_q[P] = {}, soft_log_z[P], loss[P];
    gradient_of_loss(0, e, label_k);
    if (as_teacher) target_dot_said(self, e, self_sum);
    if (with_losses) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const A log_z = log_normalizer(Z[p]), label_y = label_w[p] != 0 ? label_z[p] - m[p] : A(0);
        soft_log_z[p] = both ? log_normalizer(soft_Z[p]) : log_z;
        loss[p] = smoothed() ? label_loss(hot[p], label_y, log_z, a.smoothing, all_weights, smooth_dot[p])
                             : hot[p] * (log_z - label_y);
        loss[p] = label_w[p] != 0 ? label_w[p] * loss[p] : A(0);  // ignored, but counted for soft losses: may be NaN
        if (teacher_learns()) {
          saying(e, kPeak, p) = m[p];
          saying(e, kLogNormalizer, p) = soft_two() ? a.tau * soft_log_z[p] : soft_log_z[p];
        }
      }
      put_loss(0, e, loss);
    }
    for (int r = 0; r < a.T; ++r) {
      if (!teaches(r, e)) {
#pragma unroll
        for (int p = 0; p < P; ++p) loss[p] = 0;
        if (with_losses && !summed()) put_loss(r + 1, e, loss);
        continue;
      }
      A sum[P], k[P];
      load_shared(scalars(r, kSum), sum);
      if (with_losses) {
        A dot[P];
        dot_with_target(r, e, dot);
#pragma unroll
        for (int p = 0; p < P; ++p)
          loss[p] = soft_w[p] * soft_loss(sum[p], dot[p], soft_log_z[p], a.log_z_scale, a.dot_scale);
        put_loss(r + 1, e, loss);
      }
      gradient_of_loss(r + 1, e, k);
#pragma unroll
      for (int p = 0; p < P; ++p) soft_q[p] += k[p] * sum[p];
    }
    if (!with_gradient) return;
    forget_exponentials();

    // gradient_c = exp(y_c) f + exp(y_c / tau) soft_f - sum_r k_r target_rc - ...
    A f[P], soft_f[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      A q = product(label_k[p], smoothed() ? hot[p] + a.smoothing * all_weights : hot[p]);
      if (!soft_two()) soft_q[p] += self_sum[p];
      if (!both) q += soft_q[p];
      f[p] = q * reciprocal(Z[p]);
      soft_f[p] = both ? soft_q[p] * reciprocal(soft_Z[p]) : A(0);
    }
    over_blocks(e, [&] {
      auto kept = [&](int i, int v) { return kPlain ? u[i][v] : exp2_of(z[i][v], rate); };
      if (both) {
        each([&](int i, int v) {
          z[i][v] = kept(i, v) * f[pixel_of(v)] + exp2_of(z[i][v], a.rate_tau) * soft_f[pixel_of(v)];
        });
      } else {
        each([&](int i, int v) { z[i][v] = kept(i, v) * f[pixel_of(v)]; });
      }
      const bool joined = subtract_targets(e);
      if (as_teacher) add_said(self, e, self_sum);
      subtract_hot(e, label_k, a.labels && !joined && !(summed() && gain(0, e) == 0));
      store_block(e);
    });
  }

  SELFREG_DEVICE A class_weight(int c) const { return a.class_weight ? a.class_weight[c] : A(1); }

  // The dot product of the r-th teacher's target and exit e's y: for argmax, the y at that place.
  SELFREG_DEVICE void dot_with_target(int r, int e, A (&dot)[P]) {
#pragma unroll
    for (int p = 0; p < P; ++p) dot[p] = 0;
    if (argmax()) {
#pragma unroll
      for (int p = 0; p < P; ++p)
        if (soft_w[p] != 0) dot[p] = number(origin, e, p, int(scalar(r, kArgmax, p))) - m[p];
      return;
    }
    over_blocks(e, [&] { each_target(r, [&](int i, int v, A q) { dot[pixel_of(v)] += q * z[i][v]; }); });
    guard(r, e, dot);
    sum_across_groups(dot);
  }
  SELFREG_DEVICE void guard(int r, int e, A (&dot)[P]) const {
    bool good = true;
#pragma unroll
    for (int p = 0; p < P; ++p) good = good && dot[p] == dot[p];
    if (__builtin_expect(!good, false)) {
#pragma unroll
      for (int p = 0; p < P; ++p)
        if (dot[p] != dot[p]) dot[p] = guarded_dot(r, e, p);
    }
  }

  // sum_c target_c y_c with 0 log 0 = 0. Rarely needed: a test for every number would cost more.
  SELFREG_DEVICE A guarded_dot(int r, int e, int p) const {
    A dot = 0;
#pragma unroll 1
    for (int i = 0; i < a.rows; ++i) {
#pragma unroll 1
      for (int k = 0; k < (kLayout == Layout::lanes ? V : 1); ++k) {
        const int c = kLayout == Layout::lanes ? (group() + i * kLanes) * V + k : group() + i * a.groups;
        if (c >= C) continue;
        A q;
        if constexpr (kWhole) {
          q = target(r)[i * V + (kLayout == Layout::lanes ? k : p)];
        } else {
          const int teacher = a.teachers[r];
          const A y = number(origin_of(a.exits[teacher]), teacher, p, c) - scalar(r, kMax, p);
          q = exp2_fast(y * a.rate_tau + scalar(r, kLogFactor, p));
        }
        if (q != 0) dot += q * (number(origin, e, p, c) - m[p]);
      }
    }
    return dot;
  }

  // Takes the teachers' targets from z; of a whole row also the labels', where that can be, and says whether it was.
  SELFREG_DEVICE bool subtract_targets(int e) {
    if (argmax()) return false;
    // For the time being the label's target goes to its place in the row of a teacher, in units of that one's gain: a
    // few instructions for a pixel, not a comparison for every channel.
    const A ratio = kWhole && a.labels && summed() ? shared[a.at.ratios + e] : A(0);
    A* const row = target(teaches(0, e) ? 0 : 1);
    A kept[P];
    if (ratio != 0) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        kept[p] = row[place_in_row[p]];
        row[place_in_row[p]] = kept[p] + hot_in_row[p] * ratio;
      }
    }
    for (int r = 0; r < a.T; ++r) {
      if (!teaches(r, e)) continue;
      A k[P];
      gradient_of_loss(r + 1, e, k);
      each_target(r, [&](int i, int v, A q) { z[i][v] -= k[pixel_of(v)] * q; });
    }
    if (ratio != 0) {
#pragma unroll
      for (int p = P; p-- > 0;) row[place_in_row[p]] = kept[p];  // backwards: pixels without a label here share a place
    }
    return ratio != 0;
  }

  // What stands at single channels: the label, the teachers' argmax; and what smoothing gives to every class.
  SELFREG_DEVICE void subtract_hot(int e, const A (&label_k)[P], bool with_labels) {
    const int teachers = argmax() ? a.T : 0;
    for (int r = with_labels ? -1 : 0; r < teachers; ++r) {
      if (r >= 0 && !teaches(r, e)) continue;
      A k[P];
      gradient_of_loss(r + 1, e, k);
      int at[P];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        at[p] = place_of(r < 0 ? label[p] : int(scalar(r, kArgmax, p)));
        if (r < 0) k[p] = product(k[p], hot[p]);
      }
      each([&](int i, int v) {
        if (place(i, v) == at[pixel_of(v)]) z[i][v] -= k[pixel_of(v)];
      });
    }
    if (smoothed())
      each([&](int i, int v) {
        if (exists(i)) z[i][v] -= product(label_k[pixel_of(v)] * a.smoothing, class_weight(channel(i, v)));
      });
  }

  // ---- a teacher that learns: target_c (sum over students of k_s log-probability_sc) ----

  // said[i][v] of the block at hand of teacher r = exit e.
  SELFREG_DEVICE void what_students_say(int r, int e, A (&to)[I][V]) {
    A t[I][V], normalizers[P] = {};
    each([&](int i, int v) { to[i][v] = 0; });
    for (int s = 0; s < a.N; ++s) {
      if (s == e) continue;
      A k[P], peak[P];
      gradient_of_loss(r + 1, s, k);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        k[p] /= a.tau;
        peak[p] = saying(s, kPeak, p);
        normalizers[p] += k[p] * saying(s, kLogNormalizer, p);
      }
      load_block(s, origin_of(a.exits[s]), t, true);
      subtract_maximum(t, peak);
      each([&](int i, int v) {
        if (k[pixel_of(v)] != 0) to[i][v] += k[pixel_of(v)] * t[i][v];
      });
    }
    each_target(r, [&](int i, int v, A q) {
      to[i][v] = q == 0 || !exists(i) ? A(0) : q * (to[i][v] - normalizers[pixel_of(v)]);
    });
  }
  SELFREG_DEVICE void target_dot_said(int r, int e, A (&sum)[P]) {
    if constexpr (!kWhole) {
      over_blocks(e, [&] {
        A words[I][V];
        what_students_say(r, e, words);
        each([&](int i, int v) { sum[pixel_of(v)] += words[i][v]; });
      });
      sum_across_groups(sum);
    }
  }
  SELFREG_DEVICE void add_said(int r, int e, const A (&sum)[P]) {
    if constexpr (!kWhole) {
      A words[I][V];
      what_students_say(r, e, words);
      each([&](int i, int v) { z[i][v] -= words[i][v]; });
      if (soft_two()) each_target(r, [&](int i, int v, A q) { z[i][v] += q * sum[pixel_of(v)]; });
    }
  }

  // ---- the block ----

  // The tile at pixel `first`; where exits are resized, at row i1 of the band.
  SELFREG_DEVICE void tile(int64_t first) {
    begin_block(0);
    begin_tile(first);
    for (int r = 0; r < a.T; ++r) {
      read(a.teachers[r], true, r == a.T - 1);
      teach(r);
    }
    // Every exit learns; teachers that learn need what all their students said, so they come last.
    const int students = a.N, steps = students + (teacher_learns() ? a.T : 0);
    for (int step = 0; step < steps; ++step) {
      const bool again = !kWhole && step >= students;
      const int e = again ? a.teachers[step - students] : a.order[step];
      if (step > 0 || a.T == 0) read(e, false, true);  // the last teacher is the first student, and at hand
      student(e, again);
    }
  }

  // Whether any gradient is written is up to the exits' views; this is what it is made of.
  SELFREG_DEVICE A make_gain(int i, A label_norm, A soft_norm) const {
    const A norm = i < a.N ? label_norm : soft_norm, rate = i < a.N || a.target == Target::argmax ? A(1) : a.tau;
    if (a.reduction == Reduction::none) return rate;
    return product(a.grad_losses ? a.grad_losses[i] : a.weights[i], norm) * rate;
  }

  SELFREG_DEVICE void run() {
    double label = 0, soft = 0, weights = 0;
    if (a.counts) {
#pragma unroll 1
      for (int i = thread(); i < a.count_blocks; i += threads()) label += a.counts[2 * i], soft += a.counts[2 * i + 1];
      label = block_sum(label);
      soft = block_sum(soft);
    }
    if (smoothed()) {
#pragma unroll 1
      for (int c = thread(); c < C; c += threads()) weights += double(class_weight(c));
      weights = block_sum(weights);
    }
    const bool mean = a.reduction == Reduction::mean;
    label = mean ? norm_of(label) : 1;
    soft = !mean ? 1 : !a.counts ? a.soft_norm : norm_of(soft);
    all_weights = A(weights);
    if (blockIdx.x == 0 && thread() == 0) a.norm[0] = label, a.norm[1] = soft;

    const int entries = (a.T + 1) * a.N;
#pragma unroll 1
    for (int i = thread(); i < entries; i += threads())
      shared[a.at.gains + shared_entry(i / a.N, i % a.N)] = make_gain(i, A(label), A(soft));
    __syncthreads();
#pragma unroll 1
    for (int e = thread(); e < a.N; e += threads()) {
      // Pixels weigh the same for labels and teachers. 0: the exit has no teacher, or one of no gain; or there is one
      // channel alone, and the gradient is to be exactly 0.
      const int r = a.T > 0 && !teaches(0, e) ? 1 : 0;
      const A ratio = r < a.T && C > 1 ? gain(0, e) / gain(r + 1, e) : A(0);
      shared[a.at.ratios + e] = ratio - ratio == 0 ? ratio : A(0);
    }
    if (summed())
#pragma unroll 1
      for (int i = 0; i < entries; ++i) my_sums[i * threads()] = 0;
    __syncthreads();

    if constexpr (kResized) {
#pragma unroll 1
      for (int64_t band = blockIdx.x; band < a.size[0] * a.cut.bands * a.cut.strips; band = band_at() + gridDim.x) {
        begin_band(band);
        do {
          tile(0);
          i1 += P;
        } while (i1 < a.cut.height && unsigned(i1) % unsigned(a.cut.rows) != 0);
      }
    } else {
      const int64_t tile_pixels = int64_t(pixel_threads()) * P;
      for (int64_t first = blockIdx.x * tile_pixels; first < a.pixels; first += gridDim.x * tile_pixels) tile(first);
    }

    if (!summed()) return;
    __syncthreads();
    for (int i = thread() / 32; i < entries; i += threads() / 32) {  // a warp an entry
      double sum = 0;
      const A* const sums = shared + a.at.sums + shared_entry(i / a.N, i % a.N) * threads();
      const int apart = kLayout == Layout::lanes ? kLanes : 1;  // the threads that lead
#pragma unroll 1
      for (int k = thread() % 32; k < pixel_threads(); k += 32) sum += double(sums[k * apart]);
      sum = warp_sum(sum);
      if (thread() % 32 == 0) a.partial[int64_t(i) * gridDim.x + blockIdx.x] = sum;
    }
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kMaxThreads, Shape::kMinBlocks)
    exit_loss_kernel(const __grid_constant__ Args<A> args) {
  SELFREG_DYNAMIC_SHARED(shared);
  Worker<Shape>(args, reinterpret_cast<A*>(shared)).run();
}

template <class Shape>
__global__ void __launch_bounds__(Shape::kMaxThreads, Shape::kMinBlocks)
    small_exits_kernel(const __grid_constant__ SmallArgs args) {
  SELFREG_DYNAMIC_SHARED(shared);
  SmallWorker<Shape>(args, reinterpret_cast<float*>(shared)).run();
}

// ---- the choice of a shape -------------------------------------------------------------------------------------

template <Layout layout, int K, int V, int lanes, bool whole, bool plain>
bool launch_shape(const Launch<A>& launch, Args<A>& args, dim3 block) {
  using TheShape = Shape<layout, K, V, lanes, whole, plain>;
  const int together = layout == Layout::lanes ? lanes * V : args.groups;
  args.rows = (args.C + together - 1) / together;
  args.at = shared_layout<TheShape>(args, block.x * block.y, sizeof(S));
  const int64_t shared = args.at.total * int64_t(sizeof(A));
  const int64_t most = most_blocks(launch, exit_loss_kernel<TheShape>, block, shared);
  if (most == 0) return false;
  int64_t parts;
  if constexpr (layout == Layout::resized) {
    args.cut = *launch.cut = cut_output(args.size[0], args.size[1], args.size[2], block.x, TheShape::kPixels, most);
    parts = args.size[0] * args.cut.bands * args.cut.strips;
    const int most_channels = TheShape::kAccesses * args.groups, added = TheShape::kAddedTogether * args.groups;
    args.added_parts.set(((args.C < most_channels ? args.C : most_channels) + added - 1) / added * args.groups);
    if (!launch.dry)
      place_copies(args, args.cut, [&](int e, int64_t begin) { args.grads[e].data = launch.copies + begin; });
  } else {
    const int64_t tile = int64_t(layout == Layout::lanes ? block.x / lanes : block.x) * TheShape::kPixels;
    parts = (args.pixels + tile - 1) / tile;
  }
  launch_blocks(launch, exit_loss_kernel<TheShape>, args, block, shared, parts < most ? parts : most);
  return true;
}

#if SELFREG_STORAGE != 1

// A row of channels in registers, K of them a thread, V to an access where alignment allows. The more channels, the
// fewer pixels: K V numbers stay in registers.
template <Layout layout, int V, int lanes, bool plain>
bool launch_whole(const Launch<A>& launch, Args<A>& args, dim3 block, int channels) {
  constexpr int most = layout == Layout::lanes ? 32 : V == 4 ? 8 : V == 2 ? 24 : 32;
  if constexpr (most < 32 && layout != Layout::resized) {
    if (channels > most) return launch_whole<layout, V / 2, lanes, plain>(launch, args, block, channels);
  }
  if (channels <= 8) return launch_shape<layout, 8, V, lanes, true, plain>(launch, args, block);
  if constexpr (most > 8) {
    if (channels <= 16) return launch_shape<layout, 16, V, lanes, true, plain>(launch, args, block);
    if constexpr (has_fine_steps(layout, V, plain)) {
      if (channels <= 20) return launch_shape<layout, 20, V, lanes, true, plain>(launch, args, block);
      if (channels <= 22) return launch_shape<layout, 22, V, lanes, true, plain>(launch, args, block);
    }
    if constexpr (most >= 24) {
      if (channels <= 24) return launch_shape<layout, 24, V, lanes, true, plain>(launch, args, block);
    }
  }
  if constexpr (most >= 32 && has_fine_last_steps(layout, V, plain)) {
    if (channels <= 28) return launch_shape<layout, 28, V, lanes, true, plain>(launch, args, block);
    if (channels <= 30) return launch_shape<layout, 30, V, lanes, true, plain>(launch, args, block);
  }
  if constexpr (most >= 32) return launch_shape<layout, 32, V, lanes, true, plain>(launch, args, block);
  return false;
}

template <bool plain>
bool launch_planes(const Launch<A>& launch, Args<A>& args) {
  args.groups = (args.C + 31) / 32;                      // spreading a pixel over warps keeps its channels in registers
  if (args.groups > 16) args.groups += args.groups % 2;  // half warps: an even number of them
  const int channels = (args.C + args.groups - 1) / args.groups;
  const dim3 block = args.groups == 1 ? dim3(128, 1) : dim3(args.groups <= 16 ? 32 : 16, args.groups);
  if (launch.vector % 4 == 0) return launch_whole<Layout::planes, 4, 1, plain>(launch, args, block, channels);
  if (launch.vector % 2 == 0) return launch_whole<Layout::planes, 2, 1, plain>(launch, args, block, channels);
  return launch_whole<Layout::planes, 1, 1, plain>(launch, args, block, channels);
}

// Not all are smaller than the output, or with rare options: two rows at a time, which share what they are interpolated
// from.
template <bool plain>
bool launch_resized(const Launch<A>& launch, Args<A>& args) {
  args.groups = (args.C + 23) / 24;
  if (args.groups > 12) args.groups += args.groups % 2;  // half warps: an even number of them
  const int channels = (args.C + args.groups - 1) / args.groups;
  const dim3 block = args.groups == 1 ? dim3(128, 1) : dim3(args.groups <= 12 ? 32 : 16, args.groups);
  if (args.groups > 24) return false;
  return launch_whole<Layout::resized, 2, 1, plain>(launch, args, block, channels);
}

template <int K, bool spread>
bool launch_small_shape(const Launch<A>& launch, SmallArgs& small, dim3 block) {
  using TheShape = SmallShape<S, K, spread>;
  Args<A>& args = small.all;
  small.at = small_layout<TheShape>(small, block.x * block.y);
  const int64_t shared = small.at.total * int64_t(sizeof(A));
  const int64_t most = most_blocks(launch, small_exits_kernel<TheShape>, block, shared);
  if (most < (spread ? 1 : 2) * launch.processors)
    return false;  // four warps alone would wait: the general kernel has more
  args.cut = cut_output(args.size[0], args.size[1], args.size[2], block.x, TheShape::P, most);
  small.bands = int(args.size[0] * args.cut.bands * args.cut.strips);
  small.pitch = args.groups * K;
  place_vectors(small);
  int64_t positions = 1;
  for (int s = 0; s < args.sizes; ++s) {
    if (small.copy_numbers[s] >> 31) return false;
    const int2 from = args.from[small.size_first[s]];
    positions = std::max(positions, args.size[0] * from.x * from.y);
  }
  small.taken = true;
  small.combined_blocks = std::min((positions + kSmallThreads - 1) / kSmallThreads, kMaxCombineBlocks);
  const dim3 grid(unsigned(small.combined_blocks), unsigned(args.N));
  launch_kernel(launch, peak_kernel<S>, grid, kSmallThreads, 0, small);
  launch_blocks(launch, small_exits_kernel<TheShape>, small, block, shared, small.bands < most ? small.bands : most);
  launch_kernel(launch, combine_kernel<S>, grid, kSmallThreads, 0, small);
  return true;
}

bool launch_small(const Launch<A>& launch, SmallArgs& small) {
  Args<A>& args = small.all;
  args.groups = (args.C + kMostOfThread - 1) / kMostOfThread;
  if (args.groups > 8) args.groups += args.groups % 2;  // half warps: an even number of them
  const int channels = (args.C + args.groups - 1) / args.groups;
  if (args.groups > 1) {
    const dim3 block(args.groups <= 8 ? 32 : 16, args.groups);
    return channels <= 16 ? launch_small_shape<16, true>(launch, small, block)
                          : launch_small_shape<kMostOfThread, true>(launch, small, block);
  }
  return channels <= 8    ? launch_small_shape<8, false>(launch, small, dim3(128))
         : channels <= 16 ? launch_small_shape<16, false>(launch, small, dim3(128))
         : channels <= 20 ? launch_small_shape<20, false>(launch, small, dim3(128))
                          : launch_small_shape<kMostOfThread, false>(launch, small, dim3(128));
}

template <bool plain>
bool launch_lanes(const Launch<A>& launch, Args<A>& args) {
  args.groups = 1;
  if (args.C > 256) {
    if (launch.vector % 4 == 0) return launch_shape<Layout::lanes, 32, 4, 32, true, plain>(launch, args, dim3(128));
    return launch_shape<Layout::lanes, 32, 1, 32, true, plain>(launch, args, dim3(128));
  }
  const int channels = (args.C + 7) / 8;
  if (launch.vector % 4 == 0) return launch_whole<Layout::lanes, 4, 8, plain>(launch, args, dim3(128), channels);
  return launch_whole<Layout::lanes, 1, 8, plain>(launch, args, dim3(128), channels);
}

template <bool plain>
bool launch_rows_as(const Launch<A>& launch, Args<A>& args) {
  if (launch.layout == Layout::planes) return launch_planes<plain>(launch, args);
  if (launch.layout == Layout::resized) return launch_resized<plain>(launch, args);
  if (launch.layout == Layout::lanes || args.C > 32) return launch_lanes<plain>(launch, args);
  args.groups = 1;
  if constexpr (plain && sizeof(S) == 2) {  // of float, two pixels' rows leave room for too few threads
    if (args.pixels % 2 == 0) return launch_whole<Layout::staged, 2, 1, true>(launch, args, dim3(128), args.C);
  }
  return launch_whole<Layout::staged, 1, 1, plain>(launch, args, dim3(128), args.C);
}

bool launch_rows(const Launch<A>& launch, Args<A>& args) {
  if (args.teacher_learns || args.C > 1024 || !launch.near) return false;
  if (launch.small && launch_small(launch, *launch.small)) return true;
  return is_plain(args) ? launch_rows_as<true>(launch, args) : launch_rows_as<false>(launch, args);
}

#endif

// Rows that do not fit in registers or whose targets do not fit in shared memory, and what is rarely asked for.
bool launch_blockwise(const Launch<A>& launch, Args<A>& args, unsigned threads) {
  if (launch.layout == Layout::staged || launch.layout == Layout::lanes) {
    args.groups = 1;
    return launch_shape<Layout::lanes, 8, 1, 32, false, false>(launch, args, dim3(threads));
  }
  args.groups = args.C < 256 ? 1 : 8;
  const dim3 block(threads / args.groups, args.groups);
  if (launch.layout == Layout::resized)
    return launch_shape<Layout::resized, 8, 1, 1, false, false>(launch, args, block);
  return launch_shape<Layout::planes, 8, 1, 1, false, false>(launch, args, block);
}

}  // namespace

template <>
void launch_exit_loss<S>(const Launch<A>& launch, Args<A>& args) {
  bool fits = false;
#if SELFREG_STORAGE != 1
  fits = launch_rows(launch, args);
#endif
  for (unsigned threads = 128; !fits && threads >= 32; threads /= 2) fits = launch_blockwise(launch, args, threads);
  launch.works(fits ? cudaSuccess : cudaErrorInvalidConfiguration);
}

}  // namespace selfreg

// The exit-loss matrix on a GPU: phases 1 and 2 in one kernel. Compiled once for each storage type (SELFREG_STORAGE).
// Forward, forward with gradients and the recomputing backward are all this kernel: gradients are written where there
// is room for them.
//
// A block takes tiles of pixels in turn. A thread holds some channels of one or V pixels; what it shares with nobody
// (targets, sums) has its own column in shared memory, which needs no barrier. Per tile:
//   phase 1  each teacher: read, maximum, exponentials and their sums; its target row goes to shared memory
//   phase 2  each exit: read and maximum, if not just done; sums of exponentials; each loss; its gradient
// Phase 0 (what the means divide by) comes before, the fixed-order sum over blocks (phase 3) after, in launch.cu.
#include <cmath>
#include <type_traits>

#include "device.h"
#include "launch.h"

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
  static constexpr bool kWhole = Shape::kWhole;

  const Args<A>& a;
  A* const shared;
  A all_weights;  // sum of all class weights
  const int C;
  int turn = 0;  // of the two exchange buffers

  // The tile's pixels of this thread: the first, its coordinates, whether it exists; their weights and labels.
  int64_t pixel, i2;
  int i0, i1;
  bool inside;
  A label_w[P], soft_w[P], hot[P];
  int label[P];

  // The exit at hand: where its pixel lies, its maxima, and logits less those, of channels from c0 on.
  const S* origin;
  A m[P], z[I][V];
  int c0, accesses;  // the block of channels: where it begins, how many accesses of it are this thread's

  __device__ Worker(const Args<A>& args, A* numbers) : a(args), shared(numbers), C(args.C) {}

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
  // Which of the thread's accesses holds channel c, and at which place; -1: none.
  SELFREG_DEVICE int place_of(int c) const {
    const int ahead = c - channel(0, 0);
    if constexpr (kLayout == Layout::lanes) {
      const int i = ahead / (kLanes * V), v = ahead % (kLanes * V);
      return ahead >= 0 && v < V ? i * V + v : -1;
    }
    if (a.groups == 1) return ahead;
    return ahead >= 0 && ahead % a.groups == 0 ? ahead / a.groups : -1;
  }
  SELFREG_DEVICE static int place(int i, int v) { return kLayout == Layout::lanes ? i * V + v : i; }
  // The block of channels that begins at c.
  SELFREG_DEVICE void begin_block(int c) {
    c0 = c;
    const int left = C - channel(0, 0);
    accesses = a.groups == 1 && kLayout != Layout::lanes ? left : (left + stride() - 1) / stride();
  }
  SELFREG_DEVICE bool exists(int i) const {
    // The launch takes the smallest K that will do, of multiples of 8: all but the last 8 accesses are sure.
    return (kWhole && kLayout != Layout::lanes && i < I - 8) || i < accesses;
  }
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
    if constexpr (kLayout == Layout::planes) {
      if (a.groups == 1) return;
      // Two buffers in turn: who writes one again has passed the barrier after which all had read it.
      A* const buffer = shared + a.at.exchange + turn * threads() * P;
      turn ^= 1;
#pragma unroll
      for (int p = 0; p < P; ++p) buffer[p * threads() + thread()] = x[p];
      __syncthreads();
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const A* const column = buffer + p * threads() + slot();
        x[p] = column[0];
        for (int g = 1; g < a.groups; ++g) x[p] = op(x[p], column[g * pixel_threads()]);
      }
    }
  }
  SELFREG_DEVICE void sum_across_groups(A (&x)[P]) {
    across_groups(x, [](A u, A v) { return u + v; });
  }

  // Columns of shared memory.
  SELFREG_DEVICE A* target(int r, int i) const {
    return shared + a.at.targets + (r * threads() + thread()) * Shape::kTargetRow + i * V;
  }
  // P of a target row; m of its logits, or their argmax; log2 of its factor; its dot product with the exit at hand.
  enum Scalar { kSum, kMax, kArgmax = kMax, kLogFactor, kDot, kScalars };
  SELFREG_DEVICE A& scalar(int r, Scalar s, int p) const {
    return shared[a.at.scalars + ((r * kScalars + s) * P + p) * threads() + thread()];
  }
  enum Said { kPeak, kLogNormalizer };
  SELFREG_DEVICE A& saying(int e, Said s, int p) const {
    return shared[a.at.said + ((e * 2 + s) * P + p) * threads() + thread()];
  }

  // Label losses take exp(y); soft ones the same, or exp(y / tau).
  SELFREG_DEVICE bool soft_two() const { return a.target == Target::renormalized; }
  SELFREG_DEVICE bool teaches(int r, int e) const { return a.teachers[r] != e; }
  SELFREG_DEVICE int entry(int r, int e) const { return r * a.N + e; }

  // ---- pixels ----

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
  SELFREG_DEVICE S* origin_of(const PixelView& view) const {
    int64_t offset = i2 * view.step[2];
    if (a.dims > 1) offset += i1 * view.step[1];
    if (a.dims > 2) offset += i0 * view.step[0];
    return static_cast<S*>(view.data) + offset;
  }

  SELFREG_DEVICE int64_t label_at(int64_t i) const {
    switch (a.label_type) {
      case LabelType::uint8: return static_cast<const uint8_t*>(a.labels)[i];
      case LabelType::int32: return static_cast<const int32_t*>(a.labels)[i];
      default: return static_cast<const int64_t*>(a.labels)[i];
    }
  }

  // Weights and labels of the tile's pixels. The logits of a pixel that does not count are taken as zeros, and those of
  // one that does not exist are the first pixel's.
  SELFREG_DEVICE void begin_tile(int64_t first) {
    pixel = first + int64_t(slot()) * P;
    inside = pixel < a.pixels;  // V divides the number of pixels
    locate();
#pragma unroll
    for (int p = 0; p < P; ++p) {
      soft_w[p] = !inside ? A(0) : a.pixel_weight ? a.pixel_weight[pixel + p] : A(1);
      label_w[p] = hot[p] = 0;
      label[p] = -1;
      if (a.labels) {
        const int64_t y = inside ? label_at(pixel + p) : a.ignore_index;
        if (y != a.ignore_index) {
          label_w[p] = soft_w[p];
          const bool good = y >= 0 && y < C;
          label[p] = good ? int(y) : 0;
          hot[p] = (a.class_weight ? a.class_weight[label[p]] : A(1)) * a.hot_weight;
          if (!good) hot[p] = A(NAN);  // neither a class nor ignored: shows in the loss and in the gradient
          if (label_w[p] == 0) hot[p] = 0;
        }
        if (a.mask_soft) soft_w[p] = label_w[p];
      }
    }
  }
  // A pixel that counts for the labels counts for soft losses, if there are any.
  SELFREG_DEVICE bool counted(int p) const { return (a.T ? soft_w[p] : label_w[p]) != 0; }

  // ---- reading and writing ----

  // Room for the rows of this warp's 32 pixels.
  SELFREG_DEVICE S* staged_rows() const { return reinterpret_cast<S*>(shared + a.at.staged) + thread() / 32 * 32 * C; }

  // One number of the exit that lies at `from`.
  SELFREG_DEVICE A number(const S* from, const PixelView& view, int p, int c) const {
    return to_number(__ldg(from + c * view.channel + (kLayout == Layout::lanes ? 0 : p)));  // V pixels lie side by side
  }

  // Logits of exit e, which lies at `from`, from channel c0 on, the lowest number where there is no channel; `again`:
  // they will be read once more.
  SELFREG_DEVICE void load_block(int e, const S* from, A (&to)[I][V], bool again) const {
    if constexpr (kLayout == Layout::staged) {
      S* const rows = staged_rows();
      copy_rows(static_cast<const S*>(a.exits[e].data), rows, again);
      const S* const row = rows + threadIdx.x % 32 * C;
#pragma unroll
      for (int i = 0; i < I; ++i) to[i][0] = exists(i) ? to_number(row[i]) : kLowest<A>;
      __syncwarp();
    } else {
      const int64_t step = stride() * a.exits[e].channel;
      const S* p = from + channel(0, 0) * a.exits[e].channel;
      auto load_all = [&](auto once) {
#pragma unroll
        for (int i = 0; i < I; ++i, p += step) {
          if (exists(i)) {
            load<S, V, decltype(once)::value>(p, to[i]);
          } else {
#pragma unroll
            for (int v = 0; v < V; ++v) to[i][v] = kLowest<A>;
          }
        }
      };
      if (again) {
        load_all(std::false_type());
      } else {
        load_all(std::true_type());
      }
    }
    bool all = true;
#pragma unroll
    for (int p = 0; p < P; ++p) all = all && counted(p);
    if (__builtin_expect(!all, false)) each([&](int i, int v) { to[i][v] = counted(pixel_of(v)) ? to[i][v] : A(0); });
  }

  // The rows of a warp's 32 pixels, one after the other in memory and in shared memory.
  SELFREG_DEVICE void copy_rows(const S* from, S* to, bool again) const {
    constexpr int kVector = 16 / sizeof(S);
    const int lane = threadIdx.x % 32;
    const int64_t first = pixel - lane, left = a.pixels - first;
    const int count = left <= 0 ? 0 : int(left < 32 ? left : 32) * C;
    from += first * C;
    for (int i = lane * kVector; i < count; i += 32 * kVector) {
      if (i + kVector <= count) {
        const uint4* const word = reinterpret_cast<const uint4*>(from + i);
        *reinterpret_cast<uint4*>(to + i) = again ? __ldg(word) : __ldcs(word);
      } else {
        for (int k = i; k < count; ++k) to[k] = from[k];
      }
    }
    __syncwarp();
  }

  // Writes z as the gradient of exit e from channel c0 on.
  SELFREG_DEVICE void store_block(int e) const {
    const PixelView& view = a.grads[e];
    if constexpr (kLayout == Layout::staged) {
      S* const rows = staged_rows();
      S* const row = rows + threadIdx.x % 32 * C;
#pragma unroll
      for (int i = 0; i < I; ++i)
        if (exists(i)) row[i] = to_storage<S>(z[i][0]);
      __syncwarp();
      constexpr int kVector = 16 / sizeof(S);
      const int lane = threadIdx.x % 32;
      const int64_t first = pixel - lane, left = a.pixels - first;
      const int count = left <= 0 ? 0 : int(left < 32 ? left : 32) * C;
      S* const to = static_cast<S*>(view.data) + first * C;
      for (int i = lane * kVector; i < count; i += 32 * kVector) {
        if (i + kVector <= count) {
          __stcs(reinterpret_cast<uint4*>(to + i), *reinterpret_cast<const uint4*>(rows + i));
        } else {
          for (int k = i; k < count; ++k) to[k] = rows[k];
        }
      }
      __syncwarp();
      return;
    }
    if (!inside) return;
    S* p = origin_of(view) + channel(0, 0) * view.channel;
    const int64_t step = stride() * view.channel;
#pragma unroll
    for (int i = 0; i < I; ++i) {
      if (exists(i)) store<S, V>(p, z[i]);
      p += step;
    }
  }

  SELFREG_DEVICE void subtract_maximum(A (&from)[I][V], const A (&peak)[P]) const {
    each([&](int i, int v) { from[i][v] = exists(i) ? from[i][v] - peak[pixel_of(v)] : kNoChannel; });
  }

  // The maximum over channels of exit e; where kWhole, z becomes its logits less the maximum.
  SELFREG_DEVICE void read(int e, bool again) {
    origin = origin_of(a.exits[e]);
#pragma unroll
    for (int p = 0; p < P; ++p) m[p] = kLowest<A>;
    auto update = [&] { each([&](int i, int v) { m[pixel_of(v)] = larger(m[pixel_of(v)], z[i][v]); }); };
    if constexpr (kWhole) {
      load_block(e, origin, z, again);
      update();
    } else {
      for (int c = 0; c < C; c += I * stride()) {
        begin_block(c);
        load_block(e, origin, z, true);
        update();
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
  SELFREG_DEVICE void each_target(int r, F f) const {
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < I; ++i) {
        A q[V];
        load_shared(target(r, i), q);
#pragma unroll
        for (int v = 0; v < V; ++v) f(i, v, q[v]);
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
    if (a.target == Target::argmax) {
      find_argmax(r, e);
      return;
    }
    const bool two = a.target == Target::raw && a.tau != A(1);  // Z = sum exp(y) beside sum exp(y / tau)
    A u[P] = {}, Z[P] = {};
    over_blocks(e, [&] {
      each([&](int i, int v) { u[pixel_of(v)] += exp2_of(z[i][v], a.rate_tau); });
      if (two) each([&](int i, int v) { Z[pixel_of(v)] += exp2_of(z[i][v], A(kLog2e)); });
    });
    sum_across_groups(u);
    if (two) sum_across_groups(Z);
    A log_factor[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      log_factor[p] = two ? -log2(Z[p]) / a.tau : -log2(u[p]);
      scalar(r, kSum, p) = two ? u[p] * exp2_fast(log_factor[p]) : A(1);
      scalar(r, kMax, p) = m[p];
      scalar(r, kLogFactor, p) = log_factor[p];
    }
    if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < I; ++i) {
        A q[V];
#pragma unroll
        for (int v = 0; v < V; ++v) q[v] = exp2_fast(z[i][v] * a.rate_tau + log_factor[pixel_of(v)]);
        store_shared(target(r, i), q);
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
    for (int p = 0; p < P; ++p) scalar(r, kArgmax, p) = first[p], scalar(r, kSum, p) = 1;
  }

  // ---- phase 2 ----

  // What multiplies sigma - target in the gradient: the loss's own gradient x the mean's divisor x the pixel's weight,
  // and tau for soft targets.
  SELFREG_DEVICE A gradient_of_loss(int r, int e, int p) const {
    const A weight = r == 0 ? label_w[p] : soft_w[p], gain = shared[a.at.gains + entry(r, e)];
    if (a.reduction != Reduction::none) return weight * gain;
    return weight == 0 ? A(0) : weight * gain * a.grad_losses[int64_t(entry(r, e)) * a.pixels + pixel + p];
  }

  SELFREG_DEVICE void put_loss(int r, int e, const A (&loss)[P]) const {
    if (group() != 0) return;
    A sum = 0;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const A w = r == 0 ? label_w[p] : soft_w[p], weighted = w == 0 ? A(0) : w * loss[p];
      if (a.reduction == Reduction::none && inside) a.maps[int64_t(entry(r, e)) * a.pixels + pixel + p] = weighted;
      sum += weighted;
    }
    if (a.reduction != Reduction::none) shared[a.at.sums + entry(r, e) * pixel_threads() + slot()] += sum;
  }

  // Losses of the exit at hand, e, and its gradient. `as_teacher`: not its losses, but its gradient with what its
  // students make of it.
  SELFREG_DEVICE void student(int e, bool as_teacher) {
    int self = -1;
    for (int r = 0; r < a.T; ++r)
      if (!teaches(r, e)) self = r;
    const bool with_losses = !as_teacher;
    const bool with_gradient = a.grads[e].data && (a.teacher_learns && self >= 0) == as_teacher;

    // Dot products with the targets.
    A label_y[P] = {}, smooth_dot[P] = {};
#pragma unroll
    for (int p = 0; p < P; ++p)
      if (label_w[p] != 0) label_y[p] = number(origin, a.exits[e], p, label[p]) - m[p];
    if (with_losses)
      for (int r = 0; r < a.T; ++r)
        if (teaches(r, e)) dot_with_target(r, e);
    if (a.smoothing != 0) {
      over_blocks(e, [&] {
        each([&](int i, int v) {
          const A w = exists(i) ? class_weight(channel(i, v)) : A(0);
          if (w != 0) smooth_dot[pixel_of(v)] += w * z[i][v];
        });
      });
      sum_across_groups(smooth_dot);
    }

    // Sums of exponentials. All losses share exp(y), or exp(y / tau); only label losses beside renormalised ones need
    // both. A whole row of those that all share then takes the place of y.
    const bool both = a.labels && soft_two() && a.T > 0, in_place = kWhole && !both;
    const A rate = soft_two() && !a.labels ? a.rate_tau : A(kLog2e);
    A Z[P] = {}, soft_Z[P] = {};
    over_blocks(e, [&] {
      if (both) each([&](int i, int v) { soft_Z[pixel_of(v)] += exp2_of(z[i][v], a.rate_tau); });
      each([&](int i, int v) {
        const A u = exp2_of(z[i][v], rate);
        Z[pixel_of(v)] += u;
        if (in_place) z[i][v] = u;
      });
    });
    sum_across_groups(Z);
    if (both) sum_across_groups(soft_Z);

    // losses
    if (with_losses) {
      A log_z[P], soft_log_z[P], loss[P];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        log_z[p] = log2(Z[p]) * A(kLn2);
        soft_log_z[p] = both ? log2(soft_Z[p]) * A(kLn2) : log_z[p];
        loss[p] = label_loss(hot[p], label_y[p], log_z[p], a.smoothing, all_weights, smooth_dot[p]);
        if (a.teacher_learns) {
          saying(e, kPeak, p) = m[p];
          saying(e, kLogNormalizer, p) = soft_two() ? a.tau * soft_log_z[p] : soft_log_z[p];
        }
      }
      put_loss(0, e, loss);
      for (int r = 0; r < a.T; ++r) {
#pragma unroll
        for (int p = 0; p < P; ++p) loss[p] = teaches(r, e) ? loss_of(r, p, soft_log_z[p]) : A(0);
        put_loss(r + 1, e, loss);
      }
    }
    if (!with_gradient) return;

    // gradient_c = exp(y_c) f + exp(y_c / tau) soft_f - sum_r k_r target_rc - ...
    A f[P], soft_f[P], label_k[P], self_sum[P] = {};
    if (as_teacher) target_dot_said(self, e, self_sum);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      label_k[p] = gradient_of_loss(0, e, p);
      A q = label_k[p] * (hot[p] + a.smoothing * all_weights), soft_q = 0;  // sums of the targets
      for (int r = 0; r < a.T; ++r)
        if (teaches(r, e)) soft_q += gradient_of_loss(r + 1, e, p) * scalar(r, kSum, p);
      if (!soft_two()) soft_q += self_sum[p];
      if (!both) q += soft_q;
      f[p] = quotient(q, Z[p]);
      soft_f[p] = both ? quotient(soft_q, soft_Z[p]) : A(0);
    }
    over_blocks(e, [&] {
      if (both) {
        each([&](int i, int v) {
          z[i][v] = exp2_of(z[i][v], rate) * f[pixel_of(v)] + exp2_of(z[i][v], a.rate_tau) * soft_f[pixel_of(v)];
        });
      } else {
        each([&](int i, int v) { z[i][v] = (in_place ? z[i][v] : exp2_of(z[i][v], rate)) * f[pixel_of(v)]; });
      }
      if (a.target != Target::argmax)
        for (int r = 0; r < a.T; ++r)
          if (teaches(r, e)) subtract_target(r, e);
      if (as_teacher) add_said(self, e, self_sum);
      subtract_labels(e, label_k);
      store_block(e);
    });
  }

  SELFREG_DEVICE A class_weight(int c) const { return a.class_weight ? a.class_weight[c] : A(1); }

  // The dot product of the r-th teacher's target and exit e's y: for argmax, the y at that place.
  SELFREG_DEVICE void dot_with_target(int r, int e) {
    A dot[P] = {};
    if (a.target == Target::argmax) {
#pragma unroll
      for (int p = 0; p < P; ++p)
        if (soft_w[p] != 0) dot[p] = number(origin, a.exits[e], p, int(scalar(r, kArgmax, p))) - m[p];
    } else {
      over_blocks(e, [&] { each_target(r, [&](int i, int v, A q) { dot[pixel_of(v)] += q * z[i][v]; }); });
#pragma unroll
      for (int p = 0; p < P; ++p)
        if (dot[p] != dot[p]) dot[p] = guarded_dot(r, e, p);
      sum_across_groups(dot);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) scalar(r, kDot, p) = dot[p];
  }
  SELFREG_DEVICE A loss_of(int r, int p, A log_z) const {
    if (a.target == Target::argmax) return log_z - scalar(r, kDot, p);
    return soft_loss(scalar(r, kSum, p), scalar(r, kDot, p), log_z, soft_two() ? a.tau * a.tau : a.tau, a.tau);
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
          q = target(r, i)[kLayout == Layout::lanes ? k : p];
        } else {
          const PixelView& teacher = a.exits[a.teachers[r]];
          const A y = number(origin_of(teacher), teacher, p, c) - scalar(r, kMax, p);
          q = exp2_fast(y * a.rate_tau + scalar(r, kLogFactor, p));
        }
        if (q != 0) dot += q * (number(origin, a.exits[e], p, c) - m[p]);
      }
    }
    return dot;
  }

  SELFREG_DEVICE void subtract_target(int r, int e) {
    A k[P];
#pragma unroll
    for (int p = 0; p < P; ++p) k[p] = gradient_of_loss(r + 1, e, p);
    each_target(r, [&](int i, int v, A q) { z[i][v] -= k[pixel_of(v)] * q; });
  }

  // What stands at single channels: the label, the teachers' argmax; and what smoothing gives to every class.
  SELFREG_DEVICE void subtract_labels(int e, const A (&label_k)[P]) {
    const int teachers = a.target == Target::argmax ? a.T : 0;
    for (int r = a.labels ? -1 : 0; r < teachers; ++r) {
      if (r >= 0 && !teaches(r, e)) continue;
      int at[P];
      A k[P];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        at[p] = place_of(r < 0 ? label[p] : int(scalar(r, kArgmax, p)));
        k[p] = r < 0 ? label_k[p] * hot[p] : gradient_of_loss(r + 1, e, p);
      }
      each([&](int i, int v) {
        if (place(i, v) == at[pixel_of(v)]) z[i][v] -= k[pixel_of(v)];
      });
    }
    if (a.smoothing != 0)
      each([&](int i, int v) {
        if (exists(i)) z[i][v] -= label_k[pixel_of(v)] * a.smoothing * class_weight(channel(i, v));
      });
  }

  // ---- a teacher that learns: target_c (sum over students of k_s log-probability_sc) ----

  // said[i][v] of the block at hand of teacher r = exit e.
  SELFREG_DEVICE void what_students_say(int r, int e, A (&to)[I][V]) const {
    A t[I][V], normalizers[P] = {};
    each([&](int i, int v) { to[i][v] = 0; });
    for (int s = 0; s < a.N; ++s) {
      if (s == e) continue;
      A k[P], peak[P];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        k[p] = gradient_of_loss(r + 1, s, p) / a.tau;
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

  SELFREG_DEVICE void tile(int64_t first) {
    begin_tile(first);
    begin_block(0);
    // Every teacher teaches, every exit learns; teachers that learn need what all their students said, so they come
    // last.
    const int students = a.T + a.N, steps = students + (!kWhole && a.teacher_learns ? a.T : 0);
    for (int step = 0; step < steps; ++step) {
      const bool teaching = step < a.T, again = !kWhole && step >= students;
      const int e = teaching ? a.teachers[step] : again ? a.teachers[step - students] : a.order[step - a.T];
      if (step == 0 || step != a.T) read(e, teaching);  // the last teacher is the first student, and at hand
      if (teaching) {
        teach(step);
      } else {
        student(e, again);
      }
    }
  }

  // Whether any gradient is written is up to the exits' views; this is what it is made of.
  SELFREG_DEVICE A gain(int i, A label_norm, A soft_norm) const {
    const A norm = i < a.N ? label_norm : soft_norm, rate = i < a.N || a.target == Target::argmax ? A(1) : a.tau;
    if (a.reduction == Reduction::none) return rate;
    return (a.grad_losses ? a.grad_losses[i] : a.weights[i]) * norm * rate;
  }

  SELFREG_DEVICE void run() {
    double label = 0, soft = 0, weights = 0;
    if (a.counts) {
#pragma unroll 1
      for (int i = thread(); i < a.count_blocks; i += threads()) label += a.counts[2 * i], soft += a.counts[2 * i + 1];
      label = block_sum(label);
      soft = block_sum(soft);
    }
    if (a.smoothing != 0) {
#pragma unroll 1
      for (int c = thread(); c < C; c += threads()) weights += double(class_weight(c));
      weights = block_sum(weights);
    }
    const bool mean = a.reduction == Reduction::mean;
    label = !mean ? 1 : label == 0 ? 0 : 1 / label;
    soft = !mean ? 1 : !a.counts ? a.soft_norm : soft == 0 ? 0 : 1 / soft;
    all_weights = A(weights);
    if (blockIdx.x == 0 && thread() == 0) a.norm[0] = label, a.norm[1] = soft;

    const int entries = (a.T + 1) * a.N;
    const bool summed = a.reduction != Reduction::none;
#pragma unroll 1
    for (int i = thread(); i < entries; i += threads()) shared[a.at.gains + i] = gain(i, A(label), A(soft));
    if (summed && group() == 0)
#pragma unroll 1
      for (int i = 0; i < entries; ++i) shared[a.at.sums + i * pixel_threads() + slot()] = 0;
    __syncthreads();

    const int64_t tile_pixels = int64_t(pixel_threads()) * P;
    for (int64_t first = blockIdx.x * tile_pixels; first < a.pixels; first += gridDim.x * tile_pixels) tile(first);

    if (!summed) return;
    __syncthreads();
    for (int i = thread() / 32; i < entries; i += threads() / 32) {  // a warp an entry
      double sum = 0;
#pragma unroll 1
      for (int k = thread() % 32; k < pixel_threads(); k += 32)
        sum += double(shared[a.at.sums + i * pixel_threads() + k]);
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

// ---- the choice of a shape -------------------------------------------------------------------------------------

template <Layout layout, int K, int V, int lanes, bool whole>
bool launch_shape(const Launch<A>& launch, Args<A>& args, dim3 block) {
  using TheShape = Shape<layout, K, V, lanes, whole>;
  const int together = layout == Layout::lanes ? lanes * V : args.groups;
  args.rows = (args.C + together - 1) / together;
  args.at = shared_layout<TheShape>(args, block.x * block.y, sizeof(S));
  const int64_t tile = int64_t(layout == Layout::lanes ? block.x / lanes : block.x) * TheShape::kPixels;
  return launch_blocks(launch, exit_loss_kernel<TheShape>, args, block, args.at.total * int64_t(sizeof(A)), tile);
}

#if SELFREG_STORAGE != 1

// A row of channels in registers, K of them a thread, V to an access where alignment allows. The more channels, the
// fewer pixels: K V numbers stay in registers.
template <Layout layout, int V, int lanes>
bool launch_whole(const Launch<A>& launch, Args<A>& args, dim3 block, int channels) {
  constexpr int most = layout != Layout::planes ? 32 : V == 4 ? 8 : V == 2 ? 24 : 32;
  if constexpr (most < 32) {
    if (channels > most) return launch_whole<layout, V / 2, lanes>(launch, args, block, channels);
  }
  if (channels <= 8) return launch_shape<layout, 8, V, lanes, true>(launch, args, block);
  if constexpr (most >= 24) {
    if (channels <= 16) return launch_shape<layout, 16, V, lanes, true>(launch, args, block);
    if (channels <= 24) return launch_shape<layout, 24, V, lanes, true>(launch, args, block);
  }
  if constexpr (most >= 32) return launch_shape<layout, 32, V, lanes, true>(launch, args, block);
  return false;
}

bool launch_planes(const Launch<A>& launch, Args<A>& args) {
  args.groups = (args.C + 31) / 32;                      // spreading a pixel over warps keeps its channels in registers
  if (args.groups > 16) args.groups += args.groups % 2;  // half warps: an even number of them
  const int channels = (args.C + args.groups - 1) / args.groups;
  const dim3 block = args.groups == 1 ? dim3(128, 1) : dim3(args.groups <= 16 ? 32 : 16, args.groups);
  if (launch.vector % 4 == 0) return launch_whole<Layout::planes, 4, 1>(launch, args, block, channels);
  if (launch.vector % 2 == 0) return launch_whole<Layout::planes, 2, 1>(launch, args, block, channels);
  return launch_whole<Layout::planes, 1, 1>(launch, args, block, channels);
}

bool launch_lanes(const Launch<A>& launch, Args<A>& args) {
  args.groups = 1;
  if (args.C > 256) {
    if (launch.vector % 4 == 0) return launch_shape<Layout::lanes, 32, 4, 32, true>(launch, args, dim3(128));
    return launch_shape<Layout::lanes, 32, 1, 32, true>(launch, args, dim3(128));
  }
  const int channels = (args.C + 7) / 8;
  if (launch.vector % 4 == 0) return launch_whole<Layout::lanes, 4, 8>(launch, args, dim3(128), channels);
  return launch_whole<Layout::lanes, 1, 8>(launch, args, dim3(128), channels);
}

bool launch_rows(const Launch<A>& launch, Args<A>& args) {
  if (args.teacher_learns || args.C > 1024) return false;
  if (launch.layout == Layout::planes) return launch_planes(launch, args);
  if (launch.layout == Layout::lanes || args.C > 32) return launch_lanes(launch, args);
  args.groups = 1;
  return launch_whole<Layout::staged, 1, 1>(launch, args, dim3(128), args.C);
}

#endif

// Rows that do not fit in registers or whose targets do not fit in shared memory, and what is rarely asked for.
bool launch_blockwise(const Launch<A>& launch, Args<A>& args, unsigned threads) {
  if (launch.layout != Layout::planes) {
    args.groups = 1;
    return launch_shape<Layout::lanes, 8, 1, 32, false>(launch, args, dim3(threads));
  }
  args.groups = args.C < 256 ? 1 : 8;
  return launch_shape<Layout::planes, 8, 1, 1, false>(launch, args, dim3(threads / args.groups, args.groups));
}

}  // namespace

template <>
cudaError_t launch_exit_loss<S>(const Launch<A>& launch, Args<A>& args) {
  bool fits = false;
#if SELFREG_STORAGE != 1
  fits = launch_rows(launch, args);
#endif
  for (unsigned threads = 128; !fits && threads >= 32; threads /= 2) fits = launch_blockwise(launch, args, threads);
  return fits ? cudaGetLastError() : cudaErrorInvalidConfiguration;
}

}  // namespace selfreg

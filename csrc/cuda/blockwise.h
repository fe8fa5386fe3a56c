// Any launch: the exit-loss matrix, phases 1 and 2, in passes over blocks of channels. It is taken where no faster
// kernel will do (exit_loss.cu): rows that do not fit in registers, float64, maps instead of sums, teachers that learn,
// exits larger than the output. Nothing is held back for the next pass but a few numbers a pixel: so there is no limit
// to the channels, and an option is a few lines.
//
// A block has a strip of pixels of one row of the output, `slots` of them; `groups` threads share a pixel:
//             slot 0   slot 1   ...
//   group 0   c = 0, groups, 2 groups, ...
//   group 1   c = 1, groups + 1, ...
// It takes a band of rows of a strip, and walks down it. Per tile, a row of the strip:
//   phase 1  each teacher: maximum, sums of exponentials, what its targets are powers of: three numbers a pixel
//   phase 2  each exit: maximum, sums of exponentials; each loss; its gradient, for which targets are computed anew
// An exit of another size is interpolated number by number. The gradient's block of channels goes to shared memory;
// then a thread adds what lies under a position of the exit to the band's copy of it.
#pragma once

#include "blockwise_tile.h"

namespace selfreg {

template <class S>
struct Blockwise : BlockwiseTile<S> {
  using Base = BlockwiseTile<S>;
  using Base::Base;
  using Base::I, Base::a, Base::across, Base::all_class_weights, Base::argmax, Base::args, Base::begin_band,
      Base::column, Base::column_of, Base::counts, Base::each, Base::group, Base::groups, Base::image, Base::inside,
      Base::log_z_of_student, Base::maximum, Base::over_blocks, Base::peak_of_student, Base::pixel, Base::read,
      Base::read_targets, Base::resized, Base::row, Base::scatter, Base::shared, Base::slots, Base::source, Base::store,
      Base::sum_across, Base::taught, Base::teacher_of, Base::thread, Base::weights;
  using typename Base::A;
  using typename Base::Source;

  // ---- phase 1 ----

  SELFREG_DEVICE void teach(int r) {
    const Source from = source(a.teachers[r]);
    if (argmax()) return find_argmax(r, from);
    // Beside u = sum exp(y / tau), a raw power of tau != 1 needs Z = sum exp(y).
    const bool two = a.target == Target::raw && a.tau != A(1);
    const A peak = maximum(from);
    A u = 0, Z = 0;
    over_blocks([&](int first) {
      A y[I];
      read(from, first, peak, y);
#pragma unroll
      for (int i = 0; i < I; ++i) {
        u += exp2_of(y[i], a.rate_tau);
        if (two) Z += exp2_of(y[i], A(kLog2e));
      }
    });
    u = sum_across(u);
    if (two) Z = sum_across(Z);
    const A log_factor = two ? log2_fast(Z) * (a.rate_tau * A(-kLn2)) : -log2_fast(u);
    taught(r, kMax) = peak;
    taught(r, kLogFactor) = log_factor;
    taught(r, kNormalizer) = two ? Z : u;
    taught(r, kSum) = two ? u * exp2_fast(log_factor) : A(1);
  }

  // The first of the largest, as torch.argmax; NaN counts as the largest.
  SELFREG_DEVICE void find_argmax(int r, const Source& from) {
    A top = kLowest<A>, place = A(a.C);
    over_blocks([&](int first) { each(first, [&](int, int c) { top = larger_or_nan(top, from(c)); }); });
    top = across(top, [](A u, A v) { return larger_or_nan(u, v); });
    over_blocks([&](int first) {
      each(first, [&](int, int c) {
        if (is_largest(from(c), top) && A(c) < place) place = A(c);
      });
    });
    taught(r, kArgmax) = across(place, [](A u, A v) { return u < v ? u : v; });
    taught(r, kSum) = 1;
  }

  // ---- phase 2 ----

  SELFREG_DEVICE A gain(int r, int e) const { return shared[args.at.gains + r * a.N + e]; }
  // Times the pixel's weight, and with maps the pixel's own gradient of the loss.
  SELFREG_DEVICE A gradient_of_loss(int r, int e) const {
    const A k = product(r == 0 ? weights.label : weights.soft, gain(r, e));
    if (a.reduction != Reduction::none || !a.grad_losses || k == 0) return k;
    return k * a.grad_losses[int64_t(r * a.N + e) * a.pixels + pixel];
  }
  SELFREG_DEVICE void put_loss(int r, int e, A loss) const {
    if (a.reduction != Reduction::none) {
      *column_of(args.at.sums, r * a.N + e) += loss;  // those of group 0 will count
    } else if (inside && group == 0) {
      a.maps[int64_t(r * a.N + e) * a.pixels + pixel] = loss;
    }
  }

  // Losses of exit e, and its gradient; of a teacher that learns, the factors of it.
  SELFREG_DEVICE void learn(int e) {
    const Source from = source(e);
    const bool both = a.two_rates();
    const A rate = both ? A(kLog2e) : a.rate, peak = maximum(from);
    A Z = 0, soft_Z = 0, smooth_dot = 0;
    over_blocks([&](int first) {
      A y[I];
      read(from, first, peak, y);
      each(first, [&](int i, int c) {
        Z += exp2_of(y[i], rate);
        if (both) soft_Z += exp2_of(y[i], a.rate_tau);
        if (a.smoothing != 0) smooth_dot += product(class_weight(a, c), y[i]);
      });
    });
    Z = sum_across(Z);
    soft_Z = both ? sum_across(soft_Z) : Z;
    if (a.smoothing != 0) smooth_dot = sum_across(smooth_dot);
    const A log_z = log_normalizer(Z), soft_log_z = log_normalizer(soft_Z);
    if (a.teacher_learns) {
      peak_of_student(e) = peak;
      log_z_of_student(e) = a.target == Target::renormalized ? a.tau * soft_log_z : soft_log_z;
    }

    A loss = 0, label_sum = 0, soft_sum = 0;
    if (weights.label != 0) {
      const A y = from(weights.label_class) - peak;
      loss = weights.label * label_loss(weights.hot, y, log_z, a.smoothing, all_class_weights, smooth_dot);
      label_sum = product(gradient_of_loss(0, e), weights.hot + a.smoothing * all_class_weights);
    }
    put_loss(0, e, loss);
    for (int r = 0; r < a.T; ++r) {
      A dot = 0;
      const bool teaches = a.teachers[r] != e;
      if (teaches) dot = dot_with_target(r, from, peak);
      const A sum = taught(r, kSum);
      put_loss(r + 1, e, teaches ? weights.soft * soft_loss(sum, dot, soft_log_z, a.log_z_scale, a.dot_scale) : A(0));
      if (teaches) soft_sum += product(gradient_of_loss(r + 1, e), sum);
    }
    if (!a.grads[e].data) return;
    if (!both) label_sum += soft_sum;
    const A f = label_sum * reciprocal(Z), soft_f = both ? soft_sum * reciprocal(soft_Z) : A(0);
    const int self = a.teacher_learns ? teacher_of(e) : -1;
    if (self >= 0) {
      taught(self, kLabelFactor) = f, taught(self, kSoftFactor) = soft_f;
    } else {
      write_gradient(e, peak, f, soft_f);
    }
  }

  SELFREG_DEVICE A dot_with_target(int r, const Source& student, A peak) {
    if (argmax()) return weights.soft != 0 ? student(int64_t(taught(r, kArgmax))) - peak : A(0);
    const Source teacher = source(a.teachers[r]);
    A dot = 0;
    over_blocks([&](int first) {
      A y[I], q[I];
      read(student, first, peak, y);
      read_targets(r, teacher, first, q);
#pragma unroll
      for (int i = 0; i < I; ++i) dot += product(q[i], y[i]);  // 0 log 0 = 0
    });
    return sum_across(dot);
  }

  // gradient_c = exp(y_c) f + exp(y_c / tau) soft_f - sum_r k_r target_rc - k hot_c, and of a teacher that learns less
  // what_students_ask of it: see there.
  SELFREG_DEVICE void write_gradient(int e, A peak, A f, A soft_f) {
    const Source from = source(e);
    const bool both = a.two_rates();
    const A rate = both ? A(kLog2e) : a.rate, label_k = gradient_of_loss(0, e);
    const int self = a.teacher_learns ? teacher_of(e) : -1;
    A asked_mean = 0;
    if (self >= 0) {
      A asked[I], q[I];
      over_blocks([&](int first) {
        what_students_ask(self, e, first, asked, q);
#pragma unroll
        for (int i = 0; i < I; ++i) asked_mean += asked[i];
      });
      asked_mean = sum_across(asked_mean);
      if (a.target == Target::raw) f += asked_mean * reciprocal(taught(self, kNormalizer)), asked_mean = 0;
    }
    over_blocks([&](int first) {
      A g[I], q[I];
      read(from, first, peak, g);
#pragma unroll
      for (int i = 0; i < I; ++i) {
        const A y = g[i];
        g[i] = exp2_of(y, rate) * f;
        if (both) g[i] += exp2_of(y, a.rate_tau) * soft_f;
      }
      for (int r = 0; r < a.T; ++r) {
        if (a.teachers[r] == e) continue;
        const A k = gradient_of_loss(r + 1, e);
        if (argmax()) {
          each(first, [&](int i, int c) { g[i] -= A(c) == taught(r, kArgmax) ? k : A(0); });
        } else {
          read_targets(r, source(a.teachers[r]), first, q);
#pragma unroll
          for (int i = 0; i < I; ++i) g[i] -= k * q[i];
        }
      }
      if (self >= 0) {
        A asked[I];
        what_students_ask(self, e, first, asked, q);
#pragma unroll
        for (int i = 0; i < I; ++i) g[i] -= asked[i] - q[i] * asked_mean;
      }
      each(first, [&](int i, int c) {
        if (a.labels && c == weights.label_class) g[i] -= product(label_k, weights.hot);
        if (a.smoothing != 0) g[i] -= product(label_k * a.smoothing, class_weight(a, c));
      });
      resized(e) ? scatter(e, first, g) : store(e, first, g);
    });
  }

  // Of teacher r = exit e, of a block of channels: target_c (sum over students of k_s log-probability_sc). Its gradient
  // is that less its sum over channels, spread as its softmax is.
  SELFREG_DEVICE void what_students_ask(int r, int e, int first, A (&asked)[I], A (&q)[I]) const {
    A y[I], normalizers = 0;
#pragma unroll
    for (int i = 0; i < I; ++i) asked[i] = 0;
    for (int s = 0; s < a.N; ++s) {
      if (s == e) continue;
      const A k = gradient_of_loss(r + 1, s) / a.tau;
      if (k == 0) continue;
      normalizers += k * log_z_of_student(s);
      read(source(s), first, peak_of_student(s), y);
#pragma unroll
      for (int i = 0; i < I; ++i) asked[i] += k * y[i];
    }
    read_targets(r, source(e), first, q);
#pragma unroll
    for (int i = 0; i < I; ++i) asked[i] = product(q[i], asked[i] - normalizers);
  }

  // ---- the block ----

  SELFREG_DEVICE void tile() {
    pixel = (image * a.cut.height + row) * a.cut.width + column;
    weights = weigh_pixel(a, inside, pixel);
    // A pixel that counts for the labels counts for soft losses, if there are any.
    counts = (a.T ? weights.soft : weights.label) != 0;
#pragma unroll 1
    for (int r = 0; r < a.T; ++r) teach(r);
#pragma unroll 1
    for (int e = 0; e < a.N; ++e) learn(e);
    // What a teacher learns is known when all its students' losses are.
#pragma unroll 1
    for (int r = 0; a.teacher_learns && r < a.T; ++r) {
      const int e = a.teachers[r];
      if (a.grads[e].data) write_gradient(e, peak_of_student(e), taught(r, kLabelFactor), taught(r, kSoftFactor));
    }
  }

  SELFREG_DEVICE void run() {
    const Norms norms = find_norms(a);
    all_class_weights = sum_class_weights(a);
    const int entries = (a.T + 1) * a.N;
#pragma unroll 1
    for (int i = thread; i < entries; i += threads_of_block()) shared[args.at.gains + i] = gain_of(a, i, norms);
    const bool summed = a.reduction != Reduction::none;
#pragma unroll 1
    for (int i = 0; summed && i < entries; ++i) *column_of(args.at.sums, i) = 0;
#pragma unroll 1
    for (int64_t band = blockIdx.x; band < a.size[0] * a.cut.bands * a.cut.strips; band += gridDim.x) {
      begin_band(band);
      const int64_t end = min(row + a.cut.rows, a.cut.height);
#pragma unroll 1
      for (; row < end; ++row) tile();
      row = end - 1;
    }
    if (!summed) return;
    const int first = args.by_lanes ? groups : 1;  // the threads of group 0 are so far apart
    write_partial_sums(a, shared + args.at.sums, threads_of_block(), slots, first, [](int i) { return i; });
  }
};

template <class S>
__global__ void __launch_bounds__(128, 2)
    blockwise_kernel(const __grid_constant__ BlockwiseArgs<typename Accumulator<S>::type> args) {
  SELFREG_DYNAMIC_SHARED(shared);
  Blockwise<S>(args, reinterpret_cast<typename Accumulator<S>::type*>(shared)).run();
}

// ---- the copies of resized exits' gradients --------------------------------------------------------------------

// A thread a position of an exit and a channel: the sum of the copies that have it.
template <class S>
__global__ void __launch_bounds__(256)
    join_kernel(const __grid_constant__ BlockwiseArgs<typename Accumulator<S>::type> args) {
  using A = typename Accumulator<S>::type;
  const Args<A>& a = args.all;
  const int e = blockIdx.y;
  if (!args.copies[e]) return;
  const Cut& cut = a.cut;
  const PixelView& grad = a.grads[e];
  const int64_t h = a.from[e].x, w = a.from[e].y, C = a.C;
  const Axis rows{h, cut.height, a.align_corners}, columns{w, cut.width, a.align_corners};
  const Copies copies(cut, h, w, a.align_corners);
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, step = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 1
  for (int64_t i = first; i < a.size[0] * h * w * C; i += step) {
    const int64_t position = quotient(i, C), c = i - position * C;
    const int64_t line = quotient(position, w), x = position - line * w, image = quotient(line, h),
                  y = line - image * h;
    // The output's rows that lie on row y are those on y - 1 and on y; of larger exits there may be none.
    const int64_t row0 = rows.first(y - 1), row1 = rows.first(y + 1) - 1;
    const int64_t column0 = columns.first(x - 1), column1 = columns.first(x + 1) - 1;
    A sum = 0;
    if (row0 <= row1 && column0 <= column1) {
#pragma unroll 1
      for (int64_t band = quotient(row0, cut.rows); band <= quotient(row1, cut.rows); ++band) {
        const int64_t below = y - rows.low(band * cut.rows);
#pragma unroll 1
        for (int64_t strip = quotient(column0, cut.columns); strip <= quotient(column1, cut.columns); ++strip) {
          const int64_t right = x - columns.low(strip * cut.columns);
          sum += args.copies[e][copies.begin(cut, image, band, strip, C) + (below * copies.columns + right) * C + c];
        }
      }
    }
    S* const to = static_cast<S*>(grad.data) + image * grad.step[0] + y * grad.step[1] + x * grad.step[2];
    to[c * grad.channel] = to_storage<S>(sum);
  }
}

// ---- the plan --------------------------------------------------------------------------------------------------

template <class A>
BlockwiseLayout blockwise_layout(const Args<A>& a, bool resized, int threads) {
  BlockwiseLayout at{};
  auto take = [&at](int numbers) {
    const int begin = at.total;
    at.total += (numbers + 3) / 4 * 4;
    return begin;
  };
  at.teachers = take(a.T * kTaught * threads);
  at.students = take(a.teacher_learns ? a.N * 2 * threads : 0);
  at.sums = take(a.reduction == Reduction::none ? 0 : (a.T + 1) * a.N * threads);
  at.gains = take((a.T + 1) * a.N);
  at.exchange = take(2 * threads);
  at.columns = take(resized ? a.N * threads / a.groups * 2 : 0);
  at.gradient = take(resized ? kBlockChannels * threads : 0);
  return at;
}

template <class S, class A>
Planned plan_blockwise(Planner& planner, const Request<A>& request) {
  BlockwiseArgs<A> args{};
  args.all = request.args;
  Args<A>& a = args.all;
  args.by_lanes = request.layout != Layout::planes;
  a.groups = args.by_lanes ? 1 : a.C < 256 ? 1 : 8;
  while (args.by_lanes && a.groups < 32 && 2 * a.groups <= a.C) a.groups *= 2;

  dim3 block(128);
  int warps = 0;
  for (; warps == 0 && block.x >= 32; block.x /= 2) {  // many exits and teachers leave room for fewer
    args.at = blockwise_layout(a, request.resized, int(block.x));
    warps = planner.resident_warps(blockwise_kernel<S>, block, args.at.total * int64_t(sizeof(A)));
    if (warps > 0) break;
  }
  if (!planner.works(warps > 0 ? cudaSuccess : cudaErrorInvalidConfiguration)) return {};
  const int64_t most = planner.most_blocks(warps, block);
  a.cut = cut_output(a.size, block.x / a.groups, 1, most);
  const int64_t parts = a.size[0] * a.cut.bands * a.cut.strips, blocks = std::min(parts, most);

  int64_t copies[kMaxExits], positions = 0;
  for (int e = 0; e < a.N; ++e) {
    copies[e] = -1;
    if (!a.from[e].x || !a.grads[e].data) continue;
    const Copies each(a.cut, a.from[e].x, a.from[e].y, a.align_corners);
    copies[e] = planner.take(each.begin(a.cut, a.size[0], 0, 0, a.C) * int64_t(sizeof(A)));
    positions = std::max(positions, a.size[0] * a.from[e].x * a.from[e].y * a.C);
  }
  const Partials partials = planner.take_partials(a, blocks);
  auto place = [=](BlockwiseArgs<A>& to, char* workspace) {
    place_sums(to.all, request, partials, workspace);
    for (int e = 0; e < to.all.N; ++e) to.copies[e] = copies[e] < 0 ? nullptr : placed<A>(workspace, copies[e]);
  };
  const int64_t shared = args.at.total * int64_t(sizeof(A));
  planner.add(blockwise_kernel<S>, dim3(unsigned(blocks)), block, shared, args, place);
  if (positions > 0) {
    const int64_t join_blocks = std::clamp<int64_t>((positions + 255) / 256, 1, 8 * planner.processors);
    planner.add(join_kernel<S>, dim3(unsigned(join_blocks), unsigned(a.N)), dim3(256), 0, args, place);
  }
  return {partials, {}};
}

}  // namespace selfreg

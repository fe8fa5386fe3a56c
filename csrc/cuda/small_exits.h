// Exits smaller than the output, also beside some of its size: the exit-loss matrix, phases 1 and 2. small_plan.h says
// which launches come here; args.h how an output is cut. The kernel, from the ground up:
//   strip.h     a block's band of a strip, its tiles, and what lies under them
//   lines.h     interpolation to the tile's pixels, exponentials
//   scatter.h   the way back, to an exit's own resolution
//   teaching.h  targets, and the losses' parts that are sums over pixels
//   beside.h    exits of the output's size
//
// Interpolation is linear, y_c(p) = sum_k a_kp y_kc over an exit's positions k, so that at the exit's own resolution
//   sum_p w_p sum_c target_rc(p) y_c(p) = sum_kc y_kc Q_rkc          with Q_rkc = sum_p a_kp w_p target_rc(p)
//   gradient_kc                         = S_kc - sum_r gain_r Q_rkc  with S_kc = sum_p a_kp f_p exp(y_c(p))
// Q is the same for all exits of a size: a teacher's target goes there once, is read by no student, and is kept
// nowhere. Labels are one more teacher. At the output's resolution remain an exit's exponentials and their sum, and S.
// The last kernel (combine_kernel) adds up the blocks' parts of S and Q, and takes the sums over k and c.
//
// No maximum is looked for: every position of an exit is taken less its own (peak_kernel), so that but for rounding no
// y_kc is above 0, nor what is interpolated from them. Where peaks are of other channels, all of a pixel's exponentials
// may be small: then its own maximum is found after all, slowly.
//
// A tile is up to four rows of a strip of 128 columns. Per exit: lines are drawn (draw_lines), each thread interpolates
// its pixels from them, takes exponentials and their sums; then adds up its rows for the exit's row above and the one
// below; cells of pixels between the same two columns are summed for both of these; sums of cells are added to the
// exit's two rows under the tile, which stay in shared memory until the band has passed them: so each is written once.
//
// Counted, not measured: no GPU has run this. Instructions an output pixel, channel and exit, for one block of five
// exits at an eighth of (8, 21, 512, 512), two of them teachers, float32, sm_90, 168 registers, 12 warps, no spills: in
// all 25 (0.19 ms in all issue slots of an H200), of which drawing lines 3, interpolating 3, exponentials 3, sums over
// rows 4, cells 5, columns 2, losses 3; combine_kernel takes another 0.02 ms. Of exits at half of the output 68, and
// there is room for one block.
#pragma once

#include "beside.h"

namespace selfreg {

template <class Shape>
struct SmallExits : Beside<Shape> {
  using Base = Beside<Shape>;
  using Base::K, Base::P, Base::a, Base::all_class_weights, Base::all_count, Base::argmax, Base::args, Base::begin_band,
      Base::counted, Base::each, Base::end_band, Base::entry, Base::exponentials, Base::full, Base::interpolate,
      Base::kIgnored, Base::kMax, Base::kSumTogether, Base::kept, Base::learn, Base::learn_at_two_rates,
      Base::learn_full, Base::place_tile, Base::read_full, Base::row, Base::scatter_labels, Base::scatter_row,
      Base::shared, Base::size_of, Base::slot, Base::slots, Base::smoothed, Base::squares, Base::teach,
      Base::teach_argmax, Base::thread, Base::threads, Base::two_rates, Base::two_sums, Base::under, Base::weights;
  using typename Base::A;

  __device__ SmallExits(const SmallArgs& args, A* numbers) : Base(args, numbers) {}

  // What the tile's pixels count; and the labels' targets go to the exits' resolutions.
  SELFREG_DEVICE void begin_tile() {
    place_tile();
    const Under& u = under(0);
    const bool inside = slot() < u.width;
    const int64_t pixel = (int64_t(u.image) * a.cut.height + row) * a.cut.width + u.begin + (inside ? slot() : 0);
    A soft_w[P], label_w[P], hot[P], sum[P];  // hot: of the label's class, times label_w
    int label[P];
    all_count = true;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const PixelWeights<A> w = weigh_pixel(a, inside && p < u.rows, pixel + p * a.cut.width);
      label_w[p] = w.label, hot[p] = w.label * w.hot, label[p] = w.label_class;
      soft_w[p] = a.T == 0 && a.labels ? w.label : w.soft;
      sum[p] = w.label == 0 ? kIgnored : smoothed() ? hot[p] + w.label * a.smoothing * all_class_weights : hot[p];
      all_count = all_count && soft_w[p] != 0;
    }
    store_shared(counted(0), sum);
    store_shared(weights(), soft_w);
    if (a.labels)
      for (int s = 0; s < args.sizes; ++s) scatter_labels(s, 0, label, hot, label_w);
  }

  // First teachers teach, then every exit learns; the last teacher first, as all it takes is at hand if tau is 1 or 2.
  SELFREG_DEVICE void tile() {
    begin_tile();
    const bool both = two_rates();
    const bool at_hand = a.T > 0 && !argmax() && !both && (!two_sums() || squares()) && !full(a.teachers[a.T - 1]);
#pragma unroll 1
    for (int step = 0; step < a.T + a.N; ++step) {
      bool teacher = step < a.T;
      const int e = teacher ? a.teachers[step] : a.order[step - a.T];
      const A rate = !teacher ? a.rate : argmax() ? A(1) : a.rate_tau;  // of 1, halves that are equal stay so
      if (!teacher && full(e)) {
#pragma unroll 1
        for (int p = 0; p < P; ++p) learn_full(e, p);
        continue;
      }
      A y[K][P], times[P];
      if (full(e)) {
        A most[P];
        read_full(e, 0, y, most);
        store_shared(kept(step + 1, kMax), most);
        each([&](int i, int p) { y[i][p] *= rate; });
      } else {
        interpolate(e, rate, y);
      }
      if (teacher && argmax()) {
        teach_argmax(step + 1, y);
        continue;
      }
      A Z[P], shift[P];
      const bool at_two_rates = !teacher && both;
      at_two_rates ? learn_at_two_rates(e, y, times) : exponentials(std::false_type(), e, rate, y, Z, shift);
#pragma unroll 1
      while (true) {
        if (teacher) {
          teach(step + 1, y, shift, Z, times);
        } else if (!at_two_rates) {
          learn(e, a.labels ? 0 : 1, a.T + 1, a.rate, Z, shift, times);
        }
        const int first = teacher ? 0 : size_of(e), count = teacher ? args.sizes : a.grads[e].data ? 1 : 0;
        const int rank = teacher ? step + 1 : args.rank[e];
#pragma unroll 1
        for (int s = first; s < first + count; ++s) scatter_row(s, rank, y, times);
        if (!teacher || !at_hand || step < a.T - 1) break;
        teacher = false;
        ++step;
        if (squares()) each([&](int i, int p) { y[i][p] *= y[i][p]; });
      }
    }
  }

  SELFREG_DEVICE void run() {
    const Norms norms = find_norms(a);
    all_class_weights = sum_class_weights(a);
    const int entries = (a.T + 1) * a.N;
#pragma unroll 1
    for (int i = thread(); i < entries; i += threads())
      shared[args.at.gains + entry(i / a.N, i % a.N)] = gain_of(a, i, norms);
    if (thread() % kSumTogether == 0)
#pragma unroll 1
      for (int i = 0; i < entries; ++i) shared[args.at.sums + (i * threads() + thread()) / kSumTogether] = 0;

#pragma unroll 1
    for (int band = blockIdx.x; band < args.bands; band += gridDim.x) {
      begin_band(band);
      do {
        tile();
        row += under(0).rows;
      } while (row < a.cut.height && unsigned(row) % unsigned(a.cut.rows) != 0);
      end_band();
    }

    write_partial_sums(a, shared + args.at.sums, threads() / kSumTogether, slots() / kSumTogether, 1,
                       [&](int i) { return entry(i / a.N, i % a.N); });
  }
};

template <class Shape>
__global__ void __launch_bounds__(Shape::kMaxThreads, Shape::kMinBlocks)
    small_exits_kernel(const __grid_constant__ SmallArgs args) {
  SELFREG_DYNAMIC_SHARED(shared);
  SmallExits<Shape>(args, reinterpret_cast<float*>(shared)).run();
}

}  // namespace selfreg

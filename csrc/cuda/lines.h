// Small exits: their interpolation to the tile's pixels, and exponentials.
#pragma once

#include "strip.h"

namespace selfreg {

template <class Shape>
struct Lines : Strip<Shape> {
  using Base = Strip<Shape>;
  using Base::K, Base::P, Base::a, Base::all_count, Base::args, Base::channel, Base::channels, Base::column_lows,
      Base::column_weights, Base::each, Base::exists, Base::first_of, Base::group, Base::shared, Base::size_of,
      Base::slot, Base::sum_across_groups, Base::thread, Base::under, Base::weights;
  using typename Base::A;
  using typename Base::S;

  using Base::Base;

  // The exit's numbers under a span, of all channels: for each of its columns y, the step to the next column, the step
  // to the row below, and that of the next column less that; all times `rate`. All threads of the block; says whether
  // something is not finite.
  SELFREG_DEVICE bool draw_lines(int e, int span, A rate) const {
    const Under& u = under(size_of(e));
    const PixelView& view = a.exits[e];
    const int h = a.from[e].x, w = a.from[e].y, drawn = u.drawn;
    int c = u.cells.of(thread());
    const int x = thread() - c * u.cells.divisor;
    if (c >= drawn) return false;
    const int64_t right = w > 1 ? view.step[2] : 0, below = h > 1 ? view.step[1] : 0, step = drawn * view.channel;
    const S* from = static_cast<const S*>(view.data) + first_of(e, span) + (x * view.step[2] + c * view.channel);
    const A* const peak = args.peaks + args.peaks_from[e] + (u.peak[span] + x);
    const int next = w > 1, down = h > 1 ? w : 0;
    const A peaks[4] = {__ldg(peak), __ldg(peak + next), __ldg(peak + down), __ldg(peak + down + next)};
    A zero = 0;  // or NaN
#pragma unroll 1
    for (; c < a.C; c += drawn, from += step) {
      const S* const lower_from = from + below;
      const A left = to_number(__ldg(from)) - peaks[0], right_ = to_number(__ldg(from + right)) - peaks[1];
      const A lower = to_number(__ldg(lower_from)) - peaks[2];
      const A lower_right = to_number(__ldg(lower_from + right)) - peaks[3];
      const A across = right_ - left;
      const A line[4] = {left * rate, across * rate, (lower - left) * rate, ((lower_right - lower) - across) * rate};
      zero += (line[1] + line[2] + line[3]) * 0;
      store_shared(line_at(c, x), line);
    }
    return zero != 0;
  }
  // Of channel c.
  SELFREG_DEVICE A* line_at(int c, int x) const {
    const int g = Shape::kSpread ? int(unsigned(c) % unsigned(a.groups)) : 0;
    const int i = Shape::kSpread ? int(unsigned(c) / unsigned(a.groups)) : c;
    return shared + args.at.lines + (g * args.at.line_columns + x) * Shape::kLine + i * 4;
  }

  // y of exit e at the thread's pixels, times `rate`. Where there is no channel: so that its exponential is 0.
  SELFREG_DEVICE void interpolate(int e, A rate, A (&y)[K][P]) const {
    const Under& u = under(size_of(e));
    bool odd = false;
    auto draw = [&](int span) {
      __syncthreads();  // all have read the last lines
      odd |= __syncthreads_or(draw_lines(e, span, rate));
    };
    draw(0);
    read_lines<true>(e, 0, y);
#pragma unroll 1
    for (int span = u.end[0]; span < P; span = u.end[span]) {
      draw(span);
      read_lines<false>(e, span, y);
    }
    if (__builtin_expect(odd, false)) correct(e, rate, y);
    if (__builtin_expect(!all_count, false)) {  // what does not count is taken as zeros
      A weight[P];
      load_shared(weights(), weight);
      each([&](int i, int p) { y[i][p] = weight[p] != 0 ? y[i][p] : A(0); });
    }
  }

  // Of the span's rows, or of all: then the registers hold nothing before.
  template <bool all>
  SELFREG_DEVICE void read_lines(int e, int span, A (&y)[K][P]) const {
    const int s = size_of(e);
    const Under& u = under(s);
    const A weight = column_weights(s)[slot()];
    const A* const line = kept_shared(line_at(group(), column_lows(s)[slot()]));
    A below[P];
    load_shared(u.weight, below);
    bool here[P];
#pragma unroll
    for (int p = 0; p < P; ++p) here[p] = all || (p >= span && p < u.end[span]);
#pragma unroll
    for (int i = 0; i < K; ++i) {
      A x[4];
      if (exists(i)) load_shared(line + i * 4, x);
      const A above = x[0] + weight * x[1], down = x[2] + weight * x[3];
#pragma unroll
      for (int p = 0; p < P; ++p)
        if (here[p]) y[i][p] = exists(i) ? above + below[p] * down : A(-1e30);
    }
  }

  // What is not finite is computed anew: where a weight is 0, the other number does not matter.
  SELFREG_DEVICE void correct(int e, A rate, A (&y)[K][P]) const {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      unsigned odd = 0;
#pragma unroll
      for (int i = 0; i < K; ++i) odd |= unsigned(!(y[i][p] - y[i][p] == 0)) << i;
#pragma unroll 1
      for (int k = 0; odd >> k != 0; ++k) {
        if (!(odd >> k & 1)) continue;
        const A number = interpolated(e, p, channel(k)) * rate;
#pragma unroll
        for (int i = 0; i < K; ++i) y[i][p] = i == k ? number : y[i][p];
      }
    }
  }
  SELFREG_DEVICE A interpolated(int e, int p, int c) const {
    const int s = size_of(e), h = a.from[e].x, w = a.from[e].y;
    const Under& u = under(s);
    const PixelView& view = a.exits[e];
    const int x = u.column + column_lows(s)[slot()];
    auto at = [&](int down, int right) {
      const int64_t i = u.low[p] + (h > 1 ? down : 0), j = x + (w > 1 ? right : 0);
      const S* const data = static_cast<const S*>(view.data);
      const A number =
          to_number(__ldg(data + u.image * view.step[0] + i * view.step[1] + j * view.step[2] + c * view.channel));
      return number - args.peaks[args.peaks_from[e] + (int64_t(u.image) * h + i) * w + j];
    };
    auto mix = [](A v, A n, A weight) { return weight == 0 ? v : weight == 1 ? n : (1 - weight) * v + weight * n; };
    const A weight = column_weights(s)[slot()];
    return mix(mix(at(0, 0), at(0, 1), weight), mix(at(1, 0), at(1, 1), weight), u.weight[p]);
  }

  // Z: the sum of exp2(y), which takes the place of y, unless y is to be kept. Where all are small, y is first taken
  // less rate * shift.
  template <bool keep>
  SELFREG_DEVICE void exponentials(std::bool_constant<keep>, int e, A rate, A (&y)[K][P], A (&Z)[P], A (&shift)[P]) {
#pragma unroll
    for (int p = 0; p < P; ++p) Z[p] = shift[p] = 0;
    each([&](int i, int p) {
      const A x = exp2_fast(y[i][p]);
      Z[p] += x;
      if (!keep) y[i][p] = x;
    });
    sum_across_groups(Z);
    // That of e^-30, times `rate`: of teachers, sums of powers of these numbers are not to underflow, either.
    const A tiny = exp2_fast(A(-30) * (rate < A(kLog2e) ? rate : A(kLog2e)));
    bool small = false;
#pragma unroll
    for (int p = 0; p < P; ++p) small = small || Z[p] < tiny;
    if (Shape::kSpread) small = __syncthreads_or(small);
    if (__builtin_expect(small, false)) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (!(Z[p] < tiny)) {
          if (Shape::kSpread) Z[p] = group() == 0 ? Z[p] : A(0);
          continue;
        }
        A most = kLowest<A>;
#pragma unroll 1
        for (int c = 0; c < a.C; ++c) most = larger(most, interpolated(e, p, c));
        shift[p] = most == kLowest<A> ? A(NAN) : most;  // NaN: all are -infinity
        Z[p] = 0;
#pragma unroll 1
        for (int k = 0; k < channels; ++k) {
          const A number = (interpolated(e, p, channel(k)) - shift[p]) * rate, x = exp2_fast(number);
          Z[p] += x;
#pragma unroll
          for (int i = 0; i < K; ++i) y[i][p] = i == k ? (keep ? number : x) : y[i][p];
        }
      }
      sum_across_groups(Z);
    }
  }
};

}  // namespace selfreg

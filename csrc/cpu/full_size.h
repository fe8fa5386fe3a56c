// An exit at the output's resolution, a block at a time: its exponentials, what is taught it, its gradient.
#pragma once

#include "read_write.h"
#include "targets.h"

namespace {

// Up to so many teachers' targets are read beside the exponentials; of more, one after the other.
constexpr int kBeside = 2;

template <class A>
struct FullSize {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  using Int = typename VecOf<A>::Int;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const Frame<A>& frame;
  const int64_t apart, end;
  explicit FullSize(const Frame<A>& frame) : frame(frame), apart(frame.apart), end(frame.C * frame.apart) {}

  // Pixels that do not count are cleared: a NaN there reaches nothing.
  void find_maxima(const V* counted, Logits<A>& logits) const {
    over_rows([&](auto group, int r) {
      constexpr int G = group.value;
      V most[G], *const z = logits.block;
      auto ignored = counted[r] == A(0);
      for (int g = 0; g < G; ++g) {
        most[g] = fill<V>(A(sizeof(A) == 4 ? -3.402823466e38 : -1.7976931348623157e308));
        ignored |= counted[r + g] == A(0);
      }
      for (int64_t at = r; any(ignored) && at < end; at += apart)
        for (int g = 0; g < G; ++g) z[at + g] = counted[r + g] == A(0) ? V{} : z[at + g];
      for (int c = 0, C = frame.C; c < C; ++c)
        for (int g = 0; g < G; ++g) most[g] = larger(logits(c, r + g), most[g]);
      for (int g = 0; g < G; ++g) logits.most[r + g] = most[g];
    });
  }
  // See exponentials.h for jobs, which have y * scale; that times targets u is summed beside it, to dots.
  template <int TARGETS, class Job>
  void exponentials(const Logits<A>& logits, A scale, const Job job, const V* const* u, V* Z1, V* Z2,
                    V (*dots)[kMostRows], const Ahead ahead) const {
    scale *= logits.unit;
    over_rows([&](auto group, int r) {
      constexpr int G = group.value;
      V first[G] = {}, second[G] = {}, dot[TARGETS + 1][G] = {}, most[G];
      const V* target[TARGETS + 1];
      for (int t = 0; t < TARGETS; ++t) target[t] = u[t];
      for (int g = 0; g < G; ++g) most[g] = logits.most[r + g];
      for (int c = 0, C = frame.C; c < C; ++c)
        for (int g = 0; g < G; ++g) {
          const int64_t at = c * apart + r + g;
          const V x = (logits(c, r + g) - most[g]) * scale;
          ahead.fetch(c, r + g);
          job.put(at, x, first[g], second[g], [](V v) { return exp2_of(v, A(1)); });
          for (int t = 0; t < TARGETS; ++t) dot[t][g] = add_product(target[t][at], x, dot[t][g]);
        }
      for (int g = 0; g < G; ++g) Z1[r + g] = first[g], Z2[r + g] = second[g];
      for (int t = 0; t < TARGETS; ++t)
        for (int g = 0; g < G; ++g) dots[t][r + g] = dot[t][g];
    });
  }

  // sum_c target(c, row) y_c, to each row.
  template <class Target>
  void dot(const Logits<A>& logits, const Target target, V* to) const {
    over_rows([&](auto group, int r) {
      constexpr int G = group.value;
      V sum[G] = {};
      for (int c = 0, C = frame.C; c < C; ++c)
        for (int g = 0; g < G; ++g)
          sum[g] = add_product(target(c, r + g), logits(c, r + g) - logits.most[r + g], sum[g]);
      for (int g = 0; g < G; ++g) to[r + g] = sum[g] * logits.unit;
    });
  }
  void dot(const Logits<A>& logits, const OneHot<A> target, V* to) const {
    for (int r = 0; r < frame.rows; ++r) {
      A at_channel[kLanes];
      for (int k = 0; k < kLanes; ++k) {
        const auto c = target.channel[r][k];
        at_channel[k] = logits.z[(c < 0 ? 0 : c) * logits.channel + r * kLanes + k];
      }
      to[r] = target.channel[r] < 0 ? V{} : (load<V>(at_channel) - logits.most[r]) * logits.unit;
    }
  }

  // from(c, row) * factor[row] - sum_t at_target[t][row] * u[t] [c, row], and, if `channel` is not null, less `hot` at
  // that of each pixel; to rows.
  template <int TARGETS, class From>
  void gradient(const From from, const V* factor, const V* const* u, const V* const* at_target, const VInt* channel,
                const V* hot, const Rows<A>& rows) const {
    over_rows([&](auto group, int r) {
      constexpr int G = group.value;
      V f[G], k[TARGETS + 1][G];
      const V* target[TARGETS + 1];
      for (int t = 0; t < TARGETS; ++t) target[t] = u[t] + r;
      for (int t = 0; t < TARGETS; ++t)
        for (int i = 0; i < G; ++i) k[t][i] = at_target[t][r + i];
      for (int i = 0; i < G; ++i) f[i] = factor[r + i];
      for (int c = 0, C = frame.C; c < C; ++c) {
        V g[G];
        for (int i = 0; i < G; ++i) {
          g[i] = from(c, r + i) * f[i];
          for (int t = 0; t < TARGETS; ++t) g[i] = less_product(g[i], k[t][i], target[t][c * apart + i]);
          if (channel) g[i] = channel[r + i] == Int(c) ? g[i] - hot[r + i] : g[i];
        }
        rows.put(c, r, g);
      }
    });
  }
  // g less factor[row] * target(c, row), where the factor is not 0.
  template <class Target>
  void subtract(const Target target, const V* factor, V* g) const {
    over_rows([&](auto group, int r) {
      for (int c = 0, C = frame.C; c < C; ++c)
        for (int i = r; i < r + group.value; ++i)
          g[c * apart + i] -= factor[i] == A(0) ? V{} : factor[i] * target(c, i);
    });
  }
  // The gradient of a teacher that learns, once `sum` is that over what its students said.
  void add_said(const Teacher<A>& t, const V* sum, bool two, V* g) const {
    for (int r = 0; r < frame.rows; ++r)
      for (int64_t at = r; at < end; at += apart) {
        g[at] -= t.said[at];
        if (two) g[at] += t.u[at] * t.factor[r] * sum[r];
      }
  }

 private:
  // 0 log 0 = 0.
  static SELFREG_ALWAYS V add_product(V share, V y, V sum) { return share == A(0) ? sum : sum + share * y; }
  // Few at a time, so that their sums can stay in registers.
  template <class F>
  SELFREG_ALWAYS void over_rows(F f) const {
    int r = 0;
    for (; r + 4 <= frame.rows; r += 4) f(Number<4>{}, r);
    for (; r < frame.rows; ++r) f(Number<1>{}, r);
  }
};

}  // namespace

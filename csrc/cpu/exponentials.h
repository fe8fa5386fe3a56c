// The exponentials of a block of an exit, and their sums.
#pragma once

#include "exit_lines.h"
#include "full_size.h"

namespace {

// What becomes of x = y / ln 2, or of y / (tau ln 2): of a student (ONE: exp(y), TWO: exp(y / tau)), or of a teacher,
// whose target is made of u = exp(y / tau), of which exp(y) is a POWER (0: none of them).
template <class V, class A, bool ONE, bool TWO>
struct Student {
  static constexpr bool kNeedsFirst = ONE;  // whether its first sum is divided by, or taken the logarithm of
  V *e1, *e2;
  A other;  // what x is multiplied by for the second
  template <class Exp2>
  SELFREG_ALWAYS void put(int64_t at, V x, V& Z1, V& Z2, Exp2 exp2) const {
    if constexpr (ONE) {
      const V e = exp2(x);
      e1[at] = e, Z1 += e;
    }
    if constexpr (TWO) {
      const V e = exp2(ONE ? x * other : x);
      e2[at] = e, Z2 += e;
    }
  }
};
template <class V, class A, int POWER>
struct Teaching {
  static constexpr bool kNeedsFirst = POWER != 1;
  V* u;
  A tau;
  template <class Exp2>
  SELFREG_ALWAYS void put(int64_t at, V x, V& Z, V& Q, Exp2 exp2) const {
    const V e = exp2(x);
    u[at] = e, Q += e;
    if constexpr (POWER > 1) Z += selfreg::power<POWER>(e);
    if constexpr (POWER == 0) Z += exp2(x * tau);
  }
};

// A student that is a teacher: exp(y) is a power of its u.
template <class V, class A, int POWER>
struct Raising {
  static constexpr bool kNeedsFirst = true;
  V* e1;
  const V* u;
  template <class Exp2>
  SELFREG_ALWAYS void put(int64_t at, V, V& Z1, V&, Exp2) const {
    const V e = selfreg::power<POWER>(u[at]);
    e1[at] = e, Z1 += e;
  }
};

// Of a resized exit.
template <class A>
struct Exponentials {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  const Frame<A>& frame;
  V (*columns)[2];  // [C] of a span
  V* careful;       // [C, frame.apart] see Logits

  explicit Exponentials(const Frame<A>& frame) : frame(frame) {}
  void lay_out(Memory& m) {
    columns = m.template take<V[2]>(frame.C);
    careful = m.template take<V>(frame.C * frame.apart);
  }

  // Hands y of block b, times `scale` / ln 2, to `job`, whose sums go to Z1 and Z2; what y is taken less of to `less`.
  template <class Job>
  void take(const ExitLines<A>& lines, int64_t b, const V* counted, A scale, const Job job, V* Z1, V* Z2,
            V* less) const {
    // Where tau is small, exp(y / tau) underflows sooner than what tells.
    if (!lines.odd && frame.L.temperature >= 1) {
      for (int s = 0; s < lines.size->count; ++s) {
        const Span& span = lines.size->spans[s];
        lines.spread(span, b, scale, columns);
        over_groups(span, [&](auto group, int r) { rows<group.value>(job, lines.size->down + r, r, Z1, Z2); });
      }
      VInt small{};
      for (int r = 0; r < frame.rows; ++r) small |= (Job::kNeedsFirst ? Z1 : Z2)[r] < fill<V>(A(1e-12));
      for (int r = 0; r < frame.rows; ++r) less[r] = V{};
      if (!any(small)) return;
    }
    Logits<A> logits{careful};
    logits.is_in_block(frame.apart), logits.unit = A(1);
    interpolate_with_care(lines, b, careful);
    const FullSize<A> full(frame);
    full.find_maxima(counted, logits);
    full.template exponentials<0>(logits, scale, job, nullptr, Z1, Z2, nullptr, Ahead{});
    for (int r = 0; r < frame.rows; ++r) less[r] = logits.most[r] * A(kLn2);
  }
  // To z of block b; see Logits.
  void interpolate(const ExitLines<A>& lines, int64_t b, V* z) const {
    if (lines.odd) return interpolate_with_care(lines, b, z);
    for (int s = 0; s < lines.size->count; ++s) {
      const Span& span = lines.size->spans[s];
      lines.spread(span, b, A(1), columns);
      for (int r = span.begin; r < span.end; ++r)
        for (int c = 0; c < frame.C; ++c) z[c * frame.apart + r] = columns[c][0] + lines.size->down[r] * columns[c][1];
    }
  }

 private:
  template <int G, class Job>
  void rows(const Job job, const A* weights, int r, V* Z1, V* Z2) const {
    const int64_t apart = frame.apart;
    const V(*const from)[2] = columns;
    V first[G] = {}, second[G] = {}, weight[G];
    for (int g = 0; g < G; ++g) weight[g] = fill<V>(weights[g]);
    for (int c = 0, C = frame.C; c < C; ++c) {
      const V above = from[c][0], step = from[c][1];
      for (int g = 0; g < G; ++g)
        job.put(c * apart + r + g, above + weight[g] * step, first[g], second[g], [](V x) { return exp2_below_1(x); });
    }
    for (int g = 0; g < G; ++g) Z1[r + g] = first[g], Z2[r + g] = second[g];
  }
  // Number by number, for some may not be finite.
  void interpolate_with_care(const ExitLines<A>& lines, int64_t b, V* z) const {
    for (int s = 0; s < lines.size->count; ++s) {
      const Span& span = lines.size->spans[s];
      for (int r = span.begin; r < span.end; ++r)
        for (int c = 0; c < frame.C; ++c)
          for (int k = 0; k < kLanes; ++k) z[c * frame.apart + r][k] = lines.pixel(span, c, b * kLanes + k, b, r);
    }
  }
};

}  // namespace

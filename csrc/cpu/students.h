// Phase 2: an exit's exponentials, their sums, and its dot products with what is taught.
#pragma once

#include "read_tile.h"  // and with it vec.h: before pixel_math.h, whose templates call its exp2_of and log2

#include "../pixel_math.h"

namespace {

template <class A>
class Students {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  using Int = typename VecOf<A>::Int;
  static constexpr int kLanes = sizeof(V) / sizeof(A);
  static constexpr int kBlock = TileWork<A>::kBlock;

 public:
  Students(TileWork<A>& work, TileReader<A>& reader) : w(work), reader(reader) {}

  // The logits at the label and at the teachers' argmax, less the maximum.
  void pick() {
    if (w.L.labels)
      for (int64_t i = 0; i < w.width; ++i) w.label_y[i] = w.logits.data[w.label[i] * w.logits.stride + i] - w.peak[i];
    if (w.L.target == Target::argmax)
      for (int r = 0; r < w.T; ++r)
        for (int64_t i = 0; i < w.width; ++i)
          w.teachers[r].y[i] = w.logits.data[w.teachers[r].arg[i] * w.logits.stride + i] - w.peak[i];
  }

  void clear_sums() const {
    w.over_pixels([&](int64_t i) {
      store(w.sum + i, V{});
      store(w.sum2 + i, V{});
      store(w.smooth_dot + i, V{});
      for (int r = 0; r < w.T; ++r) store(w.teachers[r].dot + i, V{});
    });
  }
  // Exponentials of the logits into z (ONE: exp(y)) and z2 (TWO: exp(y / tau)), their sums, and the dot products of
  // the target rows with y. `say`: also tell each learning teacher gradient * y. POWER > 0: this exit is teacher
  // `self`, whose u^POWER are the exponentials.
  template <bool ONE, bool TWO, int POWER = 0>
  void exponentials(bool say, int self = 0) {
    int c = 0;
    for (; c + kBlock <= w.C; c += kBlock) exponential_block<ONE, TWO, POWER, kBlock>(c, say, self);
    for (; c < w.C; ++c) exponential_block<ONE, TWO, POWER, 1>(c, say, self);
  }
  void add_log_normalizers() {
    const A scale = w.soft_two ? w.tau : A(1);
    const A* normalizer = w.soft_two ? w.sum2 : w.sum;
    for (int r = 0; r < w.T; ++r)
      if (w.teachers[r].on)
        w.over_pixels([&](int64_t i) {
          const V log_normalizer = log2(load<V>(normalizer + i)) * (A(kLn2) * scale);
          store(w.teachers[r].kl + i, load<V>(w.teachers[r].kl + i) + load<V>(w.teachers[r].k + i) * log_normalizer);
        });
  }

 private:
  TileWork<A>& w;
  TileReader<A>& reader;

  template <bool ONE, bool TWO, int POWER, int CB>
  void exponential_block(int c0, bool say, int self) {
    const A rate = A(kLog2e), rate2 = A(kLog2e / double(w.tau));
    const int64_t stride = w.ld;
    const Ahead<A> next = reader.ahead;
    const A* const own = POWER ? w.row(w.teachers[self].u, c0) : nullptr;
    const int64_t from_stride = w.logits.stride;
    const A *const from = w.logits.data + c0 * from_stride, *const m = w.peak;
    A *const x = w.row(w.z, c0), *const x2 = TWO ? w.row(w.z2, c0) : nullptr, *const s1 = w.sum, *const s2 = w.sum2;
    const bool smooth_dots = w.L.labels && w.smoothing != 0;
    const int count = w.L.target == Target::argmax ? 0 : w.T;
    const Teacher<A>* const all = w.teachers;
    w.over_pixels([&](int64_t i) {
      TileReader<A>::template look<CB>(next, stride, c0, i);
      V y[CB];
      for (int k = 0; k < CB; ++k) y[k] = load<V>(from + k * from_stride + i) - load<V>(m + i);
      if constexpr (ONE) {
        V s = load<V>(s1 + i);
        for (int k = 0; k < CB; ++k) {
          V u;
          if constexpr (POWER > 0) {
            u = power<POWER>(load<V>(own + k * stride + i));
          } else {
            u = exp2_of(y[k], rate);
          }
          store(x + k * stride + i, u);
          s += u;
        }
        store(s1 + i, s);
      }
      if constexpr (TWO) {
        V s = load<V>(s2 + i);
        for (int k = 0; k < CB; ++k) {
          const V u = exp2_of(y[k], rate2);
          store(x2 + k * stride + i, u);
          s += u;
        }
        store(s2 + i, s);
      }
      for (int r = 0; r < count; ++r) {
        if (!all[r].on) continue;
        A* const dots = all[r].dot + i;
        const A* const u = all[r].u + c0 * stride + i;
        V dot = load<V>(dots);
        for (int k = 0; k < CB; ++k) {
          const V target = load<V>(u + k * stride);
          dot += target == A(0) ? V{} : target * y[k];  // 0 log 0 = 0
        }
        store(dots, dot);
      }
      if (say) tell_teachers<CB>(c0, i, y);
      if (smooth_dots) {
        V dot = load<V>(w.smooth_dot + i);
        for (int k = 0; k < CB; ++k)
          if (w.class_weight(c0 + k) != 0) dot += y[k] * w.class_weight(c0 + k);
        store(w.smooth_dot + i, dot);
      }
    });
  }
  // To each teacher that learns: gradient * y of this student.
  template <int CB>
  void tell_teachers(int c0, int64_t i, const V (&y)[CB]) {
    for (int r = 0; r < w.T; ++r) {
      const Teacher<A>& t = w.teachers[r];
      if (!t.on) continue;
      const V g = load<V>(t.k + i);
      for (int k = 0; k < CB; ++k) {
        A* a = w.row(t.a, c0 + k) + i;
        store(a, load<V>(a) + (g == A(0) ? V{} : g * y[k]));
      }
    }
  }
};

}  // namespace

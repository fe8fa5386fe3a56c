// Phase 1: what a teacher teaches. Its logits stay in scratch, as do its exponentials, its unnormalised target row.
#pragma once

#include "read_tile.h"  // and with it vec.h: before pixel_math.h, whose templates call its exp2_of and log2

#include "../pixel_math.h"

namespace {

template <class A>
class Targets {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  using Int = typename VecOf<A>::Int;
  static constexpr int kLanes = sizeof(V) / sizeof(A);
  static constexpr int kBlock = TileWork<A>::kBlock;

 public:
  Targets(TileWork<A>& work, TileReader<A>& reader) : w(work), reader(reader) {}

  void teach(int r) {
    Teacher<A>& t = w.teachers[r];
    t.logits = reader.read_with_max(w.L.teachers[r], t.z, t.max);
    if (w.L.target == Target::argmax) {
      argmax(t);
    } else {
      reader.expect(r + 1 < w.T ? w.L.teachers[r + 1] : w.next_student(0));
      switch (w.soft_two ? 1 : small_integer(w.tau)) {
        case 1: target_row<1>(t); break;
        case 2: target_row<2>(t); break;
        case 3: target_row<3>(t); break;
        case 4: target_row<4>(t); break;
        default: target_row<0>(t);
      }
      reader.remember();
    }
    if (w.teacher_learns) {
      memset(t.a, 0, w.C * w.ld * sizeof(A));
      memset(t.kl, 0, w.ld * sizeof(A));
    }
  }

  // S = sum_c target_c a_c of a teacher that learns; a becomes target_c a_c.
  void add_up_said(Teacher<A>& t) {
    w.over_pixels([&](int64_t i) { store(t.S + i, V{}); });
    for (int c = 0; c < w.C; ++c)
      w.over_pixels([&](int64_t i) {
        A* a = w.row(t.a, c) + i;
        const V target = load<V>(w.row(t.u, c) + i) * load<V>(t.factor + i);
        const V said = target == A(0) ? V{} : target * (load<V>(a) - load<V>(t.kl + i));
        store(a, said);
        store(t.S + i, load<V>(t.S + i) + said);
      });
  }

 private:
  TileWork<A>& w;
  TileReader<A>& reader;

  // First of the largest, as torch.argmax; NaN counts as the largest.
  void argmax(Teacher<A>& t) {
    w.over_pixels([&](int64_t i) {
      V best = load<V>(t.logits.data + i);
      VInt arg{};
      for (int c = 1; c < w.C; ++c) {
        V v = load<V>(t.logits.data + c * t.logits.stride + i);
        VInt better = (v > best) | ((v != v) & (best == best));
        best = better ? v : best;
        arg = better ? VInt{} + Int(c) : arg;
      }
      store(t.arg + i, arg);
    });
  }

  // POWER: exp(y) = u^POWER, so that Z needs no exponential of its own; 0: it does. 1 also stands for the renormalised
  // target, whose normaliser is sum u.
  template <int POWER>
  void target_row(Teacher<A>& t) {
    A *const q = w.sum, *const z_one = w.sum2;
    w.over_pixels([&](int64_t i) {
      store(q + i, V{});
      store(z_one + i, V{});
    });
    int c = 0;
    for (; c + kBlock <= w.C; c += kBlock) target_block<POWER, kBlock>(t, c);
    for (; c < w.C; ++c) target_block<POWER, 1>(t, c);
    w.over_pixels([&](int64_t i) {
      const V Q = load<V>(q + i), Z = load<V>(z_one + i);
      const V factor = POWER == 1 ? A(1) / Q : raw_target_factor(Z, w.tau);
      store(t.factor + i, factor);
      store(t.P + i, POWER == 1 ? fill<V>(A(1)) : Q * factor);
    });
  }
  template <int POWER, int CB>
  void target_block(Teacher<A>& t, int c0) {
    const A rate = A(kLog2e / double(w.tau)), rate_one = A(kLog2e);
    const int64_t stride = w.ld;
    const Ahead<A> next = reader.ahead;
    const int64_t from_stride = t.logits.stride;
    const A *const from = t.logits.data + c0 * from_stride, *const m = t.max;
    A *const to = w.row(t.u, c0), *const q = w.sum, *const z_one = w.sum2;
    w.over_pixels([&](int64_t i) {
      TileReader<A>::template look<CB>(next, stride, c0, i);
      V Q = load<V>(q + i), Z = load<V>(z_one + i);
      for (int k = 0; k < CB; ++k) {
        const V y = load<V>(from + k * from_stride + i) - load<V>(m + i), u = exp2_of(y, rate);
        store(to + k * stride + i, u);
        Q += u;
        if constexpr (POWER > 1) Z += power<POWER>(u);
        if constexpr (POWER == 0) Z += exp2_of(y, rate_one);
      }
      store(q + i, Q);
      store(z_one + i, Z);
    });
  }
};

}  // namespace

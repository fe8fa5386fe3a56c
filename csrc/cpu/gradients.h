// The gradient of the student at hand in a tile.
#pragma once

#include "tile.h"
#include "write_tile.h"

namespace {

template <class A>
class Gradients {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  using Int = typename VecOf<A>::Int;
  static constexpr int kLanes = sizeof(V) / sizeof(A);
  static constexpr int kBlock = TileWork<A>::kBlock;

 public:
  Gradients(TileWork<A>& work, TileWriter<A>& writer) : w(work), writer(writer) {}

  // gradient_c = exp(y_c) f1 + exp(y_c / tau) f2 - sum_r scaled_r u_rc - smooth w_c - hot[c = label] - ..., a few rows
  // after the other in place of the exponentials. `self` is this exit as a teacher that learns.
  template <bool ONE, bool TWO>
  void write(int e, bool soft, const Teacher<A>* self) {
    const bool arg = w.L.target == Target::argmax;
    w.over_pixels([&](int64_t i) {
      V q1{}, q2{};  // sums of the targets of either softmax
      if (w.L.labels) {
        const V k = load<V>(w.label_k + i), hot_i = load<V>(w.hot + i);  // this may be infinite, and so may class_w_sum
        q1 += k == A(0) ? V{} : k * (hot_i + w.smoothing * w.class_w_sum);
        store(w.label_k + i, k == A(0) ? V{} : k * hot_i);
        store(w.smooth + i, k * w.smoothing);
      }
      for (int r = 0; r < w.T; ++r) {
        const Teacher<A>& t = w.teachers[r];
        if (!t.on) continue;
        const V k = load<V>(t.k + i) * (arg ? A(1) : w.tau);
        if (!arg) store(t.scaled + i, k * load<V>(t.factor + i));
        (w.soft_two ? q2 : q1) += arg ? k : k * load<V>(t.P + i);
      }
      if (self && !w.soft_two) q1 += load<V>(self->S + i);
      if constexpr (ONE) store(w.f1 + i, q1 / load<V>(w.sum + i));
      if constexpr (TWO) store(w.f2 + i, q2 / load<V>(w.sum2 + i));
    });
    const View& v = w.L.grads[e];
    const bool resized = w.is_resized(e), row_by_row = !resized && runs_of(v, w.L).step == 1;
    const Stream<A> past_caches = row_by_row ? writer.stream_of(e) : Stream<A>{};
    w.joined[e] = past_caches.goes_on;
    int gathered = 0;
    for (int c = 0; c < w.C; c += kBlock) {
      const int c1 = c + kBlock < w.C ? c + kBlock : w.C;
      if (c1 - c == kBlock) {
        gradient_block<ONE, TWO, kBlock>(c, soft, self, past_caches);
      } else {
        for (int k = c; k < c1; ++k) gradient_block<ONE, TWO, 1>(k, soft, self, past_caches);
      }
      if (row_by_row && !past_caches.to) writer.write(v, c, c1);
      if (resized && (c1 - gathered >= kLanes || c1 == w.C)) {
        w.resizers[e].gather(gathered, c1, w.row(w.z, gathered), w.ld);
        gathered = c1;
      }
    }
    if (!resized && !row_by_row) writer.write(v, 0, w.C);
  }
  void write_zeros(int e) {
    if (w.is_resized(e)) return;  // nothing is added to its sums
    memset(w.z, 0, w.C * w.ld * sizeof(A));
    writer.write(w.L.grads[e], 0, w.C);
  }

 private:
  TileWork<A>& w;
  TileWriter<A>& writer;

  template <bool ONE, bool TWO, int CB>
  void gradient_block(int c0, bool soft, const Teacher<A>* self, const Stream<A>& past_caches) {
    const bool labelled = w.L.labels, smooth_labels = labelled && w.smoothing != 0, arg = w.L.target == Target::argmax;
    const int count = soft ? w.T : 0;
    const int64_t offset = c0 * w.ld, stride = w.ld;
    A *const x = w.z + offset, *const x2 = TWO ? w.z2 + offset : nullptr;
    const A *const one = w.f1, *const two = w.f2, *const at_label = w.label_k;
    const Int* const y = w.label;
    const Teacher<A>* const all = w.teachers;
    StreamedRows<A, CB> lines(past_caches, c0, w.n);
    w.over_pixels([&](int64_t i) {
      V g[CB] = {};
      for (int k = 0; k < CB; ++k) {
        if constexpr (ONE) g[k] = load<V>(x + k * stride + i) * load<V>(one + i);
        if constexpr (TWO) g[k] += load<V>(x2 + k * stride + i) * load<V>(two + i);
      }
      for (int r = 0; r < count; ++r) {
        const Teacher<A>& t = all[r];
        if (!t.on) continue;
        if (arg) {
          const VInt top = load<VInt>(t.arg + i);
          for (int k = 0; k < CB; ++k) g[k] = top == Int(c0 + k) ? g[k] - load<V>(t.k + i) : g[k];
        } else {
          const V scaled = load<V>(t.scaled + i);
          const A* const u = t.u + offset + i;
          for (int k = 0; k < CB; ++k) g[k] -= scaled * load<V>(u + k * stride);
        }
      }
      if (labelled) {
        const VInt class_of = load<VInt>(y + i);
        const V hot_k = load<V>(at_label + i);
        for (int k = 0; k < CB; ++k) g[k] = class_of == Int(c0 + k) ? g[k] - hot_k : g[k];
      }
      if (smooth_labels) {
        const V smooth_k = load<V>(w.smooth + i);
        for (int k = 0; k < CB; ++k) g[k] -= smooth_k == A(0) ? V{} : smooth_k * w.class_weight(c0 + k);
      }
      if (self) {
        for (int k = 0; k < CB; ++k) g[k] -= load<V>(self->a + offset + k * stride + i);
        if (w.soft_two) {
          const V S = load<V>(self->factor + i) * load<V>(self->S + i);
          for (int k = 0; k < CB; ++k) g[k] += load<V>(self->u + offset + k * stride + i) * S;
        }
      }
      lines.put(i, g, x, stride);
    });
    lines.finish(x, stride);
  }
};

}  // namespace

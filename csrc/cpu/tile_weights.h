// What the pixels of a tile weigh.
#pragma once

#include "tile.h"

namespace {

template <class A>
class TileWeights {
  using Int = typename VecOf<A>::Int;

 public:
  explicit TileWeights(TileWork<A>& work) : w(work) {}
  // The pixels' weights in label losses where all classes weigh the same.
  void begin_launch() const {
    for (int64_t i = 0; i < w.ld; ++i) w.hot[i] = A(1 - w.L.label_smoothing);
  }

  // The weight of every pixel in label and soft losses, and its label. Past the last pixel: weight 0, label 0.
  void read() const {
    const A* const weight = static_cast<const A*>(w.L.pixel_weight);
    w.over_spans([&](int64_t pixel, int64_t first) {
      for (int64_t i = 0; i < w.span; ++i) w.soft_w[first + i] = weight ? weight[pixel + i] : A(1);
    });
    for (int64_t i = w.n; i < w.width; ++i) w.soft_w[i] = w.label_w[i] = 0, w.label[i] = 0;
    if (w.L.labels) {
      w.over_spans([&](int64_t pixel, int64_t first) {
        switch (w.L.label_type) {
          case LabelType::uint8: read_labels(static_cast<const uint8_t*>(w.L.labels) + pixel, first); break;
          case LabelType::int32: read_labels(static_cast<const int32_t*>(w.L.labels) + pixel, first); break;
          case LabelType::int64: read_labels(static_cast<const int64_t*>(w.L.labels) + pixel, first); break;
        }
      });
      if (w.L.class_weight)
        for (int64_t i = 0; i < w.width; ++i) w.hot[i] = w.class_weight(int(w.label[i])) * A(1 - w.L.label_smoothing);
      if (w.L.mask_soft) memcpy(w.soft_w, w.label_w, w.n * sizeof(A));
    }
    const A* const counted = w.counted_weight();
    int zeros = w.n < w.width;
#pragma omp simd reduction(| : zeros)
    for (int64_t i = 0; i < w.n; ++i) zeros |= counted[i] == 0;
    w.uncounted = zeros;
  }

 private:
  TileWork<A>& w;

  template <class Label>
  void read_labels(const Label* labels, int64_t first) const {
    const Label ignore = Label(w.L.ignore_index);
    const bool any_ignored = int64_t(ignore) == w.L.ignore_index;  // else no Label equals it
    const A* const weight = w.soft_w + first;
    A* const to = w.label_w + first;
    Int* const y = w.label + first;
#pragma omp simd
    for (int64_t i = 0; i < w.span; ++i) {
      const bool valid = !(any_ignored & (labels[i] == ignore));
      y[i] = valid ? Int(labels[i]) : 0;
      to[i] = valid ? weight[i] : A(0);
    }
  }
};

}  // namespace

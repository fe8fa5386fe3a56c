// Labels of a tile's pixels, and what they count in the losses.
#pragma once

#include "frame.h"

namespace {

// Maps [rows, columns of the output]; 0 beyond the last column.
template <class A>
struct PixelWeights {
  using Int = typename VecOf<A>::Int;

  Int* label;  // negative where the pixel does not count
  A *labelled, *soft;  // a pixel's weight in label and in soft losses
  A* mass;             // in label losses, times the weight of its class: with smoothing, of all classes

  void lay_out(Memory& m, const Frame<A>& at) {
    const int64_t tile = at.at(int(at.apart), 0);
    label = m.template take<Int>(tile);
    labelled = m.template take<A>(tile);
    soft = m.template take<A>(tile);
    mass = m.template take<A>(tile);
  }
  // A pixel that counts for the labels counts for soft losses, if there are any.
  const A* counted(const ExitLoss& L) const { return L.T ? soft : labelled; }

  void read(const Frame<A>& at) {
    const ExitLoss& L = at.L;
    const A* const weight = static_cast<const A*>(L.pixel_weight);
    for (int r = 0; r < at.rows; ++r) {
      const int64_t pixel = (at.image * L.H + at.top + r) * L.W, to = at.at(r, 0);
      for (int64_t x = 0; x < L.W; ++x) soft[to + x] = weight ? weight[pixel + x] : A(1);
      for (int64_t x = to + L.W; x < at.at(r + 1, 0); ++x) soft[x] = labelled[x] = mass[x] = 0, label[x] = -1;
      if (!L.labels) continue;
      switch (L.label_type) {
        case LabelType::uint8: read_labels(at, static_cast<const uint8_t*>(L.labels) + pixel, to); break;
        case LabelType::int32: read_labels(at, static_cast<const int32_t*>(L.labels) + pixel, to); break;
        case LabelType::int64: read_labels(at, static_cast<const int64_t*>(L.labels) + pixel, to); break;
      }
    }
  }
  template <class Label>
  void read_labels(const Frame<A>& at, const Label* labels, int64_t to) {
    const ExitLoss& L = at.L;
    const Label ignore = Label(L.ignore_index);
    const bool any_ignored = int64_t(ignore) == L.ignore_index;  // else no Label equals it
    const A rest = A(1 - L.label_smoothing), all_classes = at.smoothing * at.class_w_sum;
    A *const w = labelled + to, *const weight = soft + to, *const all = mass + to;
    Int* const y_of = label + to;
    const int64_t width = L.W;
#pragma omp simd
    for (int64_t x = 0; x < width; ++x) {
      const bool valid = !(any_ignored & (labels[x] == ignore));
      w[x] = valid ? weight[x] : A(0);
      y_of[x] = w[x] != 0 ? Int(labels[x]) : -1;
      all[x] = w[x] * rest;
    }
    for (int64_t x = 0; L.class_weight && x < width; ++x)
      all[x] = w[x] == 0 ? A(0) : w[x] * rest * at.class_weight(int(y_of[x]));
    for (int64_t x = 0; at.smoothing != 0 && x < width; ++x) all[x] += w[x] == 0 ? A(0) : w[x] * all_classes;
    if (L.mask_soft) memcpy(weight, w, width * sizeof(A));
  }
};

}  // namespace

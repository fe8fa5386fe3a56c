// Labels of a block's pixels, and what they count in the losses.
#pragma once

#include "frame.h"

namespace {

// All 0 beyond the last pixel of a row.
template <class A>
struct PixelWeights {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  using Int = typename VecOf<A>::Int;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  V labelled[kMostRows], soft[kMostRows];  // a pixel's weight in label and in soft losses
  V mass[kMostRows];      // in label losses, times the weight of its class: with smoothing, of all classes
  VInt label[kMostRows];  // negative where the pixel does not count

  // A pixel that counts for the labels counts for soft losses, if there are any.
  const V* counted(const ExitLoss& L) const { return L.T ? soft : labelled; }

  void read(const Frame<A>& frame, int64_t b) {
    const ExitLoss& L = frame.L;
    for (int r = 0; r < frame.rows; ++r) {
      const int64_t pixel = frame.pixel(r, b);
      const int columns = frame.columns(r, b);
      A weight[kLanes] = {};
      for (int k = 0; k < columns; ++k)
        weight[k] = L.pixel_weight ? static_cast<const A*>(L.pixel_weight)[pixel + k] : A(1);
      soft[r] = load<V>(weight);
      if (!L.labels) continue;
      switch (L.label_type) {
        case LabelType::uint8: read_labels(frame, r, static_cast<const uint8_t*>(L.labels) + pixel, columns); break;
        case LabelType::int32: read_labels(frame, r, static_cast<const int32_t*>(L.labels) + pixel, columns); break;
        case LabelType::int64: read_labels(frame, r, static_cast<const int64_t*>(L.labels) + pixel, columns); break;
      }
    }
  }

 private:
  template <class Label>
  void read_labels(const Frame<A>& frame, int r, const Label* labels, int columns) {
    const ExitLoss& L = frame.L;
    const Label ignore = Label(L.ignore_index);
    const bool any_ignored = int64_t(ignore) == L.ignore_index;  // else no Label equals it
    Int number[kLanes];
    for (int k = 0; k < kLanes; ++k) number[k] = -1;
#pragma omp simd
    for (int k = 0; k < columns; ++k) number[k] = any_ignored & (labels[k] == ignore) ? -1 : Int(labels[k]);
    const VInt valid = load<VInt>(number);
    labelled[r] = valid < 0 ? V{} : soft[r];
    label[r] = labelled[r] == A(0) ? VInt{} - 1 : valid;
    const V rest = labelled[r] * A(1 - L.label_smoothing);
    V of_class = rest;
    for (int k = 0; L.class_weight && k < kLanes; ++k)
      of_class[k] = label[r][k] < 0 ? A(0) : rest[k] * frame.class_weight(int(label[r][k]));
    const V all_classes = labelled[r] == A(0) ? V{} : labelled[r] * (frame.smoothing * frame.class_w_sum);
    mass[r] = frame.smoothing != 0 ? of_class + all_classes : of_class;
    if (L.mask_soft) soft[r] = labelled[r];
  }
};

}  // namespace

// Phase 0: the pixels that count, for what the means divide by.
#pragma once

#include "cpu.h"

namespace {

using namespace selfreg;

template <class A, class Label>
PixelCounts count_as(const ExitLoss& L, const Label* labels, int64_t begin, int64_t end) {
  const A* weight = static_cast<const A*>(L.pixel_weight);
  const A* class_weight = static_cast<const A*>(L.class_weight);
  PixelCounts counts{0, 0, -1};
  if (labels && !weight && !class_weight) {  // the usual case, without a branch
    const Label ignore = Label(L.ignore_index), classes = Label(L.C);
    const bool any_ignored = int64_t(ignore) == L.ignore_index, any_large = int64_t(classes) == L.C;
    int64_t valid = 0, bad = 0;
#pragma omp simd reduction(+ : valid, bad)
    for (int64_t i = begin; i < end; ++i) {
      const bool counted = !(any_ignored & (labels[i] == ignore));
      valid += counted;
      bad += counted & ((labels[i] < 0) | (any_large & (labels[i] >= classes)));
    }
    counts.label = double(valid);
    counts.soft = double(L.mask_soft ? valid : end - begin);
    if (!bad) return counts;
    counts = {0, 0, -1};
  }
  for (int64_t i = begin; i < end; ++i) {
    const double w = weight ? double(weight[i]) : 1.0;
    const bool valid = labels && int64_t(labels[i]) != L.ignore_index;
    if (valid) {
      const int64_t y = int64_t(labels[i]);
      if (y < 0 || y >= L.C) {
        if (counts.bad_label < 0) counts.bad_label = i;
        continue;
      }
      if (w != 0) counts.label += class_weight ? w * double(class_weight[y]) : w;
    }
    if (valid || !L.mask_soft) counts.soft += w;
  }
  return counts;
}

template <class A>
PixelCounts count(const ExitLoss& L, int64_t begin, int64_t end) {
  switch (L.label_type) {
    case LabelType::uint8: return count_as<A>(L, static_cast<const uint8_t*>(L.labels), begin, end);
    case LabelType::int32: return count_as<A>(L, static_cast<const int32_t*>(L.labels), begin, end);
    default: return count_as<A>(L, static_cast<const int64_t*>(L.labels), begin, end);
  }
}

}  // namespace

// The operator `exit_loss`: argument contract and outputs, the same on every backend. LibTorch's stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "exit_loss.h"

// exits (B, C, h, w) of one B, C and dtype, any strides; those whose (h, w) is not `size` = (H, W) are resized to it.
// labels, pixel_weight (B, H, W), class_weight (C), grad_losses: contiguous; the last three and the losses are float32,
// or float64 for float64 exits.
// -> total (), losses (T + 1, N) or (T + 1, N, B, H, W), gradients of the wanted exits, laid out as empty_like(exit).
#define SELFREG_EXIT_LOSS_SCHEMA                                                                       \
  "(Tensor[] exits, Tensor? labels, Tensor? class_weight, Tensor? pixel_weight, Tensor? grad_losses, " \
  "float[] weights, int[] wanted, int[] teachers, float temperature, int target, int ignore_index, "   \
  "float label_smoothing, bool mask_soft, bool detach_teacher, int reduction, SymInt[] size, "         \
  "bool align_corners) -> (Tensor, Tensor, Tensor[])"
#define SELFREG_SCALE_SCHEMA "(Tensor(a!)[] grads, Tensor factor) -> ()"

namespace selfreg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// Messages for users are Python's business (selfreg_fast/functional.py); these guard direct calls of the operator.
template <class... Text>
void check(bool ok, const Text&... text) {
  if (ok) return;
  std::ostringstream message;
  message << "selfreg_fast::exit_loss: ";
  (message << ... << text);
  throw std::invalid_argument(message.str());
}

inline DType dtype_of(const Tensor& exit) {
  switch (exit.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: check(false, "exits: expected float32, float64, float16 or bfloat16"); return {};
  }
}

inline LabelType label_type_of(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte: return LabelType::uint8;
    case ScalarType::Int: return LabelType::int32;
    case ScalarType::Long: return LabelType::int64;
    default: check(false, "labels: expected uint8, int32 or int64"); return {};
  }
}

inline View view_of(const Tensor& t, void* data) {
  return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(3), t.size(2), t.size(3)};
}

inline bool has_sizes(const Tensor& t, const Ints& sizes) {
  if (t.dim() != int64_t(sizes.size())) return false;
  for (size_t d = 0; d < sizes.size(); ++d)
    if (t.size(int64_t(d)) != sizes[d]) return false;
  return true;
}

inline Tensor empty(const Tensor& like, const Ints& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

// run(launch, exits[0]) is the backend; `resizes` whether it takes exits of other sizes than the output's;
// allocated(data, bytes) hears of the memory of every gradient.
template <class Run, class Allocated>
std::tuple<Tensor, Tensor, std::vector<Tensor>> exit_loss(
    Run run, bool resizes, Allocated allocated, const std::vector<Tensor>& exits, const std::optional<Tensor>& labels,
    const std::optional<Tensor>& class_weight, const std::optional<Tensor>& pixel_weight,
    const std::optional<Tensor>& grad_losses, const std::vector<double>& weights, const Ints& wanted,
    const Ints& teachers, double temperature, int64_t target, int64_t ignore_index, double label_smoothing,
    bool mask_soft, bool detach_teacher, int64_t reduction, const Ints& size, bool align_corners) {
  check(!exits.empty(), "exits: expected at least one");
  const Tensor& first = exits[0];
  check(first.dim() == 4 && first.size(1) > 0, "exits: expected (B, C, H, W) with C > 0");
  check(temperature > 0, "temperature: expected a number > 0");
  check(target >= 0 && target <= 2, "target: expected 0, 1 or 2");
  check(reduction >= 0 && reduction <= 2, "reduction: expected 0, 1 or 2");
  check(size.size() == 2 && size[0] >= 0 && size[1] >= 0, "size: expected (H, W)");

  ExitLoss launch{};
  launch.B = first.size(0), launch.C = first.size(1), launch.H = size[0], launch.W = size[1];
  launch.N = int32_t(exits.size()), launch.T = int32_t(teachers.size());
  launch.dtype = dtype_of(first);
  const ScalarType scalar = launch.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  const Ints map{launch.B, launch.H, launch.W};
  Ints matrix{launch.T + 1, launch.N};
  if (reduction == int64_t(Reduction::none)) matrix.insert(matrix.end(), map.begin(), map.end());

  std::vector<View> views, grad_views(exits.size(), View{});
  for (const Tensor& z : exits) {
    check(z.dim() == 4 && z.size(0) == launch.B && z.size(1) == launch.C, "exits: expected one B and C");
    check(z.scalar_type() == first.scalar_type(), "exits: expected one dtype");
    const bool same = z.size(2) == launch.H && z.size(3) == launch.W;
    check(same || (resizes && z.size(2) > 0 && z.size(3) > 0 && launch.H > 0 && launch.W > 0),
          "exits: cannot be resized to `size`");
    views.push_back(view_of(z, const_cast<void*>(z.const_data_ptr())));
  }
  launch.exits = views.data();
  launch.grads = grad_views.data();

  std::vector<int32_t> teacher_indices;
  for (int64_t t : teachers) {
    check(t >= 0 && t < launch.N, "teachers: expected indices of exits, got ", t);
    for (int32_t other : teacher_indices) check(other != t, "teachers: expected distinct exits, got ", t, " twice");
    teacher_indices.push_back(int32_t(t));
  }
  launch.teachers = teacher_indices.data();

  auto data_of = [](const std::optional<Tensor>& t, const char* name, const Ints& sizes, auto dtype) -> const void* {
    if (!t) return nullptr;
    check(has_sizes(*t, sizes) && t->is_contiguous(), name, ": expected a contiguous tensor of the launch's size");
    check(dtype(t->scalar_type()), name, ": unexpected dtype");
    return t->const_data_ptr();
  };
  auto is_scalar = [scalar](ScalarType dtype) { return dtype == scalar; };
  launch.labels = data_of(labels, "labels", map, [](ScalarType) { return true; });
  if (labels) launch.label_type = label_type_of(*labels);
  launch.class_weight = data_of(class_weight, "class_weight", {launch.C}, is_scalar);
  launch.pixel_weight = data_of(pixel_weight, "pixel_weight", map, is_scalar);
  launch.grad_losses = data_of(grad_losses, "grad_losses", matrix, is_scalar);
  check(weights.empty() || int64_t(weights.size()) == int64_t(launch.T + 1) * launch.N,
        "weights: expected (T + 1) N numbers or none");
  check(weights.empty() || reduction != int64_t(Reduction::none), "weights: there is no total with reduction none");
  check(wanted.empty() || grad_losses || !weights.empty(), "wanted: gradients need grad_losses or weights");
  launch.weights = weights.empty() || wanted.empty() ? nullptr : weights.data();

  launch.temperature = temperature;
  launch.target = Target(target);
  // At temperature 1 both soft targets are the same; the raw power needs one softmax a student, not two.
  if (launch.target == Target::renormalized && temperature == 1) launch.target = Target::raw;
  launch.reduction = Reduction(reduction);
  launch.ignore_index = ignore_index;
  launch.label_smoothing = label_smoothing;
  launch.mask_soft = mask_soft;
  launch.align_corners = align_corners;
  launch.detach_teacher = detach_teacher || launch.target == Target::argmax;

  Tensor losses = empty(first, matrix, scalar);
  Tensor total = empty(first, {}, scalar);
  launch.total_weights = weights.empty() ? nullptr : weights.data();
  launch.losses = losses.mutable_data_ptr();
  launch.total = total.mutable_data_ptr();
  std::vector<Tensor> grads;
  for (int64_t e : wanted) {
    check(e >= 0 && e < launch.N && !launch.grads[e].data, "wanted: expected distinct indices of exits, got ", e);
    grads.push_back(torch::stable::empty_like(exits[e]));
    Tensor& grad = grads.back();
    allocated(grad.mutable_data_ptr(), grad.numel() * grad.element_size());
    grad_views[e] = view_of(grad, grad.mutable_data_ptr());
  }

  run(launch, first);
  return {total, losses, grads};
}

}  // namespace selfreg

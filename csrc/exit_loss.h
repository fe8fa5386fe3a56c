// What one launch computes: the exit-loss matrix and, for the exits that want them, the gradients. Plain structs,
// shared by every backend; the operator in operator.h fills them and owns all memory.
#pragma once

#include <cstdint>

namespace selfreg {

enum class DType : int32_t { float32, float64, float16, bfloat16 };
enum class LabelType : int32_t { uint8, int32, int64 };
enum class Target : int32_t { raw, renormalized, argmax };  // sigma(t)^(1/tau), softmax(t / tau), one-hot of argmax t
enum class Reduction : int32_t { mean, sum, none };

// A tensor (B, C, H, W) in any layout; strides in elements.
struct View {
  void* data;
  int64_t stride_b, stride_c, stride_h, stride_w, H, W;
};

struct ExitLoss {
  int64_t B, C, H, W;  // H, W: of the output
  int32_t N, T;        // exits, teachers
  DType dtype;         // of exits and gradients; everything else is in A: float, or double for float64

  const View* exits;        // [N]; one of another size than (H, W) is resized bilinearly, as by F.interpolate
  const View* grads;        // [N], of the exits' sizes; data is null where no gradient is wanted
  const int32_t* teachers;  // [T], distinct indices of exits

  LabelType label_type;
  const void* labels;        // [B, H, W], or null
  const void* class_weight;  // [C] of A, or null
  const void* pixel_weight;  // [B, H, W] of A, or null

  // The gradient of the losses: [T + 1, N], or [T + 1, N, B, H, W] with Reduction::none, of A; where it is null,
  // `weights` [T + 1, N] takes its place; where that is null too, no gradient is computed.
  const void* grad_losses;
  const double* weights;

  Target target;
  Reduction reduction;
  double temperature, label_smoothing;
  int64_t ignore_index;
  bool mask_soft, detach_teacher, align_corners;

  const double* total_weights;  // [T + 1, N], or null: the total is 0
  void* losses;                 // [T + 1, N] of A, or [T + 1, N, B, H, W] with Reduction::none
  void* total;                  // [] of A: sum of total_weights * losses, without those of weight 0
};

// Phase 0 finds what the means divide by. A label loss: the sum of pixel_weight * class_weight[label] over pixels that
// count; a soft loss: the sum of pixel_weight.
struct PixelCounts {
  double label, soft;
  int64_t bad_label;  // flat index of the first label that is neither a class nor ignored, or -1
};

}  // namespace selfreg

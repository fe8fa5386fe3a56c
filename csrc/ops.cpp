// The operators' schemas, and `exit_loss` on the CPU.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/launch.h"
#include "operator.h"

namespace selfreg {
namespace {

// Fresh memory is mapped page by page as the kernel first writes it: with 4 KB pages that can take longer than the
// kernel itself. Large pages where the system offers them.
void prefer_large_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (end > begin && end - begin >= (uintptr_t(4) << 20))
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> exit_loss_cpu(
    const std::vector<Tensor>& exits, const std::optional<Tensor>& labels, const std::optional<Tensor>& class_weight,
    const std::optional<Tensor>& pixel_weight, const std::optional<Tensor>& grad_losses,
    const std::vector<double>& weights, const Ints& wanted, const Ints& teachers, double temperature, int64_t target,
    int64_t ignore_index, double label_smoothing, bool mask_soft, bool detach_teacher, int64_t reduction,
    const Ints& size, bool align_corners) {
  auto run = [](const ExitLoss& launch, const Tensor&) { cpu_launch(launch); };
  return exit_loss(run, true, prefer_large_pages, exits, labels, class_weight, pixel_weight, grad_losses, weights,
                   wanted, teachers, temperature, target, ignore_index, label_smoothing, mask_soft, detach_teacher,
                   reduction, size, align_corners);
}

std::string isa() { return cpu_isa(); }

}  // namespace
}  // namespace selfreg

STABLE_TORCH_LIBRARY(selfreg_fast, m) {
  m.def("exit_loss" SELFREG_EXIT_LOSS_SCHEMA);
  // grads *= factor, a number in their losses' dtype, which a GPU reads by itself.
  m.def("scale_" SELFREG_SCALE_SCHEMA);
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(selfreg_fast, CPU, m) { m.impl("exit_loss", TORCH_BOX(&selfreg::exit_loss_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(selfreg_fast, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&selfreg::isa)); }

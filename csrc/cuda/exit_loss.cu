// Phases 1 and 2, compiled once for each storage type (SELFREG_STORAGE): which kernel a launch takes.
#include "blockwise.h"
#include "shapes.h"
#include "small_plan.h"

namespace selfreg {

#if SELFREG_STORAGE == 0
using S = float;
#elif SELFREG_STORAGE == 1
using S = double;
#elif SELFREG_STORAGE == 2
using S = __half;
#else
using S = __nv_bfloat16;
#endif

template <>
Planned plan_exit_loss<S>(Planner& planner, const Request<Accumulator<S>::type>& request) {
  Planned planned;
#if SELFREG_STORAGE != 1
  const bool fits =
      request.resized ? plan_small_exits<S>(planner, request, planned) : plan_full_size<S>(planner, request, planned);
  if (fits || planner.error != cudaSuccess) return planned;
#endif
  return plan_blockwise<S>(planner, request);
}

}  // namespace selfreg

// Prints what the CUDA backend launches for an exit-loss matrix with gradients: a line a kernel, with its address in
// this program, grid, block, bytes of shared memory, and parameters. Nothing is computed, and memory is made up: see
// the places below. Linked with the backend's sources as compiled for the CPU (tests/cuda_on_host).
//
// Arguments: a file of lines "kernel's address, registers"; multiprocessors, the kilobytes of shared memory that each
// has, and its warps; dtype, channels_last, labels (int64),
// temperature, target, label smoothing; B C H W; N, h w of each exit; T, the teachers; weight of label losses, of soft losses.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <vector>

#include "cuda_launch.h"

namespace {
std::map<uintptr_t, int> registers;
int multiprocessors, shared_kilobytes, most_warps;  // the latter two of a multiprocessor
}  // namespace

namespace cuda_on_host {

int Multiprocessors() { return multiprocessors; }
int MostSharedBytes() { return (shared_kilobytes - 1) << 10; }
int ResidentBlocks(const void* kernel, int threads, size_t shared_bytes) {
  const int warps = (threads + 31) / 32, warp_registers = (registers[uintptr_t(kernel)] + 7) / 8 * 8 * 32;
  return std::min({65536 / warp_registers / warps, int((shared_kilobytes << 10) / (shared_bytes + 1024)),
                   most_warps / warps, most_warps / 2});
}
void AllowSharedBytes(const void*, size_t) {}
cudaError_t Launch(const cudaLaunchConfig_t& config, const void* kernel, const void* parameters, size_t bytes,
                   const std::function<void()>&) {
  printf("%zx %u %u %u %u %zu ", size_t(kernel), config.gridDim.x, config.gridDim.y, config.blockDim.x,
         config.blockDim.y, config.dynamicSmemBytes);
  for (size_t i = 0; i < bytes; ++i) printf("%02x", static_cast<const unsigned char*>(parameters)[i]);
  printf("\n");
  return cudaSuccess;
}

// No kernel runs.
unsigned LaneId() { abort(); }
unsigned char* DynamicShared() { abort(); }
bool SyncThreads(Site, bool) { abort(); }
uint64_t MeetLanes(Meeting, const char*, unsigned, uint64_t, unsigned, Site) { abort(); }
void Fail(const char*, Site) { abort(); }

}  // namespace cuda_on_host

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

int main(int, char** argument) {
  using namespace selfreg;
  std::ifstream file(*++argument);
  uintptr_t kernel;
  for (int count; file >> std::hex >> kernel >> std::dec >> count;) registers[kernel] = count;
  auto next = [&] { return atof(*++argument); };
  // Exit e is at 1 + e, its gradient at 64 + e, labels 128, workspace 129, losses 130, total 131; each times 2^36.
  auto place = [](int number) { return reinterpret_cast<void*>(int64_t(number) << 36); };

  multiprocessors = int(next()), shared_kilobytes = int(next()), most_warps = int(next());
  ExitLoss L{};
  L.dtype = DType(next());
  const bool channels_last = next(), labels = next();
  L.temperature = next();
  L.target = Target(int(next()));
  L.label_smoothing = next();
  L.B = next(), L.C = next(), L.H = next(), L.W = next();
  L.N = next();
  std::vector<View> exits, grads;
  for (int e = 0; e < L.N; ++e) {
    const int64_t h = next(), w = next();
    exits.push_back(channels_last ? View{place(1 + e), h * w * L.C, 1, w * L.C, L.C, h, w}
                                  : View{place(1 + e), h * w * L.C, h * w, w, 1, h, w});
    grads.push_back(exits.back());
    grads.back().data = place(64 + e);
  }
  L.T = next();
  std::vector<int32_t> teachers(L.T);
  for (int32_t& t : teachers) t = next();
  const double label_weight = next(), soft_weight = next();
  std::vector<double> weights((L.T + 1) * L.N, soft_weight);
  std::fill_n(weights.begin(), L.N, labels ? label_weight : 0);
  for (int r = 0; r < L.T; ++r) weights[(r + 1) * L.N + teachers[r]] = 0;

  L.exits = exits.data(), L.grads = grads.data(), L.teachers = teachers.data();
  L.label_type = LabelType::int64, L.labels = labels ? place(128) : nullptr;
  L.weights = L.total_weights = weights.data();
  L.reduction = Reduction::mean, L.ignore_index = 255, L.detach_teacher = true;
  L.losses = place(130), L.total = place(131);
  Plan plan;
  cudaError_t error = cuda_plan(L, 0, plan);
  printf("%ld\n", long(plan.bytes));
  if (error == cudaSuccess) error = cuda_enqueue(plan, place(129), nullptr);
  return error;
}

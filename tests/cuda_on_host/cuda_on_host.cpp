// The engine: blocks run one after the other, the threads of a block as fibers that run until they wait for others. A
// worker, an OS thread, resumes the fibers of one warp after the other and decides who has met.
#include "cuda_on_host.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_runtime.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

// What fibers run of the engine itself is hidden from the thread sanitizer, for which they are not in order, although
// one OS thread runs them all. Nothing instrumented may be called between a switch of fibers and that of stacks.
#define HIDDEN_FROM_TSAN __attribute__((no_sanitize("thread")))

CUDA_ON_HOST_PER_WORKER uint3 threadIdx, blockIdx;
CUDA_ON_HOST_PER_WORKER dim3 blockDim, gridDim;

// ---- switching stacks -------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(CUDA_ON_HOST_UCONTEXT)

using Context = void*;  // the stack pointer; the registers that a call preserves lie there

extern "C" __attribute__((visibility("hidden"))) void CudaOnHostSwitch(Context* from, const Context* to);
asm(R"(
    .text
    .p2align 4
    .globl CudaOnHostSwitch
    .hidden CudaOnHostSwitch
    .type CudaOnHostSwitch, @function
CudaOnHostSwitch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size CudaOnHostSwitch, .-CudaOnHostSwitch
)");

static void Prepare(Context* context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + bytes);
  *--top = nullptr;  // entry's return address: where backtraces end
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  *context = top;
}

#else

#include <ucontext.h>

using Context = ucontext_t;

HIDDEN_FROM_TSAN static void CudaOnHostSwitch(Context* from, const Context* to) { swapcontext(from, to); }

static void Prepare(Context* context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}

#endif

namespace cuda_on_host {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 512 << 10;  // taken only where it is used
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kUsualStackBytes = 8 << 10;
#ifdef __SANITIZE_THREAD__
constexpr int kWorkers = 2;
#else
constexpr int kWorkers = 1;
#endif
constexpr int kWarp = 32;

enum class State { kReady, kAtBarrier, kAtWarp, kReturned };

struct Thread {
  State state;
  uint3 index;
  unsigned lane;
  const char* function;  // in which it waits, and where
  Site site;

  // What a lane brings to a meeting of its warp, and takes from it.
  Meeting meeting;
  unsigned mask, source;
  uint64_t value, result;

  Context context;
  char* stack = nullptr;
  void* sanitizer = nullptr;  // the fiber to the thread sanitizer, its fake stack to the address sanitizer

  void AllocateStack(size_t number) {
    const size_t page = sysconf(_SC_PAGESIZE);
    void* const memory =
        mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
      perror("cuda_on_host: stack");
      abort();
    }
    stack = static_cast<char*>(memory) + page;
#ifdef __SANITIZE_THREAD__
    sanitizer = __tsan_create_fiber(0);
    __tsan_set_fiber_name(sanitizer, ("CUDA thread " + std::to_string(number)).c_str());
#endif
  }
};

// Runs blocks, on the OS thread it is called on.
struct Worker {
  std::vector<Thread> threads;  // of a block, or more: kept for their stacks
  size_t count;                 // of threads in a block
  Thread* running;
  const std::function<void()>* thread_function;
  unsigned char* shared;

  Context scheduler;
  void* scheduler_fiber = nullptr;
  const void* os_stack;
  size_t os_stack_bytes;

  // Every kWorkers-th block from `first` on.
  void RunBlocks(uint64_t first, const cudaLaunchConfig_t& config, const std::function<void()>& function);
  void RunBlock(size_t shared_bytes);
  void Resume(Thread& thread);
  void Wait(State state);
  bool MeetAtWarp(Thread* lanes, unsigned lane_count);
  bool MeetAtBarrier();
  void OrderBlock();
};

CUDA_ON_HOST_PER_WORKER Worker* worker;

HIDDEN_FROM_TSAN void PrintThread(const Thread& thread, const char* what, Site site) {
  const uint3 &b = blockIdx, &t = thread.index;
  fprintf(stderr, "cuda_on_host: block (%u, %u, %u), thread (%u, %u, %u): %s at %s:%d\n", b.x, b.y, b.z, t.x, t.y, t.z,
          what, site.file, site.line);
}

// ---- fibers ----

HIDDEN_FROM_TSAN void RunThread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &worker->os_stack, &worker->os_stack_bytes);
#endif
  (*worker->thread_function)();
  worker->Wait(State::kReturned);
}

HIDDEN_FROM_TSAN void Worker::Resume(Thread& thread) {
  threadIdx = thread.index;
  running = &thread;
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(thread.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStackBytes);
#endif
  CudaOnHostSwitch(&scheduler, &thread.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// From the running fiber back into Resume(), until that is called again.
HIDDEN_FROM_TSAN void Worker::Wait(State state) {
  Thread& thread = *running;
  thread.state = state;
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(state == State::kReturned ? nullptr : &thread.sanitizer, os_stack, os_stack_bytes);
#endif
  CudaOnHostSwitch(&thread.context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(thread.sanitizer, nullptr, nullptr);
#endif
}

// Tells the thread sanitizer that what these fibers did comes before all they will do. What was given to `sync` before
// must be known to all of them, as whatever else it holds they would seem to know as well.
HIDDEN_FROM_TSAN void Order(void* const* fibers, size_t count, void* sync) {
#ifdef __SANITIZE_THREAD__
  void* const self = __tsan_get_current_fiber();
  for (int i = 0; i < int(2 * count); ++i) {
    __tsan_switch_to_fiber(fibers[i % count], __tsan_switch_to_fiber_no_sync);
    (i < int(count) ? __tsan_release : __tsan_acquire)(sync);
  }
  __tsan_switch_to_fiber(self, __tsan_switch_to_fiber_no_sync);
#endif
}

// ---- the scheduler ----

void Worker::RunBlocks(uint64_t first, const cudaLaunchConfig_t& config, const std::function<void()>& function) {
  worker = this;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  thread_function = &function;
#ifdef __SANITIZE_THREAD__
  scheduler_fiber = __tsan_get_current_fiber();
#endif
  count = size_t(blockDim.x) * blockDim.y * blockDim.z;
  for (size_t i = threads.size(); i < count; ++i) threads.emplace_back().AllocateStack(i);
  for (size_t i = 0; i < count; ++i) {
    threads[i].lane = i % kWarp;
    threads[i].index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                        unsigned(i / blockDim.x / blockDim.y)};
  }
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  for (uint64_t b = first; b < blocks; b += kWorkers) {
    blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y), unsigned(b / gridDim.x / gridDim.y)};
    RunBlock(config.dynamicSmemBytes);
  }
}

void Worker::RunBlock(size_t shared_bytes) {
  // Of exactly this size, so that the address sanitizer sees an overrun; all bits set are NaN in every type.
  shared = static_cast<unsigned char*>(malloc(shared_bytes));
  memset(shared, 0xff, shared_bytes);
  for (size_t i = 0; i < count; ++i) {
#ifndef __SANITIZE_ADDRESS__
    // Likewise: what a kernel reads without having written it is not, by chance, what an earlier one left there.
    memset(threads[i].stack + kStackBytes - kUsualStackBytes, 0xff, kUsualStackBytes);
#endif
    Prepare(&threads[i].context, threads[i].stack, kStackBytes, RunThread);
    threads[i].state = State::kReady;
  }
  OrderBlock();
  do {
    for (size_t first = 0; first < count; first += kWarp) {
      const size_t last = std::min(first + kWarp, count);
      do {
        for (size_t i = first; i < last; ++i)
          if (threads[i].state == State::kReady) Resume(threads[i]);
      } while (MeetAtWarp(&threads[first], last - first));
    }
  } while (MeetAtBarrier());
  OrderBlock();
  free(shared);
}

// No lane is ready. Makes ready those that have met; false if there are none.
bool Worker::MeetAtWarp(Thread* lanes, unsigned lane_count) {
  unsigned waiting = 0, live = 0;
  for (unsigned i = 0; i < lane_count; ++i) {
    if (lanes[i].state == State::kAtWarp) waiting |= 1u << i;
    if (lanes[i].state != State::kReturned) live |= 1u << i;
  }
  bool met = false;
  while (waiting) {
    Thread& leader = lanes[__builtin_ctz(waiting)];
    const unsigned group = leader.mask & live;
    unsigned votes = 0;
    bool all = true;
    for (unsigned i = 0; i < lane_count; ++i) {
      if (!(group >> i & 1)) continue;
      all = all && lanes[i].state == State::kAtWarp && lanes[i].mask == leader.mask &&
            strcmp(lanes[i].function, leader.function) == 0;
      votes |= unsigned(lanes[i].value != 0) << i;
    }
    if (!all) {
      waiting &= waiting - 1;
      continue;
    }
    waiting &= ~group;
    met = true;
    void* fibers[kWarp];
    size_t fiber_count = 0;
    for (unsigned i = 0; i < lane_count; ++i) {
      if (!(group >> i & 1)) continue;
      const unsigned source = lanes[i].source;
      const bool defined = source < lane_count && (group >> source & 1);
      const uint64_t shuffled = defined ? lanes[source].value : ~uint64_t(0);
      lanes[i].result = leader.meeting == Meeting::kVote ? votes : shuffled;
      lanes[i].state = State::kReady;
      fibers[fiber_count++] = lanes[i].sanitizer;
    }
    if (leader.meeting == Meeting::kSync) Order(fibers, fiber_count, &leader);
  }
  return met;
}

// No thread is ready. Makes all ready, which must be at one barrier; false if all have returned.
bool Worker::MeetAtBarrier() {
  std::vector<void*> fibers;
  const Thread* first = nullptr;
  uint64_t any = 0;
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    if (thread.state == State::kReturned) continue;
    if (!first) first = &thread;
    any |= thread.value;
    if (thread.state != State::kAtBarrier || thread.site.line != first->site.line ||
        strcmp(thread.site.file, first->site.file) != 0) {
      fprintf(stderr, "cuda_on_host: deadlock or divergent barrier\n");
      PrintThread(*first, first->function, first->site);
      PrintThread(thread, thread.function, thread.site);
      abort();
    }
    thread.state = State::kReady;
    fibers.push_back(thread.sanitizer);
  }
  for (size_t i = 0; i < count; ++i) threads[i].result = any;
  Order(fibers.data(), fibers.size(), this);
  return first;
}

// All threads of the block, with the scheduler, which goes from one block to the next.
void Worker::OrderBlock() {
  std::vector<void*> fibers = {scheduler_fiber};
  for (size_t i = 0; i < count; ++i) fibers.push_back(threads[i].sanitizer);
  Order(fibers.data(), fibers.size(), this);
}

struct Engine {
  std::mutex one_at_a_time;  // launches, and changes of what they read
  std::map<const void*, size_t> shared_bytes_allowed;
  std::set<const void*> launched;
  Worker workers[kWorkers];
};
Engine& engine = *new Engine;  // for ever: a process may end in one thread while another launches

}  // namespace

// ---- what kernels call ----

HIDDEN_FROM_TSAN bool SyncThreads(Site site, bool value) {
  Thread& thread = *worker->running;
  thread.function = "__syncthreads";
  thread.site = site;
  thread.value = value;
  worker->Wait(State::kAtBarrier);
  return thread.result != 0;
}

HIDDEN_FROM_TSAN uint64_t MeetLanes(Meeting meeting, const char* function, unsigned mask, uint64_t value,
                                    unsigned source, Site site) {
  Thread& thread = *worker->running;
  if (!(mask >> thread.lane & 1)) Fail("a lane that is not in its mask", site);
  thread.meeting = meeting;
  thread.function = function;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  thread.site = site;
  worker->Wait(State::kAtWarp);
  return thread.result;
}

HIDDEN_FROM_TSAN unsigned LaneId() { return worker->running->lane; }

HIDDEN_FROM_TSAN unsigned char* DynamicShared() { return worker->shared; }

HIDDEN_FROM_TSAN void Fail(const char* why, Site site) {
  PrintThread(*worker->running, why, site);
  abort();
}

// ---- what launches call ----

void AllowSharedBytes(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(engine.one_at_a_time);
  engine.shared_bytes_allowed[kernel] = bytes;
}

int Multiprocessors() { return 3; }
int MostSharedBytes() { return 227 << 10; }

int ResidentBlocks(const void*, int, size_t) { return 2; }

cudaError_t Launch(const cudaLaunchConfig_t& config, const void* kernel, const void*, size_t,
                   const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(engine.one_at_a_time);
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const size_t block_threads = size_t(block.x) * block.y * block.z;
  if (block_threads == 0 || block_threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const auto allowed = engine.shared_bytes_allowed.find(kernel);
  if (config.dynamicSmemBytes > (allowed == engine.shared_bytes_allowed.end() ? kSharedBytes : allowed->second))
    return cudaErrorInvalidValue;
  engine.launched.insert(kernel);

  if constexpr (kWorkers == 1) {
    engine.workers[0].RunBlocks(0, config, thread);
  } else {
    std::vector<std::thread> os_threads;
    for (int i = 0; i < kWorkers; ++i)
      os_threads.emplace_back([&, i] { engine.workers[i].RunBlocks(i, config, thread); });
    for (std::thread& os_thread : os_threads) os_thread.join();
  }
  return cudaSuccess;
}

}  // namespace cuda_on_host

// For ctypes: which kernels were launched so far. Writes up to `room` of them, and returns how many there are.
extern "C" __attribute__((visibility("default"))) size_t cuda_on_host_launched(const void** kernels, size_t room) {
  const std::lock_guard<std::mutex> lock(cuda_on_host::engine.one_at_a_time);
  size_t count = 0;
  for (const void* kernel : cuda_on_host::engine.launched)
    if (count++ < room) *kernels++ = kernel;
  return count;
}

// The engine under this folder's cuda_runtime.h: runs a block's threads as fibers of one OS thread, so that kernels
// can be tested on the CPU and under sanitizers. What is undefined on a GPU aborts here with a message.
#pragma once

#include <cstdint>

// Under the thread sanitizer blocks run on several OS threads, without order between them; each OS thread has its own
// indices and static shared memory.
#ifdef __SANITIZE_THREAD__
#define CUDA_ON_HOST_PER_WORKER __thread
#else
#define CUDA_ON_HOST_PER_WORKER
#endif

namespace cuda_on_host {

// A call in a kernel; as a default argument, the caller's place.
struct Site {
  const char* file;
  int line;
  static constexpr Site Here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Waits for all threads of the block that have not returned; whether any of them says `value`.
bool SyncThreads(Site site, bool value = false);

// How lanes of a warp meet: all only wait and see each other's memory; or each gets the value of the lane `source`; or
// each gets the mask of lanes whose value is not 0.
enum class Meeting { kSync, kShuffle, kVote };

// Waits for the lanes in `mask` that have not returned, which must call the same `function` with the same mask.
uint64_t MeetLanes(Meeting meeting, const char* function, unsigned mask, uint64_t value, unsigned source, Site site);

unsigned LaneId();

unsigned char* DynamicShared();

// Prints where and why, and aborts.
[[noreturn]] void Fail(const char* why, Site site);

}  // namespace cuda_on_host

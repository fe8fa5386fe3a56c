// In the place of torch's: `parallel_for` alone, on threads that sanitizers know. torch's are libgomp's, whose barriers
// the thread sanitizer does not see, so that it reports races where there are none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline int64_t threads = 1;

// f(begin, end) of parts of at least `grain`, each in a thread of its own.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  const int64_t parts = std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, threads);
  const int64_t part = (end - begin + parts - 1) / parts;
  std::vector<std::thread> running;
  for (int64_t i = begin; i < end; i += part) running.emplace_back(f, i, std::min(i + part, end));
  for (std::thread& thread : running) thread.join();
}

}  // namespace torch::stable

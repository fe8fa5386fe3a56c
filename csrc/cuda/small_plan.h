// Whether a launch takes the kernels of small exits, and which of them.
#pragma once

#include "combine.h"
#include "planning.h"
#include "small_exits.h"

namespace selfreg {

// Fills in what does not depend on how the output is cut: whether these kernels will do, and how many peaks there are.
inline bool describe_small(const Request<float>& request, SmallArgs& small, int64_t& peaks) {
  const Args<float>& a = small.all = request.args;
  // Raw targets of other temperatures underflow where what they are a power of does not, or the other way round; of
  // large ones, gradients are small differences of large sums.
  const bool fits = a.T == 0 || a.target == Target::argmax || (a.tau >= 0.5f && a.tau <= 8);
  const bool suits = a.C > 1 && a.C <= kMostSmallChannels;  // of one channel, gradients are to be exactly 0
  if (!fits || !suits || a.reduction == Reduction::none || a.teacher_learns || a.pixels >> 31) return false;
  for (int e = 0; e < a.N; ++e) {
    const int2 from = a.from[e];
    const PixelView& v = a.exits[e];
    if (from.x == 0) {
      small.mixed = true;
      continue;
    }
    const int64_t last = (from.x - 1) * v.step[1] + (from.y - 1) * v.step[2] + (a.C - 1) * v.channel;
    if (from.x > a.size[1] || from.y > a.size[2] || last > 0x3fffffff) return false;
    int s = 0;
    auto same = [&](int i) {
      return a.from[small.size_first[i]].x == from.x && a.from[small.size_first[i]].y == from.y;
    };
    while (s < small.sizes && !same(s)) ++s;
    if (s == small.sizes) small.size_first[small.sizes++] = e;
    small.size_number[e] = uint8_t(s);
    if (from.x > a.from[small.size_first[small.finest]].x) small.finest = s;
    small.peaks_from[e] = peaks;
    peaks += a.size[0] * from.x * from.y;
  }
  for (int s = 0; s < small.sizes; ++s) small.vectors[s] = uint8_t(a.T + 1);
  for (int e = 0; e < a.N; ++e)
    if (a.grads[e].data && a.from[e].x) small.rank[e] = small.vectors[small.size_number[e]]++;
  return peaks >> 30 == 0;  // they are counted, in steps of a grid, in int
}

// A kernel that will do, and how many of its warps a multiprocessor runs at a time.
struct SmallChoice {
  void (*kernel)(SmallArgs) = nullptr;
  dim3 block;
  SmallLayout at;
  int pitch = 0, warps = 0;
};
template <class S, int K, bool spread, bool plain>
void try_small(Planner& planner, const SmallArgs& small, dim3 block, SmallChoice& best) {
  using Shape = SmallShape<S, K, spread, plain>;
  const auto kernel = small_exits_kernel<Shape>;
  const SmallLayout at = small_layout<Shape>(small, block.x * block.y);
  const int warps = planner.resident_warps(kernel, block, at.total * int64_t(sizeof(float)));
  if (warps > best.warps) best = {kernel, block, at, small.all.groups * K, warps};
}
template <class S>
SmallChoice choose_small(Planner& planner, SmallArgs& small) {
  Args<float>& a = small.all;
  a.groups = (a.C + kMostOfThread - 1) / kMostOfThread;
  if (a.groups > 8) a.groups += a.groups % 2;  // half warps: an even number of them
  const int channels = (a.C + a.groups - 1) / a.groups;
  const bool plain = a.plain() && !small.mixed;
  SmallChoice best;
  for (int columns : {128, 64}) {  // of a strip: fine exits leave room for few
    if (best.warps >= kEnoughWarps) break;
    const dim3 block = a.groups == 1 ? dim3(columns) : dim3(a.groups <= 8 && columns == 128 ? 32 : 16, a.groups);
    if (block.x * block.y % 32 != 0) continue;
    if (!plain) {
      a.groups > 1     ? try_small<S, kMostOfThread, true, false>(planner, small, block, best)
      : channels <= 8  ? try_small<S, 8, false, false>(planner, small, block, best)
      : channels <= 16 ? try_small<S, 16, false, false>(planner, small, block, best)
                       : try_small<S, kMostOfThread, false, false>(planner, small, block, best);
    } else if (a.groups > 1) {
      channels <= 16 ? try_small<S, 16, true, true>(planner, small, block, best)
                     : try_small<S, kMostOfThread, true, true>(planner, small, block, best);
    } else {
      channels <= 8    ? try_small<S, 8, false, true>(planner, small, block, best)
      : channels <= 16 ? try_small<S, 16, false, true>(planner, small, block, best)
      : channels <= 20 ? try_small<S, 20, false, true>(planner, small, block, best)
                       : try_small<S, kMostOfThread, false, true>(planner, small, block, best);
    }
  }
  return best;
}

// Whether there is a kernel for the launch: peaks, the main one, and what combines the copies.
template <class S>
bool plan_small_exits(Planner& planner, const Request<float>& request, Planned& planned) {
  SmallArgs small{};
  Args<float>& a = small.all;
  int64_t peaks = 0;
  if (!describe_small(request, small, peaks)) return false;
  const SmallChoice choice = choose_small<S>(planner, small);
  if (choice.warps == 0) return false;
  const int64_t most = planner.most_blocks(choice.warps, choice.block);
  a.cut = cut_output(a.size, choice.block.x, SmallShape<S, 8, false, true>::P, most);
  small.bands = int(a.size[0] * a.cut.bands * a.cut.strips);
  small.pitch = choice.pitch;
  small.at = choice.at;
  const int64_t copies = place_vectors(small);
  int64_t positions = 1;
  for (int s = 0; s < small.sizes; ++s) {
    if (small.copy_numbers[s] >> 31) return false;
    const int2 from = a.from[small.size_first[s]];
    positions = std::max(positions, a.size[0] * from.x * from.y);
  }

  const int64_t peaks_at = planner.take(peaks * sizeof(float)), copies_at = planner.take(copies * sizeof(float));
  const Partials main = planned.main = planner.take_partials(a, std::min<int64_t>(small.bands, most));
  const int64_t combined_blocks = std::min((positions + kSmallThreads - 1) / kSmallThreads, kMaxCombineBlocks);
  const Partials combined = planned.combined = planner.take_partials(a, combined_blocks);
  auto place = [=](SmallArgs& to, char* workspace) {
    place_sums(to.all, request, main, workspace);
    to.peaks = placed<float>(workspace, peaks_at);
    to.copies = placed<float>(workspace, copies_at);
    to.combined = placed<double>(workspace, combined.begin);
  };
  const dim3 grid(unsigned(combined_blocks), unsigned(a.N));
  planner.add(peak_kernel<S>, grid, kSmallThreads, 0, small, place);
  planner.add(choice.kernel, dim3(unsigned(main.blocks)), choice.block, choice.at.total * int64_t(sizeof(float)), small,
              place);
  planner.add(combine_kernel<S>, grid, kSmallThreads, 0, small, place);
  return true;
}

}  // namespace selfreg

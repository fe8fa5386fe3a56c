// The kernels that there are for exits of the output's size, and which one a launch takes.
#pragma once

#include "full_size.h"
#include "lanes.h"
#include "planes.h"
#include "planning.h"
#include "staged.h"

namespace selfreg {

// Kernels of one layout and access: for 8, 16, 24 or 32 channels of a thread; and where most of the work is also for 20
// and 22, as 19 and 21 classes have it, or 30, so that few of a thread's channels do not exist.
template <class... Rows>
struct Table {};
template <class S>
using Planes4 = Table<Planes<S, 8, 4>>;
template <class S>
using Planes2 = Table<Planes<S, 8, 2>, Planes<S, 16, 2>, Planes<S, 20, 2>, Planes<S, 22, 2>, Planes<S, 24, 2>>;
template <class S>
using Planes1 = Table<Planes<S, 8, 1>, Planes<S, 16, 1>, Planes<S, 24, 1>, Planes<S, 30, 1>, Planes<S, 32, 1>>;
template <class S>
using Staged2 = Table<Staged<S, 8, 2>, Staged<S, 16, 2>, Staged<S, 20, 2>, Staged<S, 22, 2>, Staged<S, 24, 2>>;
template <class S>
using Staged1 = Table<Staged<S, 8, 1>, Staged<S, 16, 1>, Staged<S, 24, 1>, Staged<S, 32, 1>>;
template <class S, int V>
using Lanes8 = Table<Lanes<S, 8, V, 8>, Lanes<S, 16, V, 8>, Lanes<S, 24, V, 8>, Lanes<S, 32, V, 8>>;
template <class S, int V>
using Lanes32 = Table<Lanes<S, 32, V, 32>>;

// A kernel that will do, and how many of its warps a multiprocessor runs at a time.
struct Shape {
  void (*kernel)(FullSizeArgs) = nullptr;
  dim3 block;
  FullSizeLayout at;
  int groups = 1, tile = 1;  // threads that share a pixel, where these are warps; pixels of a block
  int warps = 0;
};

// Looks for the shape of a launch. Shapes are tried from the one with the fewest instructions a number on; the first
// that leaves a multiprocessor enough warps is taken, else the one that leaves it most: there are GPUs with 100 KB of
// shared memory a multiprocessor, and with 228.
template <class S>
class ShapeOf {
 public:
  ShapeOf(Planner& planner, const Request<float>& request) : planner_(planner), request_(request), a_(request.args) {
    if (request.layout == Layout::planes) {
      try_planes();
    } else if (request.layout == Layout::staged && a_.C <= 32) {
      if constexpr (sizeof(S) == 2)  // of float, two pixels' rows leave room for too few threads
        if (a_.pixels % 2 == 0) try_threads(Staged2<S>(), a_.C, 1);
      try_threads(Staged1<S>(), a_.C, 1);
    } else {
      try_lanes();
    }
  }
  const Shape& best() const { return best_; }

 private:
  void try_planes() {
    int groups = (a_.C + 31) / 32;          // spreading a pixel over warps keeps its channels in registers
    if (groups > 16) groups += groups % 2;  // half warps: an even number of them
    const int channels = (a_.C + groups - 1) / groups;
    if (request_.vector % 4 == 0) try_threads(Planes4<S>(), channels, groups);
    if (request_.vector % 2 == 0) try_threads(Planes2<S>(), channels, groups);
    try_threads(Planes1<S>(), channels, groups);
  }
  void try_lanes() {
    const bool fours = request_.vector % 4 == 0;
    const int of8 = (a_.C + 7) / 8, of32 = (a_.C + 31) / 32;
    if (fours) try_threads(Lanes8<S, 4>(), of8, 1);
    if (fours && of8 > 32) try_threads(Lanes32<S, 4>(), of32, 1);
    try_threads(Lanes8<S, 1>(), of8, 1);
    if (of8 > 32) try_threads(Lanes32<S, 1>(), of32, 1);
  }
  template <class TheTable>
  void try_threads(TheTable table, int channels, int groups) {
    if (groups > 1) {
      try_rows(table, channels, groups, dim3(groups <= 16 ? 32 : 16, groups));
    } else {
      try_rows(table, channels, 1, dim3(128));
      try_rows(table, channels, 1, dim3(64));
    }
  }
  // The shortest row that holds the channels.
  template <class... Rows>
  void try_rows(Table<Rows...>, int channels, int groups, dim3 block) {
    if (best_.warps < kEnoughWarps) (void)((channels <= Rows::K && (try_shape<Rows>(groups, block), true)) || ...);
  }
  template <class Access>
  void try_shape(int groups, dim3 block) {
    if (!Access::kRare && !a_.plain()) return;
    const int threads = int(block.x * block.y);
    Args<float> args = a_;
    args.groups = groups;
    FullSizeLayout at{};
    auto take = [&at](int numbers) { return take_shared(at.total, numbers); };
    at.targets = take(args.target == Target::argmax ? 0 : args.T * threads * kTargetRow<Access>);
    at.scalars = take(args.T * 2 * threads * Access::P);
    at.sums = take((args.T + 1) * args.N * threads);
    at.gains = take((args.T + 1) * args.N);
    at.ratios = take(args.N);
    Access::take(args, threads, at);
    const auto kernel = full_size_kernel<Access>;
    const int warps = planner_.resident_warps(kernel, block, at.total * int64_t(sizeof(float)));
    if (warps <= best_.warps) return;
    const int lanes = Access::kLanes;
    best_ = {kernel, block, at, groups, int(block.x) / lanes * Access::P, warps};
  }

  Planner& planner_;
  const Request<float>& request_;
  const Args<float>& a_;
  Shape best_;
};

// Whether there is a kernel for the launch.
template <class S>
bool plan_full_size(Planner& planner, const Request<float>& request, Planned& planned) {
  const Args<float>& a = request.args;
  if (a.teacher_learns || a.reduction == Reduction::none || a.C > 1024 || !request.channels_near) return false;
  const Shape shape = ShapeOf<S>(planner, request).best();
  if (shape.warps == 0) return false;
  FullSizeArgs args{a, shape.at};
  args.all.groups = shape.groups;
  const int64_t most = planner.most_blocks(shape.warps, shape.block);
  const int64_t blocks = std::min((a.pixels + shape.tile - 1) / shape.tile, most);
  const Partials partials = planned.main = planner.take_partials(a, blocks);
  planner.add(shape.kernel, dim3(unsigned(blocks)), shape.block, shape.at.total * int64_t(sizeof(float)), args,
              [=](FullSizeArgs& to, char* workspace) { place_sums(to.all, request, partials, workspace); });
  return true;
}

}  // namespace selfreg

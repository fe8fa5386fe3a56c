// All exits in a block, whatever their sizes.
#pragma once

#include "exponentials.h"
#include "read_write.h"

namespace {

template <class A>
struct Exits {
  using V = typename VecOf<A>::V;

  const Frame<A>& frame;
  const ExitLoss& L;
  const int N;
  ReadWrite<A> memory;
  Exponentials<A> exponentials;
  ExitLines<A>* lines;  // [N], of which those are in use that are resized
  ExitSums<A>* sizes;   // [N], of which those are in use that are such an exit's number and the first of its size
  int* next;            // [N] of those of the output's size: which is read after it in a block; of the last, the first
  int first_read;
  A* across;  // [width, pitch] a row of an exit, channels together

  explicit Exits(const Frame<A>& frame) : frame(frame), L(frame.L), N(frame.L.N), memory(frame), exponentials(frame) {}

  void lay_out(Memory& m) {
    memory.lay_out(m);
    exponentials.lay_out(m);
    lines = m.template take<ExitLines<A>>(N);
    sizes = m.template take<ExitSums<A>>(N);
    next = m.template take<int>(N);
    int64_t widest = 0;
    for (int e = 0; e < N; ++e) {
      if (lines) lines[e].size = nullptr;
      if (!is_resized(e)) continue;
      ExitLines<A> exit{};
      (lines ? lines[e] : exit).lay_out(m, frame, e);
      if (is_small(e) && widest < L.exits[e].W) widest = L.exits[e].W;
      if (lines) lines[e].size = &sizes[frame.first_of_size(e)];
      if (frame.first_of_size(e) != e) continue;
      int wanted = 0;
      for (int other = e; other < N; ++other) {
        if (frame.first_of_size(other) != e) continue;
        const bool has_gradient = L.grads[other].data;
        if (lines) lines[other].vector = has_gradient ? ExitSums<A>::first_exit(L, resize(e)) + wanted : -1;
        wanted += has_gradient;
      }
      ExitSums<A> size{};
      (sizes ? sizes[e] : size).lay_out(m, frame, resize(e), wanted);
    }
    across = m.template take<A>((widest + FullSize<A>::kLanes) * frame.pitch);
  }
  const Resize& resize(int e) const { return frame.plan.resizes[e]; }
  bool is_resized(int e) const { return resize(e).needed; }
  bool is_small(int e) const { return resize(e).small; }
  template <class F>
  void over_sizes(F f) const {
    for (int e = 0; e < N; ++e)
      if (lines[e].size == &sizes[e]) f(sizes[e]);
  }

  void begin_launch() {
    int last = -1;  // teachers are read first
    auto append = [&](int e) {
      if (is_resized(e)) return;
      (last < 0 ? first_read : next[last]) = e;
      next[last = e] = first_read;
    };
    auto teaches = [&](int e) {
      bool found = false;
      for (int r = 0; r < L.T; ++r) found |= L.teachers[r] == e;
      return found;
    };
    for (int r = 0; r < L.T; ++r) append(L.teachers[r]);
    for (int e = 0; e < N; ++e)
      if (!teaches(e)) append(e);
    over_sizes([&](ExitSums<A>& size) { size.place_columns(frame); });
  }
  void begin_band() const {
    memory.begin_band();
    over_sizes([&](ExitSums<A>& size) { size.begin_band(frame.y0); });
  }
  void begin_tile() const {
    over_sizes([&](ExitSums<A>& size) { size.cut(frame.top, frame.rows); });
    for (int e = 0; e < N; ++e)
      if (is_resized(e)) lines[e].draw(frame);
  }

  // One that is not small, at the output's resolution.
  void read(int e, int64_t b, const V* counted, Logits<A>& logits) const {
    logits.unit = is_resized(e) && !lines[e].as_they_are ? A(1) : A(kLog2e);
    if (is_resized(e)) {
      exponentials.interpolate(lines[e], b, logits.block);
      logits.is_in_block(frame.apart);
    } else if (!memory.read_in_place(L.exits[e], b, counted, logits)) {
      memory.read(L.exits[e], b, logits.block);
      logits.is_in_block(frame.apart);
    }
    FullSize<A>(frame).find_maxima(counted, logits);
  }
  // What is read after exit e: another one, or the first of the next block.
  Ahead ahead(int e, int64_t b) const {
    if (is_resized(e)) return {reinterpret_cast<const char*>(lines), 0, 0};
    const bool of_next = next[e] == first_read, below = of_next && b + 1 == frame.blocks;
    return memory.ahead(L.exits[next[e]], below ? 0 : b + of_next, below ? frame.rows : 0);
  }
  void write(int e, int64_t b, V* g) const {
    if (!is_resized(e)) return memory.write(L.grads[e], b, g);
    V ones[kMostRows];
    for (V& one : ones) one = fill<V>(A(1));
    lines[e].size->add(lines[e].vector, b, PowerOf<1, V>{g, frame.apart}, ones);
  }
};

}  // namespace

// A block of a tensor of the output's size, in any layout and dtype, and back.
#pragma once

#include "frame.h"
#include "storage.h"

namespace {

// A gradient's rows on their way from registers: to a block, or, where it is larger than the caches, past them. Then in
// whole lines of memory, for one in two parts is read from memory first: each out of two neighbouring vectors, for
// channels begin anywhere. A tile's last vector is left to the tile below.
template <class A>
struct Rows {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

  V* block;  // [C, apart]
  int64_t apart;
  A* to;              // the tile's first pixel; null: to the block
  int64_t channel;    // numbers from a channel to the next
  int64_t n;          // pixels of the tile,
  int rows;           // and rows
  V* past;            // [C] last vectors of the rows above
  bool joined, ends;  // whether there are rows above; whether there are none below

  // Rows r to r + G of channel c.
  template <int G>
  SELFREG_ALWAYS void put(int c, int r, const V (&g)[G]) const {
    if (to) return put_past_caches(c, r, g);
    for (int i = 0; i < G; ++i) block[c * apart + r + i] = g[i];
  }

 private:
  template <int G>
  SELFREG_ALWAYS void put_past_caches(int c, int r, const V (&g)[G]) const {
    A* const row = to + c * channel + r * kLanes;
    const int head = int(-(reinterpret_cast<uintptr_t>(row) / sizeof(A)) & (kLanes - 1));  // before the first line
    VInt at;
    for (int k = 0; k < kLanes; ++k) at[k] = k;
    at += head;
    const bool goes_on = r > 0 || joined;
    const int64_t left = n - int64_t(r) * kLanes;
    V before = past[c];
    int64_t done = goes_on ? head - kLanes : head < left ? head : left;
    if (!goes_on) memcpy(row, g, done * sizeof(A));
    for (int i = 0; i < G; ++i) {
      const int64_t begin = (i - 1) * kLanes + head;
      if ((i > 0 || goes_on) && begin + kLanes <= left) {
        stream(row + begin, shuffle(before, g[i], at));
        done = begin + kLanes;
      }
      before = g[i];
    }
    if (ends && r + G == rows) finish(row, past[c], g, done, left);
    past[c] = before;
  }
  template <int G>
  __attribute__((noinline)) static void finish(A* row, V before, const V (&g)[G], int64_t done, int64_t end) {
    V vectors[G + 1] = {before};
    memcpy(vectors + 1, g, sizeof g);
    memcpy(row + done, reinterpret_cast<const A*>(vectors + 1) + done, (end - done) * sizeof(A));
  }
};

// Where a block lies that is read next. It comes from memory while exponentials are computed: fetched at once, memory
// and arithmetic would take the sum of their times.
struct Ahead {
  const char* data;
  int64_t channel, row;  // strides in bytes
  SELFREG_ALWAYS void fetch(int c, int r) const { __builtin_prefetch(data + c * channel + r * row, 0, 2); }
};

// Blocks are [C, frame.apart] vectors; numbers beyond a row's last pixel are 0, and are not written.
template <class A>
class ReadWrite {
  using V = typename VecOf<A>::V;
  using VInt = typename VecOf<A>::VInt;
  static constexpr int kLanes = sizeof(V) / sizeof(A);

 public:
  explicit ReadWrite(const Frame<A>& frame) : frame(frame), L(frame.L), C(frame.C), apart(frame.apart) {}
  void lay_out(Memory& m) {
    past = m.template take<V>(L.N * C);
    joins = m.template take<bool>(L.N);
  }
  void begin_band() const { memset(joins, 0, L.N * sizeof(bool)); }

  void read(const View& v, int64_t b, V* block) const {
    over_numbers(v, b, block, true, [](auto* from, A* to, int64_t n) { convert(to, from, n); });
  }
  // Whether it needs no copy: all of its pixels count, and lie in vectors as they are.
  bool read_in_place(const View& v, int64_t b, const V* counted, Logits<A>& logits) const {
    if (v.stride_w != 1 || v.stride_h != kLanes || partial(b) < kLanes || !is_of<A>()) return false;
    VInt ignored{};
    for (int r = 0; r < frame.rows; ++r) ignored |= counted[r] == A(0);
    if (any(ignored)) return false;
    logits.z = static_cast<const A*>(v.data) + frame.image * v.stride_b + frame.top * v.stride_h + b * kLanes;
    logits.channel = v.stride_c;
    return true;
  }
  // Block b, `down` rows below the tile.
  Ahead ahead(const View& v, int64_t b, int64_t down) const {
    const int64_t bytes = L.dtype == DType::float64 ? 8 : L.dtype == DType::float32 ? 4 : 2;
    const int64_t first = frame.image * v.stride_b + (frame.top + down) * v.stride_h + b * kLanes * v.stride_w;
    // The last bytes of rows: those before are on the line that the row above ends on.
    const char* const data = static_cast<const char*>(v.data) + first * bytes + (kLanes * bytes - 1);
    if (v.stride_w == 1) return {data, v.stride_c * bytes, v.stride_h * bytes};
    return {data, frame.rows * kLanes * bytes, kLanes * bytes};  // channels side by side: in order
  }
  void write(const View& v, int64_t b, V* block) const {
    over_numbers(v, b, block, false, [](auto* to, const A* from, int64_t n) { convert(to, from, n); });
  }
  // Rows of exit e's gradient: past the caches, if they may, and can, being of one vector each and side by side; or
  // else to `block`.
  Rows<A> rows(int e, V* block, bool may) const {
    const View& v = L.grads[e];
    const bool past_caches = may && frame.plan.stream && kVecBytes >= 32 && frame.plan.width == kLanes &&
                             v.stride_w == 1 && v.stride_h == kLanes && is_of<A>();
    if (!past_caches) return {block, apart, nullptr, 0, 0, 0, nullptr, false, false};
    const bool joined = joins[e], ends = frame.top + frame.rows == frame.y1;
    joins[e] = !ends;
    A* const to = static_cast<A*>(v.data) + frame.image * v.stride_b + frame.top * kLanes;
    const int64_t n = (frame.rows - 1) * kLanes + partial(0);
    return {block, apart, to, v.stride_c, n, frame.rows, past + int64_t(e) * C, joined, ends};
  }

 private:
  const Frame<A>& frame;
  const ExitLoss& L;
  const int C;
  const int64_t apart;
  V* past;      // [N, C] see Rows
  bool* joins;  // [N]

  template <class Number>
  bool is_of() const {
    return L.dtype == (sizeof(Number) == 4 ? DType::float32 : DType::float64);
  }
  // copy(the tensor's numbers, the block's, how many side by side).
  template <class Copy>
  void over_numbers(const View& v, int64_t b, V* block, bool to_block, Copy copy) const {
    if constexpr (sizeof(A) == 8) {
      over_numbers_as<double>(v, b, block, to_block, copy);
    } else {
      switch (L.dtype) {
        case DType::float32: over_numbers_as<float>(v, b, block, to_block, copy); break;
        case DType::float16: over_numbers_as<Half>(v, b, block, to_block, copy); break;
        default: over_numbers_as<BFloat>(v, b, block, to_block, copy);
      }
    }
  }
  template <class S, class Copy>
  void over_numbers_as(const View& v, int64_t b, V* block, bool to_block, Copy copy) const {
    S* const first =
        static_cast<S*>(v.data) + frame.image * v.stride_b + frame.top * v.stride_h + b * kLanes * v.stride_w;
    const int rows = frame.rows, whole = whole_rows(b), partial = this->partial(b);
    auto numbers = [&](int c, int r) { return reinterpret_cast<A*>(block + c * apart + r); };
    int done = 0;
    if (v.stride_w == 1) {
      done = whole;
      for (int c = 0; c < C; ++c)
        for (int r = 0; r < whole; ++r) copy(first + c * v.stride_c + r * v.stride_h, numbers(c, r), kLanes);
    } else if (v.stride_c == 1 && C >= kLanes) {
      for (; done < whole; ++done)
        for (int c = 0; c < C; c += kLanes)  // the last vector overlaps the one before
          channels(first + done * v.stride_h, v.stride_w, c + kLanes <= C ? c : C - kLanes, done, block, to_block,
                   copy);
    }
    for (int r = done; r < rows; ++r)
      for (int c = 0; c < C; ++c) {
        S* const there = first + c * v.stride_c + r * v.stride_h;
        const int count = r < whole ? kLanes : partial;
        for (int k = 0; k < count; ++k) copy(there + k * v.stride_w, numbers(c, r) + k, 1);
        for (int k = count; k < kLanes && to_block; ++k) numbers(c, r)[k] = 0;
      }
  }
  int partial(int64_t b) const { return frame.columns(frame.rows - 1, b); }
  int whole_rows(int64_t b) const {
    return partial(b) == kLanes ? frame.rows : frame.columns(0, b) == kLanes ? frame.rows - 1 : 0;
  }
  // A vector of channels from c on, of a vector of pixels.
  template <class S, class Copy>
  SELFREG_ALWAYS void channels(S* row, int64_t stride, int c, int r, V* block, bool to_block, Copy copy) const {
    V pixels[kLanes];
    if (!to_block) {
      for (int k = 0; k < kLanes; ++k) pixels[k] = block[(c + k) * apart + r];
      transpose<V, VInt>(pixels);
    }
    for (int k = 0; k < kLanes; ++k) copy(row + k * stride + c, reinterpret_cast<A*>(pixels + k), kLanes);
    if (!to_block) return;
    transpose<V, VInt>(pixels);
    for (int k = 0; k < kLanes; ++k) block[(c + k) * apart + r] = pixels[k];
  }
};

}  // namespace

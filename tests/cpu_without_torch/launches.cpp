// Launches of the CPU kernels without torch, for sanitizers and for other machines: random ones, each with one thread
// and with four, which must leave the same bits. Every tensor is a heap block of exactly the bytes that its strides
// reach, so that whatever is read or written beside it is found. The values are other tests' business; on another
// machine, they are compared with this one's. See test_cpu_sanitizers.py and matrix.py.
//
// launches COUNT: so many random ones, and one whose gradients are larger than caches.
// launches COUNT values: so many random ones; prints losses and gradients, as a line "DTYPE BYTES" and the bytes.
// launches overrun | race: what must be found (see main).
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/launch.h"

namespace {

using namespace selfreg;

std::mt19937 random_bits(7);
int64_t below(int64_t n) { return int64_t(random_bits() % uint32_t(n)); }
bool sometimes() { return below(2) == 0; }
double uniform(double low, double high) { return low + (high - low) * random_bits() / 4294967296.; }
template <class T>
T one_of(std::initializer_list<T> list) {
  return list.begin()[below(int64_t(list.size()))];
}

// Blocks of memory that live as long as a launch.
struct Memory {
  std::vector<std::unique_ptr<char[]>> blocks;
  template <class T>
  T* take(int64_t n) {
    blocks.emplace_back(new char[n * sizeof(T)]());
    return reinterpret_cast<T*>(blocks.back().get());
  }
};

int64_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

struct Tensor {
  View view;
  int64_t numbers;
};

// (B, C, h, w) as NCHW, as channels_last, or as a part of a larger NCHW tensor.
Tensor tensor(Memory& memory, const ExitLoss& L, int64_t h, int64_t w, int layout) {
  const int64_t row = w + 3 * (layout == 2), plane = (h + layout / 2) * row, C = L.C;
  View v = layout == 1 ? View{nullptr, h * w * C, 1, w * C, C, h, w} : View{nullptr, C * plane, plane, row, 1, h, w};
  const int64_t last = (L.B - 1) * v.stride_b + (C - 1) * v.stride_c + (h - 1) * v.stride_h + (w - 1) * v.stride_w;
  const int64_t numbers = L.B > 0 ? last + 1 : 0;
  v.data = memory.take<char>(numbers * bytes_of(L.dtype));
  return {v, numbers};
}

void fill(const ExitLoss& L, const Tensor& t) {
  for (int64_t i = 0; i < t.numbers; ++i) {
    const float x = float(uniform(-8, 8));
    uint32_t bits;
    memcpy(&bits, &x, 4);
    // Of a half, any finite bits but the largest.
    const uint16_t half = L.dtype == DType::float16 ? uint16_t(random_bits() & 0xcfff) : uint16_t(bits >> 16);
    switch (L.dtype) {
      case DType::float64: static_cast<double*>(t.view.data)[i] = x; break;
      case DType::float32: static_cast<float*>(t.view.data)[i] = x; break;
      default: static_cast<uint16_t*>(t.view.data)[i] = half;
    }
  }
}

// n numbers of A, the arithmetic's type.
void* numbers(Memory& memory, const ExitLoss& L, int64_t n, double low, double high) {
  const bool is_double = L.dtype == DType::float64;
  char* const data = memory.take<char>(n * (is_double ? 8 : 4));
  for (int64_t i = 0; i < n; ++i) {
    const double x = below(5) == 0 ? 0 : uniform(low, high);
    is_double ? void(reinterpret_cast<double*>(data)[i] = x) : void(reinterpret_cast<float*>(data)[i] = float(x));
  }
  return data;
}

template <class Label>
void* labels(Memory& memory, const ExitLoss& L) {
  Label* const data = memory.take<Label>(L.B * L.H * L.W);
  for (int64_t i = 0; i < L.B * L.H * L.W; ++i) data[i] = Label(below(6) == 0 ? L.ignore_index : below(L.C));
  return data;
}

void fail(const std::string& what) {
  fprintf(stderr, "%s\n", what.c_str());
  exit(1);
}

// One launch with 1 and with 4 threads. `large`: gradients that are written past the caches. `values`: printed.
void launch(bool large, bool values) {
  Memory memory;
  ExitLoss L{};
  L.dtype = large ? DType::float32
                  : one_of({DType::float32, DType::float32, DType::float64, DType::float16, DType::bfloat16});
  L.B = large ? 5 : below(4), L.C = large ? 9 : one_of({1, 2, 3, 4, 5, 8, 9, 19, 33});
  L.H = large ? 229 : 1 + below(40), L.W = large ? 231 : one_of({1, 2, 7, 16, 33, 64, 129});
  L.N = large ? 2 : 1 + int32_t(below(4)), L.T = large ? 1 : int32_t(below(L.N + 1));
  std::vector<int32_t> teachers(L.N);
  for (int32_t e = 0; e < L.N; ++e) teachers[e] = e;
  std::shuffle(teachers.begin(), teachers.end(), random_bits);
  L.teachers = teachers.data();
  L.target = one_of({Target::raw, Target::raw, Target::renormalized, Target::argmax});
  L.temperature = one_of({1., 2., 3., 4., 2.7});
  L.reduction = large ? Reduction::mean : one_of({Reduction::mean, Reduction::sum, Reduction::none});
  L.label_smoothing = one_of({0., .1});
  L.ignore_index = one_of({255, 100});
  L.mask_soft = sometimes(), L.align_corners = sometimes();
  L.detach_teacher = L.target == Target::argmax || sometimes();

  const int64_t pixels = L.B * L.H * L.W, entries = int64_t(L.T + 1) * L.N;
  if (large || sometimes()) {
    L.label_type = one_of({LabelType::uint8, LabelType::int32, LabelType::int64});
    L.labels = L.label_type == LabelType::uint8   ? labels<uint8_t>(memory, L)
               : L.label_type == LabelType::int32 ? labels<int32_t>(memory, L)
                                                  : labels<int64_t>(memory, L);
    if (sometimes()) L.class_weight = numbers(memory, L, L.C, .1, 2);
  }
  if (sometimes()) L.pixel_weight = numbers(memory, L, pixels, .1, 2);
  const bool maps = L.reduction == Reduction::none;
  const int64_t losses = maps ? entries * pixels : entries;
  std::vector<double> weights(entries);
  for (double& w : weights) w = uniform(-1, 2);
  if (!maps) L.total_weights = weights.data();
  if (maps || sometimes()) {
    L.grad_losses = numbers(memory, L, losses, -1, 1);
  } else {
    L.weights = weights.data();
  }

  std::vector<View> exits, grads;
  std::vector<Tensor> gradients;
  for (int e = 0; e < L.N; ++e) {
    const bool resized = !large && below(3) == 0;
    const int64_t h = resized ? 1 + below(L.H + 9) : L.H, w = resized ? 1 + below(L.W + 9) : L.W;
    const int layout = large ? 0 : int(below(3));
    const Tensor exit = tensor(memory, L, h, w, layout);
    fill(L, exit);
    exits.push_back(exit.view);
    gradients.push_back(tensor(memory, L, h, w, layout));
    grads.push_back(large || below(5) ? gradients[e].view : View{});
  }
  L.exits = exits.data(), L.grads = grads.data();
  const int64_t number = L.dtype == DType::float64 ? 8 : 4;
  L.losses = memory.take<char>(losses * number);
  L.total = memory.take<char>(number);

  std::vector<std::string> results[2];
  for (int run = 0; run < 2; ++run) {
    torch::stable::threads = run ? 4 : 1;
    for (const Tensor& g : gradients) memset(g.view.data, 0, g.numbers * bytes_of(L.dtype));
    cpu_launch(L);
    auto keep = [&](const void* data, int64_t bytes) {
      results[run].emplace_back(static_cast<const char*>(data), bytes);
    };
    keep(L.losses, losses * number);
    keep(L.total, number);
    for (const Tensor& g : gradients) keep(g.view.data, g.numbers * bytes_of(L.dtype));
  }
  if (results[0] != results[1]) fail("four threads leave other bits than one");
  for (size_t i = 0; values && i < results[0].size(); ++i) {
    // Losses and their total are of the arithmetic's type, gradients of the exits'.
    printf("%d %zu\n", int(i < 2 && L.dtype != DType::float64 ? DType::float32 : L.dtype), results[0][i].size());
    fwrite(results[0][i].data(), 1, results[0][i].size(), stdout);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  const bool values = count > 2;
  if (what == "overrun") {  // exits that are a pixel shorter than the launch says
    Memory memory;
    ExitLoss L{};
    L.B = L.H = L.T = 1, L.N = L.C = 2, L.W = 9, L.temperature = 1;
    View exits[2], grads[2] = {};
    for (View& exit : exits) {
      exit = tensor(memory, L, 1, 8, 0).view;
      exit.W = 9;
    }
    const int32_t teacher = 0;
    L.exits = exits, L.grads = grads, L.teachers = &teacher;
    L.losses = memory.take<float>(4), L.total = memory.take<float>(1);
    cpu_launch(L);
  } else if (what == "race") {  // threads that write where others read
    int64_t sum = 0;
    torch::stable::threads = 4;
    torch::stable::parallel_for(0, 4, 1, [&sum](int64_t begin, int64_t) { sum += begin; });
    printf("%d\n", int(sum));
  } else {
    if (!values) launch(true, false);
    for (int i = atoi(what.c_str()); i-- > 0;) launch(false, values);
    if (!values) printf("%s\n", cpu_isa());
  }
}

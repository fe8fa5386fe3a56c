// csrc/axis.h for tests/test_axis.py.
#include "axis.h"

// Of each position of the output: the exit's `low`, and the weight of the one after it.
extern "C" void axis(int64_t from, int64_t to, bool align_corners, int64_t* low, double* weight, int64_t* first) {
  const selfreg::Axis axis{from, to, align_corners};
  for (int64_t o = 0; o < to; ++o) low[o] = axis.low(o), weight[o] = axis.weight<double>(o, low[o]);
  for (int64_t l = 0; l < from; ++l) first[l] = axis.first(l);
}

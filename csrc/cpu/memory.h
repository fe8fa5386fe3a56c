// A worker's scratch: laid out once to count it, and again to point to it.
#pragma once

#include <stdint.h>

namespace {

struct Memory {
  char* begin;  // null: it is only counted
  int64_t used;
  template <class X>
  X* take(int64_t n) {
    char* const at = begin ? begin + used : nullptr;
    used += (n * int64_t(sizeof(X)) + 63) / 64 * 64;
    return reinterpret_cast<X*>(at);
  }
};

}  // namespace

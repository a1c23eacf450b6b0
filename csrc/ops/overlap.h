// Whether two tensors may share memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "ops/common.h"

namespace densecl::binding {

// First and last byte that a tensor's elements may touch.
inline std::pair<uintptr_t, uintptr_t> extent(const Tensor& tensor, const char* op,
                                              const char* argument) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    last += std::max<int64_t>(tensor.size(d) - 1, 0) * tensor.stride(d);
  }
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + last * element_size(dtype_of(tensor, op, argument))};
}

inline bool share_memory(const Tensor& a, const Tensor& b, const char* op) {
  const auto [a_first, a_last] = extent(a, op, "queue");
  const auto [b_first, b_last] = extent(b, op, "keys");
  return a_first <= b_last && b_first <= a_last;
}

}  // namespace densecl::binding

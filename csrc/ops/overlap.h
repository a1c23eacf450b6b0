// Which elements of tensors lie in the same memory. What cannot be told from sizes and strides is
// told by listing addresses: only odd views (interleaved slices, as_strided) come to that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "ops/common.h"

namespace densecl::binding {

// Strides and sizes of the dimensions that have several elements, smallest stride first.
inline std::vector<std::pair<int64_t, int64_t>> sorted_dims(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

// Whether the elements fill one stretch of memory without gaps or overlaps.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  int64_t expected = 1;
  for (const auto& [stride, size] : sorted_dims(tensor)) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// First byte of every element, in ascending order.
inline std::vector<uintptr_t> addresses(const Tensor& tensor) {
  std::vector<uintptr_t> found = {reinterpret_cast<uintptr_t>(tensor.const_data_ptr())};
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    const uintptr_t step = tensor.stride(d) * tensor.element_size();
    const size_t count = found.size();
    found.reserve(count * tensor.size(d));
    if (tensor.size(d) == 0) return {};
    for (int64_t i = 1; i < tensor.size(d); ++i) {
      for (size_t k = 0; k < count; ++k) found.push_back(found[k] + i * step);
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

// Whether no two elements share a place, so that each can be written.
inline bool has_own_places(const Tensor& tensor) {
  if (tensor.is_contiguous() || tensor.numel() == 0) return true;
  int64_t reach = 0;
  bool nested = true;
  for (const auto& [stride, size] : sorted_dims(tensor)) {
    if (stride == 0) return false;
    nested = nested && stride > reach;
    reach += (size - 1) * stride;
  }
  if (nested) return true;
  const std::vector<uintptr_t> places = addresses(tensor);
  return std::adjacent_find(places.begin(), places.end()) == places.end();
}

// The bytes from the first element to behind the last, gaps included.
struct Extent {
  uintptr_t begin, end;

  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

inline Extent extent(const Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const int64_t count = tensor.numel();
  if (count == 0) return {begin, begin};
  int64_t last = count - 1;
  if (!tensor.is_contiguous()) {
    last = 0;
    for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  }
  return {begin, begin + (last + 1) * tensor.element_size()};
}

inline bool share_memory(const Tensor& a, const Tensor& b) {
  if (!extent(a).meets(extent(b))) return false;
  if (is_dense(a) && is_dense(b)) return true;
  const std::vector<uintptr_t> in_a = addresses(a), in_b = addresses(b);
  const uintptr_t a_size = a.element_size(), b_size = b.element_size();
  for (size_t i = 0, k = 0; i < in_a.size() && k < in_b.size();) {
    if (in_a[i] + a_size <= in_b[k]) {
      ++i;
    } else if (in_b[k] + b_size <= in_a[i]) {
      ++k;
    } else {
      return true;
    }
  }
  return false;
}

}  // namespace densecl::binding

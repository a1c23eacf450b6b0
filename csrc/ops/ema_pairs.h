// The tensors of ema_update_ as the kernels' pairs, the same for every device.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "densecl/ema.h"
#include "ops/common.h"

namespace densecl::binding {

// Whether the elements fill one stretch of memory without gaps or overlaps.
inline bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool is_expanded(const Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1 && tensor.stride(d) == 0) return true;
  }
  return false;
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// A momentum that lies on the device, to be read there.
inline const double* scheduled_momentum(const Tensor& momentum, const char* op) {
  STD_TORCH_CHECK(momentum.scalar_type() == ScalarType::Double && momentum.numel() == 1, op,
                  ": momentum must be one float64 element");
  return static_cast<const double*>(momentum.const_data_ptr());
}

// Targets and sources as stretches of memory in the same order. Tensors that are none get
// contiguous stand-ins, which copy_back() writes to the targets after the update.
class EmaPairs {
 public:
  EmaPairs(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources, const char* op) {
    STD_TORCH_CHECK(targets.size() == sources.size(), op, ": targets and sources differ in length");
    pairs_.reserve(targets.size());
    for (size_t i = 0; i < targets.size(); ++i) {
      Tensor target = targets[i], source = sources[i];
      STD_TORCH_CHECK(std::ranges::equal(target.sizes(), source.sizes()), op, ": targets[", i,
                      "] and sources[", i, "] differ in shape");
      if (target.numel() == 0) continue;
      if (!is_dense(target) || !same_layout(target, source)) {
        STD_TORCH_CHECK(!is_expanded(target), op, ": targets[", i,
                        "] keeps several elements in one place");
        Tensor stand_in = torch::stable::contiguous(target);
        source = torch::stable::contiguous(source);
        if (stand_in.const_data_ptr() != target.const_data_ptr()) {
          to_copy_back_.emplace_back(target, stand_in);
        }
        target = stand_in;
      }
      kept_alive_.push_back(target);
      kept_alive_.push_back(source);
      pairs_.push_back({target.data_ptr(), source.const_data_ptr(), dtype_of(target, op, "targets"),
                        dtype_of(source, op, "sources"), target.numel()});
    }
  }

  const EmaPair* data() const { return pairs_.data(); }
  int64_t size() const { return static_cast<int64_t>(pairs_.size()); }
  void copy_back() {
    for (auto& [target, stand_in] : to_copy_back_) torch::stable::copy_(target, stand_in);
  }

 private:
  std::vector<EmaPair> pairs_;
  std::vector<Tensor> kept_alive_;
  std::vector<std::pair<Tensor, Tensor>> to_copy_back_;  // (target, its contiguous stand-in)
};

}  // namespace densecl::binding

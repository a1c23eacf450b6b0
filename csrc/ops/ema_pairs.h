// The tensors of ema_update_ as the kernels' pairs, the same for every device.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "densecl/ema.h"
#include "ops/overlap.h"

namespace densecl::binding {

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

inline void check_momentum(double momentum, const char* op) {
  STD_TORCH_CHECK(momentum >= 0.0 && momentum <= 1.0, op, ": momentum must lie in [0, 1], got ",
                  momentum);
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
  EmaPairs(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources,
           const std::optional<Tensor>& scheduled, const char* op) {
    STD_TORCH_CHECK(targets.size() == sources.size(), op, ": targets and sources differ in length");
    pairs_.reserve(targets.size());
    kept_alive_.reserve(2 * targets.size());
    uses_.reserve(2 * targets.size() + 1);
    for (size_t i = 0; i < targets.size(); ++i) {
      Tensor target = targets[i], source = sources[i];
      const DType target_dtype = dtype_of(target, op, "every target");
      const DType source_dtype = dtype_of(source, op, "every source");
      STD_TORCH_CHECK(std::ranges::equal(target.sizes(), source.sizes()), op, ": targets[", i,
                      "] and sources[", i, "] differ in shape");
      const int64_t count = target.numel();
      if (count == 0) continue;
      uses_.push_back({extent(target), &targets[i], i, true});
      uses_.push_back({extent(source), &sources[i], i, false});
      const bool contiguous = target.is_contiguous() && source.is_contiguous();
      if (!contiguous && (!is_dense(target) || !same_layout(target, source))) {
        STD_TORCH_CHECK(has_own_places(target), op, ": targets[", i,
                        "] keeps several elements in one place");
        Tensor stand_in = torch::stable::contiguous(target);
        source = torch::stable::contiguous(source);
        if (stand_in.const_data_ptr() != target.const_data_ptr()) {
          to_copy_back_.emplace_back(target, stand_in);
        }
        target = stand_in;
      }
      pairs_.push_back(
          {target.data_ptr(), source.const_data_ptr(), target_dtype, source_dtype, count});
      kept_alive_.push_back(std::move(target));
      kept_alive_.push_back(std::move(source));
    }
    if (scheduled.has_value()) uses_.push_back({extent(*scheduled), &*scheduled, 0, false, true});
    check_aliases(op);
  }

  const EmaPair* data() const { return pairs_.data(); }
  int64_t size() const { return static_cast<int64_t>(pairs_.size()); }
  void copy_back() {
    for (auto& [target, stand_in] : to_copy_back_) torch::stable::copy_(target, stand_in);
  }

 private:
  struct Use {
    Extent bytes;
    const Tensor* tensor;
    size_t pair;
    bool is_target;
    bool is_momentum = false;

    std::string name() const {
      if (is_momentum) return "momentum";
      return (is_target ? "targets[" : "sources[") + std::to_string(pair) + "]";
    }
  };

  // Elements are updated in any order and by many threads: what is written must be nobody else's.
  // A target that is its own source is none the worse for it.
  void check_aliases(const char* op) {
    const auto earlier = [](const Use& a, const Use& b) { return a.bytes.begin < b.bytes.begin; };
    std::sort(uses_.begin(), uses_.end(), earlier);
    for (size_t i = 0; i < uses_.size(); ++i) {
      for (size_t k = i + 1; k < uses_.size() && uses_[k].bytes.begin < uses_[i].bytes.end; ++k) {
        const Use &a = uses_[i], &b = uses_[k];
        if (!a.is_target && !b.is_target) continue;
        const bool own_source = a.pair == b.pair && !a.is_momentum && !b.is_momentum;
        if (own_source && a.bytes.begin == b.bytes.begin && a.bytes.end == b.bytes.end &&
            a.tensor->scalar_type() == b.tensor->scalar_type() &&
            same_layout(*a.tensor, *b.tensor)) {
          continue;
        }
        const Use &target = a.is_target ? a : b, &other = a.is_target ? b : a;
        STD_TORCH_CHECK(!share_memory(*a.tensor, *b.tensor), op, ": ", target.name(),
                        " must not share memory with ", other.name(),
                        "; pass each tensor once, or "
                        "a clone");
      }
    }
  }

  std::vector<EmaPair> pairs_;
  std::vector<Tensor> kept_alive_;
  std::vector<Use> uses_;
  std::vector<std::pair<Tensor, Tensor>> to_copy_back_;  // (target, its contiguous stand-in)
};

}  // namespace densecl::binding

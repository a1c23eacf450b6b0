// What every CUDA binding needs beyond ops/common.h: the device, its current stream, failed
// launches.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "densecl/cuda/launch.h"
#include "ops/common.h"

namespace densecl::binding {

// Makes a tensor's device the current one for as long as it lives, and knows its current stream.
class OnDeviceOf {
 public:
  OnDeviceOf(const Tensor& tensor, const char* op, const char* argument)
      : index_(checked_index(tensor, op, argument)), guard_(index_) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }

  cuda::Stream stream() const { return stream_; }

  void require(const Tensor& tensor, const char* op, const char* argument) const {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == index_, op, ": ", argument,
                    " must be on device cuda:", index_);
  }

 private:
  static int32_t checked_index(const Tensor& tensor, const char* op, const char* argument) {
    STD_TORCH_CHECK(tensor.is_cuda(), op, ": ", argument, " must be a CUDA tensor");
    return tensor.get_device_index();
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

inline void check_launch(Status status, const char* op) {
  if (cuda::is_launch_failure(status)) {
    const cuda::LaunchError error = cuda::launch_error(status);
    STD_TORCH_CHECK(false, op, ": the CUDA launch failed with ", error.name, ": ", error.text);
  }
  check(status, op);
}

}  // namespace densecl::binding

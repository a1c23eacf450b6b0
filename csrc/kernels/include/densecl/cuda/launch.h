// What every CUDA entry point shares: the stream's type, the device's limits, failed launches.
#pragma once

#include <cstdint>

#include "densecl/types.h"

namespace densecl::cuda {

using Stream = void*;  // a cudaStream_t, spelled so that no CUDA header is needed

// What the planners need to know of a device.
struct DeviceLimits {
  int compute_capability;  // 90 for 9.0
  int multiprocessors;
  int shared_bytes;  // dynamic shared memory that one block may ask for
};

// A launch that the driver refused: Status::launch_failed plus the cudaError_t.
inline Status launch_failure(int error) {
  return static_cast<Status>(static_cast<int32_t>(Status::launch_failed) + error);
}
inline bool is_launch_failure(Status status) { return status >= Status::launch_failed; }

// "cudaErrorInvalidConfiguration: invalid configuration argument"
struct LaunchError {
  const char* name;
  const char* text;
};
LaunchError launch_error(Status status);

}  // namespace densecl::cuda

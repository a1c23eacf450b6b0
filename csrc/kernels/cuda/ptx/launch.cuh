// Launching a kernel: one helper, so that the emulator can stand in for it.
#pragma once

#include <ptx/device.cuh>

#include "densecl/cuda/launch.h"
#include "densecl/types.h"

namespace densecl::cuda {

struct LaunchShape {
  dim3 blocks;
  dim3 threads;
  int64_t shared_bytes = 0;
  // Programmatic dependent launch: blocks may start when those of the previous kernel have called
  // let_next_start() or ended, and call wait_for_previous() before they touch its results. At least
  // one thread of the grid must, so that this kernel's end is the end of those before it as well.
  // Without effect where the code that runs was compiled for less than 9.0.
  bool overlaps_previous = false;
  // All blocks run at once and may meet (ptx/grid.cuh); refused where they do not fit.
  bool cooperative = false;
};

inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? Status::ok : launch_failure(static_cast<int>(error));
}

// Of the current device. Three attribute queries: fractions of a microsecond, legal while a stream
// is captured. shared_bytes stays 0 where the driver fails, which every planner refuses.
inline DeviceLimits device_limits() {
  DeviceLimits limits{};
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return limits;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.compute_capability = 10 * major + minor;
  return limits;
}

// Whether the code that this device runs for a kernel holds griddepcontrol. The device's compute
// capability does not tell: newer ones may run what the driver translated from PTX of 8.0.
template <class Kernel>
bool can_wait_for_previous(Kernel* kernel) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

// The default limit; more must be asked for, once per kernel and device.
constexpr int64_t plain_shared_bytes = 48 * 1024;

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
              Arguments&&... arguments) {
  if (shape.shared_bytes > plain_shared_bytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return status_of(error);
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (shape.overlaps_previous && can_wait_for_previous(kernel)) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error =
      cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
  // Clears the error, so that the next library's check does not report this one.
  if (error != cudaSuccess) cudaGetLastError();
  return status_of(error);
}

}  // namespace densecl::cuda

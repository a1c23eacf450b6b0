// Launching a kernel: one helper, so that the emulator can stand in for it.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include <ptx/device.cuh>

#include "cuda/switches.h"
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
};

inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? Status::ok : launch_failure(static_cast<int>(error));
}

// What the driver said of the current device; legal while a stream is captured. shared_bytes is 0
// where it fails, which every planner refuses.
inline DeviceLimits device_limits() {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return {};
  const std::lock_guard<std::mutex> lock(mutex);
  DeviceLimits& limits = known[device];
  if (limits.shared_bytes > 0 && queries_cached()) return limits;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.compute_capability = 10 * major + minor;
  return limits;
}

// What was settled with the driver about a kernel on the current device.
struct KernelState {
  int64_t shared_bytes = 48 * 1024;  // that a block may have; more must be asked for
  // Of the code that runs, 90 and up where it holds griddepcontrol. The device's compute capability
  // does not tell: newer ones may run what the driver translated from PTX of 8.0.
  int ptx_version = 0;
};
inline cudaError_t ready_kernel(const void* kernel, int64_t shared_bytes, KernelState* ready) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, KernelState> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  KernelState& state = known[{kernel, device}];
  if (!queries_cached()) state = {};
  if (state.ptx_version == 0) {
    cudaFuncAttributes attributes{};
    error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    state.ptx_version = attributes.ptxVersion;
  }
  if (shared_bytes > state.shared_bytes) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
    state.shared_bytes = shared_bytes;
  }
  *ready = state;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, Stream stream,
              Arguments&&... arguments) {
  KernelState state;
  cudaError_t error =
      ready_kernel(reinterpret_cast<const void*>(kernel), shape.shared_bytes, &state);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return status_of(error);
  }
  cudaLaunchAttribute attributes[1]{};
  unsigned count = 0;
  if (shape.overlaps_previous && state.ptx_version >= 90 && overlap_allowed()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  error = cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
  // Clears the error, so that the next library's check does not report this one.
  if (error != cudaSuccess) cudaGetLastError();
  return status_of(error);
}

}  // namespace densecl::cuda

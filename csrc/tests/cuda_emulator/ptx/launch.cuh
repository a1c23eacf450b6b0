// Twin of cuda/ptx/launch.cuh.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <tuple>

#include <ptx/device.cuh>

#include "cuda/switches.h"
#include "densecl/cuda/launch.h"
#include "densecl/types.h"

namespace densecl::cuda {

struct LaunchShape {
  dim3 blocks;
  dim3 threads;
  int64_t shared_bytes = 0;
  bool overlaps_previous = false;  // from compute capability 9.0
};

inline DeviceLimits device_limits() {
  const emulator::Schedule& told = emulator::schedule();
  const int shared = told.compute_capability >= 90 ? 232448 : 166912;
  return {told.compute_capability, told.multiprocessors, shared};
}

using cudaError_t = int;
inline const char* cudaGetErrorName(int) { return "emulated"; }
inline const char* cudaGetErrorString(int) { return "the emulator throws instead"; }

template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const LaunchShape& shape, void*,
              Arguments&&... arguments) {
  constexpr std::size_t parameter_bytes = (std::size_t{0} + ... + sizeof(Parameters));
  static_assert(parameter_bytes <= 32764, "more than a kernel's parameters may hold");
  const auto wrong = [](const char* what) { throw std::runtime_error(what); };
  const dim3 &b = shape.blocks, &t = shape.threads;
  if (!b.x || !b.y || !b.z || !t.x || !t.y || !t.z) wrong("launch: an empty grid or block");
  if (b.x > 0x7fffffffu || b.y > 65535 || b.z > 65535) wrong("launch: grid too large");
  if (t.x * t.y * t.z > 1024 || t.z > 64) wrong("launch: block too large");
  if (shape.shared_bytes > device_limits().shared_bytes) wrong("launch: too much shared memory");
  const std::tuple<Parameters...> values(static_cast<Arguments&&>(arguments)...);
  emulator::run(
      {{b.x, b.y, b.z},
       {t.x, t.y, t.z},
       static_cast<std::size_t>(shape.shared_bytes),
       shape.overlaps_previous && device_limits().compute_capability >= 90 && overlap_allowed()},
      [kernel, values] { std::apply(kernel, values); });
  return Status::ok;
}

}  // namespace densecl::cuda

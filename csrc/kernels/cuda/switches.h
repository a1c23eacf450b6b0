// Environment variables that change how kernels are launched and never what they compute, so that
// one build measures both ways. Read at every launch.
#pragma once

#include <cstdlib>
#include <cstring>

namespace densecl::cuda {

inline bool switched_off(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr && std::strcmp(value, "0") == 0;
}

// DENSECL_CUDA_PDL=0: no launch starts before the one before it has ended.
inline bool overlap_allowed() { return !switched_off("DENSECL_CUDA_PDL"); }
// DENSECL_CUDA_CACHE=0: what the driver says of a kernel or a device is asked for at every launch.
inline bool queries_cached() { return !switched_off("DENSECL_CUDA_CACHE"); }

}  // namespace densecl::cuda

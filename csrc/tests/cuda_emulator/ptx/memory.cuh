// Twin of cuda/ptx/memory.cuh.
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

inline uint4 load_once(const void* p, DENSECL_WHERE) {
  emulator::check_aligned(p, 16, "ld.global.v4", where);
  return *static_cast<const uint4*>(p);
}
inline uint2 load_once_8(const void* p, DENSECL_WHERE) {
  emulator::check_aligned(p, 8, "ld.global.v2", where);
  return *static_cast<const uint2*>(p);
}
inline uint4 load_constant_once(const void* p, DENSECL_WHERE) {
  emulator::check_aligned(p, 16, "ld.global.nc.v4", where);
  return *static_cast<const uint4*>(p);
}
inline void store_16(void* p, uint4 v, DENSECL_WHERE) {
  emulator::check_aligned(p, 16, "st.global.v4", where);
  *static_cast<uint4*>(p) = v;
}
inline void store_8(void* p, uint2 v, DENSECL_WHERE) {
  emulator::check_aligned(p, 8, "st.global.v2", where);
  *static_cast<uint2*>(p) = v;
}

// Yields, so that a loop around it sees what others write.
inline uint32_t load_acquire(const uint32_t* p) {
  emulator::yield();
  const uint32_t value = std::atomic_ref<uint32_t>(const_cast<uint32_t&>(*p)).load();
  emulator::observe(p);
  return value;
}
inline void store_release(uint32_t* p, uint32_t v) {
  emulator::publish(p);
  std::atomic_ref<uint32_t>(*p).store(v);
  emulator::maybe_yield();
}

}  // namespace densecl::cuda

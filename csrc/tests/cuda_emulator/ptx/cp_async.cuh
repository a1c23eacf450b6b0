// Twin of cuda/ptx/cp_async.cuh: the destination holds NaN until the wait, so a missing wait shows.
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

template <int bytes>
void copy_async(void* to, const void* from, int valid = bytes, DENSECL_WHERE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  emulator::copy_async(to, from, bytes, valid, where);
}

inline void commit_copies() { emulator::commit_copies(); }

template <int left>
void wait_copies() {
  emulator::wait_copies(left);
}

}  // namespace densecl::cuda

// Twin of cuda/ptx/barrier.cuh.
#pragma once

#include <ptx/device.cuh>

#include "cuda_emulator/race.h"

namespace densecl::cuda {

inline void barrier_wait(int id, int threads, DENSECL_WHERE) {
  emulator::block_barrier(id, threads, true, "bar.sync", where);
}
inline void barrier_arrive(int id, int threads, DENSECL_WHERE) {
  emulator::block_barrier(id, threads, false, "bar.arrive", where);
}

// For threads that start at a multiple of their number.
inline bool barrier_any(int, int threads, bool predicate, DENSECL_WHERE) {
  const emulator::Unwatched unwatched;
  const int first = emulator::thread_in_block() / threads * threads;
  if (void** members = emulator::meet(first, threads, 0, &predicate, "barrier.red.or", where)) {
    bool any = false;
    for (int i = 0; i < threads; ++i) any = any || *static_cast<bool*>(members[i]);
    for (int i = 0; i < threads; ++i) *static_cast<bool*>(members[i]) = any;
    emulator::release();
  }
  return predicate;
}

}  // namespace densecl::cuda

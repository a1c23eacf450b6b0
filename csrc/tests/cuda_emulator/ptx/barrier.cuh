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

inline bool barrier_any(int id, int threads, bool predicate, DENSECL_WHERE) {
  return emulator::block_barrier(id, threads, true, "bar.red.or", where, predicate);
}

}  // namespace densecl::cuda

// Twin of cuda/ptx/barrier.cuh.
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

inline void barrier_wait(int id, int threads, DENSECL_WHERE) {
  emulator::block_barrier(id, threads, true, "bar.sync", where);
}
inline void barrier_arrive(int id, int threads, DENSECL_WHERE) {
  emulator::block_barrier(id, threads, false, "bar.arrive", where);
}

}  // namespace densecl::cuda

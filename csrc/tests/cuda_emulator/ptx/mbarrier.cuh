// Twin of cuda/ptx/mbarrier.cuh.
#pragma once

#include <map>

#include <ptx/device.cuh>

#include "cuda_emulator/race.h"

namespace densecl::cuda {

using Barrier = uint64_t;

}  // namespace densecl::cuda

namespace densecl::emulator {

// What the 64 bits hold here.
struct BarrierState {
  uint16_t expected, pending;
  int32_t bytes_and_phase;  // bytes still to come, shifted left; bit 0: parity of the current phase
};

inline BarrierState& state_of(cuda::Barrier* barrier, const char* what, Where where) {
  check_shared(barrier, sizeof(cuda::Barrier), 8, what, where);
  return *reinterpret_cast<BarrierState*>(barrier);
}

// Barriers whose opening asynchronous copies cannot know of, with the thread that opened them.
inline std::map<const cuda::Barrier*, int>& unpublished() {
  static std::map<const cuda::Barrier*, int> all;
  static int launch = 0;
  if (launch != launches()) all.clear();  // what a launch that failed left behind
  launch = launches();
  return all;
}

// As an asynchronous copy begins.
inline void check_copy_barrier(cuda::Barrier* barrier, const char* what, Where where) {
  state_of(barrier, what, where);
  if (unpublished().contains(barrier)) {
    fail(std::string(what) + ": the barrier was opened without fence.mbarrier_init", where);
  }
}

inline void end_phase_if_complete(BarrierState& state) {
  if (state.pending != 0 || state.bytes_and_phase >> 1 != 0) return;
  state.pending = state.expected;
  state.bytes_and_phase ^= 1;
}

inline void bytes_came(cuda::Barrier* barrier, int bytes) {
  BarrierState& state = *reinterpret_cast<BarrierState*>(barrier);
  state.bytes_and_phase -= 2 * bytes;
  end_phase_if_complete(state);
}

inline void arrive_at(cuda::Barrier* barrier, int bytes, const char* what, Where where) {
  const Unwatched unwatched;
  publish(barrier);
  maybe_yield();
  BarrierState& state = state_of(barrier, what, where);
  if (state.pending == 0 || state.pending > state.expected) {
    fail(std::string(what) + ": more arrivals than the barrier counts, or it was never opened",
         where);
  }
  state.bytes_and_phase += 2 * bytes;
  --state.pending;
  end_phase_if_complete(state);
}

}  // namespace densecl::emulator

namespace densecl::cuda {

inline void open_barrier(Barrier* barrier, int arrivals, DENSECL_WHERE) {
  const emulator::Unwatched unwatched;
  const auto count = static_cast<uint16_t>(arrivals);
  emulator::state_of(barrier, "mbarrier.init", where) = {count, count, 0};
  emulator::unpublished()[barrier] = emulator::thread_in_block();
}
inline void fence_barrier_init() {
  const emulator::Unwatched unwatched;
  const auto* begin = reinterpret_cast<const Barrier*>(emulator::shared());
  const auto* end = reinterpret_cast<const Barrier*>(emulator::shared() + emulator::shared_bytes());
  std::erase_if(emulator::unpublished(), [&](const auto& opened) {
    return opened.first >= begin && opened.first < end &&
           opened.second == emulator::thread_in_block();
  });
}

inline void arrive(Barrier* barrier, DENSECL_WHERE) {
  emulator::arrive_at(barrier, 0, "mbarrier.arrive", where);
}
inline void arrive_expecting(Barrier* barrier, int bytes, DENSECL_WHERE) {
  emulator::arrive_at(barrier, bytes, "mbarrier.arrive.expect_tx", where);
}
inline void wait_for(Barrier* barrier, int parity, DENSECL_WHERE) {
  const emulator::Unwatched unwatched;
  const emulator::BarrierState& state = emulator::state_of(barrier, "mbarrier.try_wait", where);
  emulator::wait_until([&] { return (state.bytes_and_phase & 1) != parity; }, "mbarrier.try_wait",
                       where);
  emulator::observe(barrier);
}

}  // namespace densecl::cuda

// Runs CUDA kernels on the CPU: one fiber per CUDA thread, several blocks interleaved, in an order
// that a seed decides. README.md says how to use it; this is what the twins of the PTX wrappers are
// made of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

#include "cuda_emulator/race.h"

namespace densecl::emulator {

using Where = std::source_location;

// ---- for tests
// ------------------------------------------------------------------------------------

// How the next launches run. Every order is one that a GPU may choose.
struct Schedule {
  unsigned seed = 1;        // 0: threads and blocks in their natural order
  int blocks_at_once = 3;   // blocks whose threads are interleaved
  int multiprocessors = 4;  // what the kernels' planners are told
  int compute_capability = 80;
};
Schedule& schedule();

// Runs body under several schedules; a failure's trace names the one.
void for_each_schedule(const std::function<void(const Schedule&)>& body);

int launches();  // so far, so that a test can count them

// Lets launches end that still wait for a next one to start beside them: a kernel that calls
// let_next_start() is held there, unfinished, until the next launch or this. A test that reads
// results behind such a kernel calls it first; one that ends without has failed.
void synchronize();

// ---- for launch()
// ---------------------------------------------------------------------------------

struct Grid {
  unsigned blocks[3];
  unsigned threads[3];
  std::size_t shared_bytes;
  bool overlaps_previous = false;  // may start as soon as the previous launch's blocks let it
};

// Runs the kernel for every thread. Throws std::runtime_error with what the kernel did wrong.
// Where it may overlap the previous one, its blocks go as far as they can before that goes on.
void run(const Grid& grid, std::function<void()> kernel);

// ---- for the twins, inside a kernel
// ---------------------------------------------------------------

// Ends the launch with an error: what, in which block and thread, where.
[[noreturn]] void fail(const std::string& what, Where where);

int thread_in_block();
int threads_in_block();

// The block's dynamic shared memory, filled with NaN at the block's start.
unsigned char* shared();
std::size_t shared_bytes();
// Fails unless [p, p + bytes) lies in it and p is aligned.
void check_shared(const void* p, std::size_t bytes, std::size_t alignment, const char* what,
                  Where where);
void check_aligned(const void* p, std::size_t alignment, const char* what, Where where);

// Fills memory with bytes that are a NaN in every type.
void poison(void* p, std::size_t bytes);

// What the asynchronous proxy (wgmma, bulk copies) sees of p in shared memory: copies as they come,
// and ordinary writes as of the last fence, which is any thread's and of all of them.
unsigned char* async_view(const void* p);
void fence_proxy_async();

// Lets other threads run.
void yield();
// Perhaps; the schedule decides. For places after which threads' order can matter.
void maybe_yield();

// Waits until condition() holds. what and where appear in the report of a deadlock.
void wait_until(const std::function<bool()>& condition, const char* what, Where where);

// Memory order (what ThreadSanitizer learns): after a fence, an atomic publishes what its thread
// wrote; a fence after an atomic lets its thread see what others published there.
void fence();
void before_atomic(const volatile void* address);
void after_atomic(const volatile void* address);

// Does action some time later, as an asynchronous unit of the chip would; at the latest when
// nothing else can go on. A block must not end before.
void later(std::function<void()> action);

// All threads of [first, first + count), or those of a warp that are in mask, meet. Returns the
// members' `mine` pointers, by position in the group, to the one that came last: it computes and
// then calls release(). The others get null, after the release.
// ordered: as __syncwarp, what members wrote before is seen by all after.
void** meet(int first, int count, std::uint32_t mask, void* mine, const char* what, Where where,
            bool ordered = false);
void release();

template <class Lane, class Compute>
void warp_collective(std::uint32_t mask, Lane& mine, const char* what, Where where,
                     Compute&& compute) {
  const int first = thread_in_block() / 32 * 32;
  if (void** lanes = meet(first, 32, mask, &mine, what, where)) {
    const Unwatched unwatched;
    compute(reinterpret_cast<Lane**>(lanes));
    release();
  }
}

// Barrier 0 waits for the whole block at one place; others count up to `threads`, whole warps,
// which may arrive at different places. wait = false only arrives; who waits is told whether any of
// them held the predicate.
bool block_barrier(int id, int threads, bool wait, const char* what, Where where,
                   bool predicate = false);

// griddepcontrol: waits for the previous launch's end and sees what it wrote; lets the next start.
void wait_for_previous(Where where);
void let_next_start();

// Asynchronous copies of this thread (cp.async): taken at issue, written by the wait.
void copy_async(void* shared, const void* global, int bytes, int bytes_read, Where where);
void commit_copies();
void wait_copies(int groups_left);

}  // namespace densecl::emulator

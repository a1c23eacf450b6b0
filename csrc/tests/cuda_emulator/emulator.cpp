#include "cuda_emulator/emulator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "cuda_emulator/fiber.h"
#include "cuda_emulator/ptx/device.cuh"

namespace densecl::emulator {
namespace {

struct Copy {
  void* to;
  std::array<unsigned char, 16> content;
  int bytes;
};

struct Block;

struct Thread {
  Context context;
  Block* block = nullptr;
  int index = 0;
  bool lazy = false;  // runs when no other thread can, and now and then
  enum State { ready, waiting, ended } state = ready;
  const std::function<bool()>* condition = nullptr;  // polled while waiting; null: woken by another
  const char* what = "";
  Where where;
  std::deque<std::vector<Copy>> copy_groups;  // committed, oldest first
  std::vector<Copy> copies;                   // not yet committed
  bool fenced = false;                        // since the last barrier
  std::vector<const volatile void*> touched;  // by atomics, since the last fence
};

// Threads that meet for one instruction.
struct Meeting {
  int first, count;
  uint32_t mask;
  int arrived = 0, expected;
  const char* what;
  Where where;
  const void* key = new_key();
  std::vector<Thread*> threads;
  std::array<void*, 256> members{};
};

struct Barrier {
  int arrived = 0, expected = 0;
  const char* what = "";
  Where where;
  std::map<int, int> lanes;  // that arrived, by warp
  std::shared_ptr<bool> any = std::make_shared<bool>(false);
  const void* key = new_key();
  std::vector<Thread*> waiting;
};

struct Block {
  dim3 index;
  std::unique_ptr<unsigned char[]> shared;
  std::vector<unsigned char> async_view;  // of shared, once it is asked for
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> order;
  int ended = 0;
  bool lets_next_start = false;
  std::vector<std::unique_ptr<Meeting>> meetings;
  std::map<int, Barrier> barriers;
};

struct Action {
  int delay;
  const Block* block;
  std::function<void()> run;
};

struct Launch {
  Grid grid;
  std::function<void()> kernel;
  Launch* previous = nullptr;            // until it has ended
  const void* ended_previous = nullptr;  // its key
  bool waited = false;                   // one of its threads, for the previous launch
  std::vector<unsigned> numbers;         // of blocks, in the order in which they start
  std::size_t started = 0;
  std::mt19937 random;
  bool shuffled;
  Context host;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<unsigned char*> used_shared;  // of ended blocks: two blocks must not look like one
  std::vector<Action> actions;
  const void *begun = new_key(), *ended = new_key();
  Thread* running = nullptr;
  Meeting* met = nullptr;  // the meeting whose last member runs
  std::string error;
  bool abandoned = false;  // threads unwind when they are continued
};

struct Abandoned {};

std::vector<std::unique_ptr<Launch>> in_flight;  // oldest first
Launch* current = nullptr;                       // whose thread runs
int launch_count = 0;
Schedule chosen;

std::string place(const Where& where) {
  std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string name_of(const Thread& thread) {
  std::ostringstream out;
  const dim3& b = thread.block->index;
  out << "block (" << b.x << ", " << b.y << ", " << b.z << "), thread " << thread.index;
  return out.str();
}

void switch_to_host() {
  switch_fiber(current->running->context, current->host);
  if (current->abandoned) throw Abandoned{};
}

void run_kernel(Thread& thread) {
  observe(current->begun);
  const std::function<void()>& kernel = current->kernel;
  {
    const Watched watched;
    kernel();
  }
  for (const std::vector<Copy>& group : thread.copy_groups) {
    if (!group.empty()) fail("ended with cp.async copies that nobody waited for", Where::current());
  }
  if (!thread.copies.empty()) fail("ended with uncommitted cp.async copies", Where::current());
}

// Never returns, so ThreadSanitizer must not count the call.
#if defined(__SANITIZE_THREAD__)
__attribute__((no_sanitize("thread")))
#endif
void thread_entry() {
  fiber_began();
  const Unwatched unwatched;
  Thread& thread = *current->running;
  try {
    if (!current->abandoned) run_kernel(thread);
  } catch (const Abandoned&) {
  } catch (const std::exception& error) {
    current->error = name_of(thread) + ": " + error.what();
  }
  thread.state = Thread::ended;
  ++thread.block->ended;
  publish(current->ended);
  ignore_end();
  switch_fiber(thread.context, current->host, true);
  __builtin_unreachable();
}

void resume(Thread& thread) {
  current->running = &thread;
  const dim3 threads(current->grid.threads[0], current->grid.threads[1], current->grid.threads[2]);
  const unsigned t = static_cast<unsigned>(thread.index);
  threadIdx = {t % threads.x, t / threads.x % threads.y, t / (threads.x * threads.y)};
  blockIdx = {thread.block->index.x, thread.block->index.y, thread.block->index.z};
  switch_fiber(current->host, thread.context);
  current->running = nullptr;
}

bool runnable(Thread& thread) {
  if (thread.state == Thread::waiting && thread.condition != nullptr && (*thread.condition)()) {
    thread.condition = nullptr;
    thread.state = Thread::ready;
  }
  return thread.state == Thread::ready;
}

void sleep_until_woken(const char* what, Where where) {
  Thread& thread = *current->running;
  thread.state = Thread::waiting;
  thread.what = what;
  thread.where = where;
  switch_to_host();
}

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t guard_bytes = 0;  // AddressSanitizer has its own
#else
constexpr std::size_t guard_bytes = 64;
#endif
constexpr unsigned char guard_pattern = 0xc3;

std::unique_ptr<Block> open_block(unsigned number) {
  const Grid& grid = current->grid;
  auto block = std::make_unique<Block>();
  block->index = dim3(number % grid.blocks[0], number / grid.blocks[0] % grid.blocks[1],
                      number / (grid.blocks[0] * grid.blocks[1]));
  const int count = static_cast<int>(grid.threads[0] * grid.threads[1] * grid.threads[2]);
  // Aligned as the hardware has it, with a zone behind that shows writes past the end.
  block->shared.reset(static_cast<unsigned char*>(
      ::operator new[](grid.shared_bytes + guard_bytes, std::align_val_t{1024})));
  poison(block->shared.get(), grid.shared_bytes);
  std::memset(block->shared.get() + grid.shared_bytes, guard_pattern, guard_bytes);
  const bool lazy_threads = current->shuffled && chosen.seed % 2 == 0;
  const bool lazy_block = current->shuffled && !lazy_threads && current->random() % 3 == 0;
  for (int i = 0; i < count; ++i) {
    auto thread = std::make_unique<Thread>();
    thread->block = block.get();
    thread->index = i;
    thread->lazy = lazy_block || (lazy_threads && current->random() % 8 == 0);
    open_fiber(thread->context, &thread_entry);
    block->order.push_back(thread.get());
    block->threads.push_back(std::move(thread));
  }
  return block;
}

void close_block(Block& block) {
  const unsigned char* guard = block.shared.get() + current->grid.shared_bytes;
  for (std::size_t i = 0; i < guard_bytes && current->error.empty(); ++i) {
    if (guard[i] != guard_pattern) {
      current->error = name_of(*block.threads[0]) + ": wrote " + std::to_string(i) +
                       " bytes past the dynamic shared memory";
    }
  }
  for (auto& thread : block.threads) close_fiber(thread->context);
  current->used_shared.push_back(block.shared.release());
}

// Threads that cannot go on: what they wait for, how many, and one of them.
std::string deadlock() {
  std::map<std::string, std::pair<int, const Thread*>> groups;
  int ended = 0;
  for (const auto& launch : in_flight) {
    for (const auto& block : launch->blocks) {
      for (const auto& thread : block->threads) {
        if (thread->state == Thread::ended) {
          ++ended;
          continue;
        }
        auto& [count, first] = groups[std::string(thread->what) + " at " + place(thread->where)];
        if (count++ == 0) first = thread.get();
      }
    }
  }
  std::ostringstream out;
  out << "deadlock:";
  for (const auto& [what, group] : groups) {
    out << "\n  " << group.first << " threads wait in " << what << ", first "
        << name_of(*group.second);
  }
  out << "\n  " << ended << " threads of these blocks have ended";
  return out.str();
}

// Every thread of the blocks in flight once, or of them the lazy ones. Returns whether any could
// run.
bool sweep(bool lazy) {
  bool any = false;
  for (auto& block : current->blocks) {
    for (Thread* thread : block->order) {
      if (thread->lazy != lazy || !runnable(*thread)) continue;
      any = true;
      resume(*thread);
      if (!current->error.empty()) return true;
    }
  }
  return any;
}

// In a shuffled launch some threads and some whole blocks are lazy: they fall as far behind the
// others as the kernel's own synchronisation lets them.
bool round() {
  if (current->shuffled) {
    std::shuffle(current->blocks.begin(), current->blocks.end(), current->random);
    for (auto& block : current->blocks) {
      // Random cuts instead of a full shuffle: as telling, and cheap.
      auto& order = block->order;
      const auto cut = static_cast<std::ptrdiff_t>(current->random() % order.size());
      std::rotate(order.begin(), order.begin() + cut, order.end());
      if (current->random() % 2) std::reverse(order.begin(), order.end());
    }
  }
  const bool any = sweep(false);
  if (!current->error.empty() || (any && current->random() % 64 != 0)) return true;
  return sweep(true) || any;
}

// Runs the asynchronous actions that are due; with force, the first one, due or not. Returns
// whether there was one.
bool act(bool force) {
  auto& actions = current->actions;
  bool acted = false;
  for (std::size_t i = 0; i < actions.size();) {
    if (--actions[i].delay > 0 && !force) {
      ++i;
      continue;
    }
    const std::function<void()> run = std::move(actions[i].run);
    actions.erase(actions.begin() + static_cast<std::ptrdiff_t>(i));
    try {
      run();
    } catch (const std::exception& error) {
      current->error = std::string("an asynchronous action: ") + error.what();
    }
    acted = true;
    if (force) break;
  }
  return acted;
}

// Makes a launch the one whose threads run.
void enter(Launch& launch) {
  const Grid& grid = launch.grid;
  blockDim = dim3(grid.threads[0], grid.threads[1], grid.threads[2]);
  gridDim = dim3(grid.blocks[0], grid.blocks[1], grid.blocks[2]);
  current = &launch;
}

// Starts the blocks that fit, gives threads a turn and closes blocks that ended. Returns whether
// anything could go on.
bool step(Launch& launch) {
  enter(launch);
  const auto at_once = static_cast<std::size_t>(chosen.blocks_at_once);
  while (launch.started < launch.numbers.size() && launch.blocks.size() < at_once) {
    launch.blocks.push_back(open_block(launch.numbers[launch.started++]));
  }
  bool any = round();
  if (launch.error.empty()) any = act(false) || any;
  if (!launch.error.empty()) return true;
  std::erase_if(launch.blocks, [](const std::unique_ptr<Block>& block) {
    if (block->ended != static_cast<int>(block->threads.size())) return false;
    for (const Action& action : current->actions) {
      if (action.block != block.get() || !current->error.empty()) continue;
      current->error = name_of(*block->threads[0]) + ": ended with a copy still in flight";
    }
    close_block(*block);
    return true;
  });
  return any;
}

bool all_started(const Launch& launch) { return launch.started == launch.numbers.size(); }
bool has_ended(const Launch& launch) { return all_started(launch) && launch.blocks.empty(); }
bool lets_next_start(const Launch& launch) {
  return all_started(launch) &&
         std::all_of(launch.blocks.begin(), launch.blocks.end(),
                     [](const std::unique_ptr<Block>& block) { return block->lets_next_start; });
}

// After the last block: what was still under way, and what the next launch waits for.
void close(Launch& launch) {
  enter(launch);
  while (launch.error.empty() && act(true)) {
  }
  if (launch.error.empty() && launch.grid.overlaps_previous && !launch.waited) {
    launch.error = "started beside the previous kernel, and no thread waited for that";
  }
  observe(launch.ended);
  for (const auto& other : in_flight) {
    if (other->previous == &launch) other->previous = nullptr;
  }
}

void free_shared(Launch& launch) {
  for (unsigned char* shared : launch.used_shared) {
    ::operator delete[](shared, std::align_val_t{1024});
  }
  launch.used_shared.clear();
}

// Unwinds all threads in flight.
void abandon() {
  for (const auto& launch : in_flight) {
    enter(*launch);
    launch->abandoned = true;
    for (auto& block : launch->blocks) {
      for (auto& thread : block->threads) {
        if (thread->state != Thread::ended) resume(*thread);
      }
      close_block(*block);
    }
    observe(launch->ended);
    free_shared(*launch);
  }
  current = nullptr;
  in_flight.clear();
}

// Runs launches from number `first` on until done() or, with more before it, until they are stuck.
void drive(std::size_t first, const std::function<bool()>& done) {
  std::string error;
  while (error.empty() && !done()) {
    bool any = false;
    for (std::size_t i = first; i < in_flight.size() && error.empty(); ++i) {
      any = step(*in_flight[i]) || any;
      error = in_flight[i]->error;
    }
    for (std::size_t i = first; i < in_flight.size() && error.empty() && !any; ++i) {
      enter(*in_flight[i]);
      any = act(true);
      error = current->error;
    }
    for (std::size_t i = first; i < in_flight.size() && error.empty();) {
      if (!has_ended(*in_flight[i])) {
        ++i;
        continue;
      }
      any = true;
      close(*in_flight[i]);
      error = current->error;
      free_shared(*in_flight[i]);
      in_flight.erase(in_flight.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (error.empty() && !any) {
      if (first > 0) break;
      error = deadlock();
    }
  }
  current = nullptr;
  if (error.empty()) return;
  abandon();
  throw std::runtime_error("kernel: " + error);
}

// A test must not leave launches to the next one, whose memory is another.
class NothingInFlight : public testing::EmptyTestEventListener {
  void OnTestEnd(const testing::TestInfo&) override {
    if (in_flight.empty()) return;
    abandon();
    ADD_FAILURE() << "a kernel is still in flight: emulator::synchronize() lets it end";
  }
};
[[maybe_unused]] const bool listens = [] {
  testing::UnitTest::GetInstance()->listeners().Append(new NothingInFlight);
  return true;
}();

}  // namespace

Schedule& schedule() { return chosen; }

void for_each_schedule(const std::function<void(const Schedule&)>& body) {
  const Schedule before = chosen;
  for (const Schedule& one : {Schedule{0, 1, 4, 80}, Schedule{1, 3, 4, 90}, Schedule{2, 2, 2, 80},
                              Schedule{7, 8, 1, 80}}) {
    testing::ScopedTrace trace(__FILE__, __LINE__,
                               "schedule: seed " + std::to_string(one.seed) + ", blocks at once " +
                                   std::to_string(one.blocks_at_once) + ", multiprocessors " +
                                   std::to_string(one.multiprocessors));
    chosen = one;
    body(one);
    synchronize();
    if (testing::Test::HasFatalFailure()) break;
  }
  chosen = before;
}

int launches() { return launch_count; }

void synchronize() {
  const Unwatched unwatched;
  drive(0, [] { return in_flight.empty(); });
}

void run(const Grid& grid, std::function<void()> kernel) {
  const Unwatched unwatched;
  ++launch_count;
  if (!grid.overlaps_previous) synchronize();
  auto launch = std::make_unique<Launch>();
  launch->grid = grid;
  launch->kernel = std::move(kernel);
  if (!in_flight.empty()) {
    launch->previous = in_flight.back().get();
    launch->ended_previous = launch->previous->ended;
  }
  launch->numbers.resize(std::size_t{grid.blocks[0]} * grid.blocks[1] * grid.blocks[2]);
  std::iota(launch->numbers.begin(), launch->numbers.end(), 0u);
  // Launches that overlap take their blocks in different orders.
  launch->random.seed(chosen.seed + static_cast<unsigned>(in_flight.size()));
  launch->shuffled = chosen.seed != 0;
  if (launch->shuffled) {
    std::shuffle(launch->numbers.begin(), launch->numbers.end(), launch->random);
  }
  publish(launch->begun);
  in_flight.push_back(std::move(launch));
  // Alone until it waits for what came before, then with that; held where the next may start.
  const Launch* const mine = in_flight.back().get();
  const auto done = [&] {
    return in_flight.empty() || in_flight.back().get() != mine || lets_next_start(*mine);
  };
  drive(in_flight.size() - 1, done);
  drive(0, done);
}

void fail(const std::string& what, Where where) {
  const Unwatched unwatched;
  throw std::runtime_error(what + " at " + place(where));
}

int thread_in_block() {
  const Unwatched unwatched;
  return current->running->index;
}
int threads_in_block() {
  const Unwatched unwatched;
  return static_cast<int>(current->running->block->threads.size());
}
unsigned char* shared() {
  const Unwatched unwatched;
  return current->running->block->shared.get();
}
std::size_t shared_bytes() {
  const Unwatched unwatched;
  return current->grid.shared_bytes;
}

void check_aligned(const void* p, std::size_t alignment, const char* what, Where where) {
  const Unwatched unwatched;
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    fail(std::string(what) + ": address is not a multiple of " + std::to_string(alignment), where);
  }
}

void check_shared(const void* p, std::size_t bytes, std::size_t alignment, const char* what,
                  Where where) {
  const Unwatched unwatched;
  check_aligned(p, alignment, what, where);
  const auto offset = static_cast<const unsigned char*>(p) - shared();
  if (offset < 0 || static_cast<std::size_t>(offset) + bytes > shared_bytes()) {
    fail(std::string(what) + ": bytes " + std::to_string(offset) + " to " +
             std::to_string(offset + static_cast<std::ptrdiff_t>(bytes)) + " of " +
             std::to_string(shared_bytes()) + " of shared memory",
         where);
  }
}

void poison(void* p, std::size_t bytes) { std::memset(p, 0xff, bytes); }

unsigned char* async_view(const void* p) {
  const Unwatched unwatched;
  Block& block = *current->running->block;
  if (block.async_view.empty()) block.async_view.assign(current->grid.shared_bytes, 0xff);
  return block.async_view.data() + (static_cast<const unsigned char*>(p) - block.shared.get());
}

void fence_proxy_async() {
  const Unwatched unwatched;
  std::memcpy(async_view(shared()), shared(), shared_bytes());
}

void yield() {
  const Unwatched unwatched;
  switch_to_host();
}

void maybe_yield() {
  const Unwatched unwatched;
  if (current->shuffled && current->random() % 4 == 0) yield();
}

void wait_until(const std::function<bool()>& condition, const char* what, Where where) {
  const Unwatched unwatched;
  if (condition()) return;
  current->running->condition = &condition;
  sleep_until_woken(what, where);
}

void fence() {
  const Unwatched unwatched;
  Thread& thread = *current->running;
  for (const volatile void* address : thread.touched) observe(address);
  thread.touched.clear();
  thread.fenced = true;
  maybe_yield();
}

void before_atomic(const volatile void* address) {
  const Unwatched unwatched;
  if (current->running->fenced) publish(address);
  maybe_yield();
}

void after_atomic(const volatile void* address) {
  const Unwatched unwatched;
  current->running->touched.push_back(address);
  maybe_yield();
}

void later(std::function<void()> action) {
  const Unwatched unwatched;
  const int delay = current->shuffled ? static_cast<int>(current->random() % 8) : 2;
  current->actions.push_back({delay, current->running->block, std::move(action)});
}

void** meet(int first, int count, uint32_t mask, void* mine, const char* what, Where where,
            bool ordered) {
  const Unwatched unwatched;
  Thread& thread = *current->running;
  Block& block = *thread.block;
  const int member = thread.index - first;
  const int present = std::min(count, static_cast<int>(block.threads.size()) - first);
  if (count == 32) {
    if (present < 32) mask &= (1u << present) - 1u;
    if (!(mask >> member & 1u)) fail(std::string(what) + ": mask leaves out its own lane", where);
  }
  Meeting* meeting = nullptr;
  for (const auto& open : block.meetings) {
    if (open->first + open->count <= first || first + count <= open->first) continue;
    // A warpgroup meets while other warps of it still meet among themselves.
    const bool same_warp =
        std::any_of(open->threads.begin(), open->threads.end(),
                    [&](const Thread* other) { return other->index / 32 == thread.index / 32; });
    if (open->count != count && !same_warp) continue;
    const bool same = open->first == first && open->count == count && open->mask == mask;
    if (!same && count == 32 && open->count == 32 && !(open->mask & mask)) continue;
    if (!same || std::strcmp(open->what, what) != 0 || open->where.line() != where.line() ||
        std::strcmp(open->where.file_name(), where.file_name()) != 0) {
      std::ostringstream out;
      out << what << ": divergent, mask " << std::hex << mask << "; " << std::dec
          << name_of(*open->threads[0]) << " waits in " << open->what << " at "
          << place(open->where) << ", mask " << std::hex << open->mask;
      fail(out.str(), where);
    }
    meeting = open.get();
  }
  if (meeting == nullptr) {
    block.meetings.push_back(std::make_unique<Meeting>());
    meeting = block.meetings.back().get();
    meeting->first = first;
    meeting->count = count;
    meeting->mask = mask;
    meeting->expected = count == 32 ? __builtin_popcount(mask) : present;
    meeting->what = what;
    meeting->where = where;
  }
  meeting->members[static_cast<std::size_t>(member)] = mine;
  meeting->threads.push_back(&thread);
  const void* const key = meeting->key;
  if (ordered) publish(key);
  if (++meeting->arrived < meeting->expected) {
    sleep_until_woken(what, where);
    if (ordered) observe(key);
    return nullptr;
  }
  if (ordered) observe(key);
  current->met = meeting;
  return meeting->members.data();
}

void release() {
  const Unwatched unwatched;
  Block& block = *current->running->block;
  for (Thread* thread : current->met->threads) thread->state = Thread::ready;
  std::erase_if(block.meetings,
                [](const std::unique_ptr<Meeting>& open) { return open.get() == current->met; });
  current->met = nullptr;
}

bool block_barrier(int id, int threads, bool wait, const char* what, Where where, bool predicate) {
  const Unwatched unwatched;
  Thread& thread = *current->running;
  Block& block = *thread.block;
  Barrier& barrier = block.barriers[id];
  const auto wrong = [&](const std::string& with) {
    fail(std::string(what) + " (barrier " + std::to_string(id) + "): " + with, where);
  };
  if (id < 0 || id > 15) wrong("there are barriers 0 to 15");
  if (id != 0 && threads % 32 != 0) wrong(std::to_string(threads) + " threads are not whole warps");
  if (barrier.arrived > 0 && barrier.expected != threads) {
    wrong(std::to_string(threads) + " threads here, " + std::to_string(barrier.expected) + " at " +
          place(barrier.where));
  }
  if (id == 0 && barrier.arrived > 0 && barrier.where.line() != where.line()) {
    wrong("divergent, others wait at " + place(barrier.where));
  }
  const auto reduces = [](const char* name) { return std::strcmp(name, "bar.red.or") == 0; };
  if (barrier.arrived > 0 && reduces(what) != reduces(barrier.what)) {
    wrong(std::string("others are in ") + barrier.what + " at " + place(barrier.where));
  }
  barrier.expected = threads;
  barrier.what = what;
  barrier.where = where;
  ++barrier.arrived;
  ++barrier.lanes[thread.index / 32];
  const std::shared_ptr<bool> any = barrier.any;
  *any = *any || predicate;
  const void* const key = barrier.key;
  publish(key);
  thread.fenced = false;
  if (barrier.arrived == threads) {
    for (const auto& [warp, lanes] : barrier.lanes) {
      if (id != 0 && lanes % 32 != 0) {
        wrong(std::to_string(lanes) + " lanes of warp " + std::to_string(warp) +
              ", where a chip counts warps");
      }
    }
    for (Thread* other : barrier.waiting) other->state = Thread::ready;
    block.barriers.erase(id);
  } else if (wait) {
    barrier.waiting.push_back(&thread);
    sleep_until_woken(what, where);
  }
  if (wait) observe(key);
  return *any;
}

void wait_for_previous(Where where) {
  const Unwatched unwatched;
  Launch* const launch = current;
  launch->waited = true;
  wait_until([launch] { return launch->previous == nullptr; }, "griddepcontrol.wait", where);
  if (launch->ended_previous != nullptr) observe(launch->ended_previous);
}

void let_next_start() {
  const Unwatched unwatched;
  current->running->block->lets_next_start = true;
  yield();  // where it is the last block, the next launch starts now
}

void copy_async(void* shared, const void* global, int bytes, int bytes_read, Where where) {
  const Unwatched unwatched;
  const auto size = static_cast<std::size_t>(bytes);
  check_shared(shared, size, size, "cp.async", where);
  if (bytes_read < 0 || bytes_read > bytes) fail("cp.async: reads more than it writes", where);
  check_aligned(global, bytes_read > 0 ? size : 1, "cp.async source", where);
  Copy copy{shared, {}, bytes};
  if (bytes_read > 0)
    std::memcpy(copy.content.data(), global, static_cast<std::size_t>(bytes_read));
  poison(shared, size);
  current->running->copies.push_back(copy);
}

void commit_copies() {
  const Unwatched unwatched;
  Thread& thread = *current->running;
  thread.copy_groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

void wait_copies(int groups_left) {
  const Unwatched unwatched;
  auto& groups = current->running->copy_groups;
  while (groups.size() > static_cast<std::size_t>(groups_left)) {
    for (const Copy& copy : groups.front()) {
      const Watched watched;
      std::memcpy(copy.to, copy.content.data(), static_cast<std::size_t>(copy.bytes));
    }
    groups.pop_front();
  }
}

}  // namespace densecl::emulator

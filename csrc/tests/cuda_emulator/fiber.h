// Cooperative threads on one operating system thread: a stack each, and a switch between them.
#pragma once

#include <cstddef>

namespace densecl::emulator {

// What a switch leaves behind and comes back to. The scheduler has one, every fiber has one.
struct Context {
  void* saved = nullptr;        // stack pointer, or ucontext_t where there is no own switch
  const void* stack = nullptr;  // lowest address; for AddressSanitizer
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's fiber
};

constexpr std::size_t fiber_stack_bytes = 256 * 1024;

// Prepares a context on a pooled stack that calls entry at the first switch. entry must not return:
// it switches away for the last time with last = true.
void open_fiber(Context& fiber, void (*entry)());

// Gives the stack back; the fiber may stand anywhere.
void close_fiber(Context& fiber);

// Leaves `from`, continues `to`. last: `from` is never continued.
void switch_fiber(Context& from, Context& to, bool last = false);

// First thing in a fiber's entry.
void fiber_began();

}  // namespace densecl::emulator

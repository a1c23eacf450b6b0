#include "cuda_emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace densecl::emulator {
namespace {

struct Stack {
  void* memory;
  void* tsan;  // ThreadSanitizer's fiber: kept for the stack, since it is dear and knows the
               // stack's past
};

// Stacks with a page below that faults, so that a kernel's overlarge local array shows at once.
class StackPool {
 public:
  Stack take() {
    if (free_.empty()) grow();
    Stack stack = free_.back();
    free_.pop_back();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack.memory, fiber_stack_bytes);  // a frame left by a switch
#endif
#if defined(__SANITIZE_THREAD__)
    if (stack.tsan == nullptr) stack.tsan = __tsan_create_fiber(0);
#endif
    return stack;
  }
  void give(Stack stack) { free_.push_back(stack); }

 private:
  void grow() {
    const std::size_t guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    constexpr int count = 64;
    const std::size_t step = fiber_stack_bytes + guard;
    void* region = mmap(nullptr, count * step, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < count; ++i) {
      char* slot = static_cast<char*>(region) + i * step;
      mprotect(slot, guard, PROT_NONE);
      free_.push_back({slot + guard, nullptr});
    }
  }
  std::vector<Stack> free_;
};

StackPool& stacks() {
  static StackPool pool;
  return pool;
}

#if defined(__SANITIZE_ADDRESS__)
Context* leaving = nullptr;
#endif

void arrived([[maybe_unused]] Context* here) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(here ? here->fake_stack : nullptr, &stack, &bytes);
  if (leaving->stack == nullptr) {  // the scheduler's own stack is first told here
    leaving->stack = stack;
    leaving->stack_bytes = bytes;
  }
#endif
}

}  // namespace

#if defined(__x86_64__)

// Saves what a callee must keep, exchanges stack pointers, restores.
extern "C" void densecl_switch_stack(void** save, void* load);
asm(R"(
.text
.type densecl_switch_stack, @function
densecl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size densecl_switch_stack, .-densecl_switch_stack
)");

namespace {
void prepare(Context& fiber, char* stack, void (*entry)()) {
  // As if switched away from with entry as the return address; the stack is then aligned as after a
  // call instruction.
  void** top = reinterpret_cast<void**>(stack + fiber_stack_bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  fiber.saved = top - 8;
}
void swap(Context& from, Context& to) { densecl_switch_stack(&from.saved, to.saved); }
void discard(Context&) {}
}  // namespace

#else

namespace {
void prepare(Context& fiber, char* stack, void (*entry)()) {
  ucontext_t* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = fiber_stack_bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  fiber.saved = context;
}
void swap(Context& from, Context& to) {
  if (from.saved == nullptr) from.saved = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.saved), static_cast<ucontext_t*>(to.saved));
}
void discard(Context& fiber) { delete static_cast<ucontext_t*>(fiber.saved); }
}  // namespace

#endif

void open_fiber(Context& fiber, void (*entry)()) {
  const Stack stack = stacks().take();
  fiber = {};
  fiber.stack = stack.memory;
  fiber.stack_bytes = fiber_stack_bytes;
  fiber.tsan = stack.tsan;
  prepare(fiber, static_cast<char*>(stack.memory), entry);
}

void close_fiber(Context& fiber) {
  discard(fiber);
  stacks().give({const_cast<void*>(fiber.stack), fiber.tsan});
  fiber = {};
}

#if defined(__SANITIZE_THREAD__)
__attribute__((no_sanitize("thread")))
#endif
void switch_fiber(Context& from, Context& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  leaving = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  if (from.tsan == nullptr) from.tsan = __tsan_get_current_fiber();
  // No happens-before by the switch itself: only the kernel's own synchronisation orders accesses.
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swap(from, to);
  arrived(&from);
}

void fiber_began() { arrived(nullptr); }

}  // namespace densecl::emulator

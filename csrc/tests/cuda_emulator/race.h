// What ThreadSanitizer is told, so that it finds the data races of an emulated kernel.
//
// Every fiber is a thread to it. It watches what the kernel reads and writes, not what the emulator
// does on its behalf, and learns of an order only where the kernel makes one: at barriers,
// __syncwarp, and atomics with fences around them.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace densecl::emulator {

#if defined(__SANITIZE_THREAD__)
inline void ignore_begin() {
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
inline void ignore_end() {
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}
inline void publish(const volatile void* key) { __tsan_release(const_cast<void*>(key)); }
inline void observe(const volatile void* key) { __tsan_acquire(const_cast<void*>(key)); }
#else
inline void ignore_begin() {}
inline void ignore_end() {}
inline void publish(const volatile void*) {}
inline void observe(const volatile void*) {}
#endif

// Around the emulator's own work.
struct Unwatched {
  Unwatched() { ignore_begin(); }
  ~Unwatched() { ignore_end(); }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};
// Inside it, around what the kernel's thread does to memory.
struct Watched {
  Watched() { ignore_end(); }
  ~Watched() { ignore_begin(); }
  Watched(const Watched&) = delete;
  Watched& operator=(const Watched&) = delete;
};

// Something to publish under: every barrier needs a new one each time it opens.
inline const void* new_key() {
  static uint64_t keys[1 << 16];
  static uint32_t next = 0;
  return &keys[next++ % (1 << 16)];
}

}  // namespace densecl::emulator

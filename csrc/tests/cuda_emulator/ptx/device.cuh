// Twin of cuda/ptx/device.cuh: the CUDA C++ that kernels use, for g++.
//
// There is no __shared__: all shared memory is dynamic (shared_memory<T>()), so that several blocks
// can be interleaved.
#pragma once

#include <math.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>

#include "cuda_emulator/emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

#define DENSECL_VECTOR_TYPES(element, name)                                                        \
  struct alignas(2 * sizeof(element)) name##2 { element x, y; };                                   \
  struct alignas(sizeof(element) == 8 ? 16 : 4 * sizeof(element)) name##4 { element x, y, z, w; }; \
  inline name##2 make_##name##2(element x, element y) { return {x, y}; }                           \
  inline name##4 make_##name##4(element x, element y, element z, element w) { return {x, y, z, w}; }
DENSECL_VECTOR_TYPES(float, float)
DENSECL_VECTOR_TYPES(int, int)
DENSECL_VECTOR_TYPES(unsigned, uint)
DENSECL_VECTOR_TYPES(unsigned short, ushort)
DENSECL_VECTOR_TYPES(double, double)
#undef DENSECL_VECTOR_TYPES

using std::max;
using std::min;

namespace densecl::emulator {

template <class T>
struct ShuffleLane {
  int lane;
  T value;
  int from;
  T result;
};

template <class T>
T shuffle(uint32_t mask, T value, int from, const char* what, Where where) {
  const int lane = thread_in_block() % 32;
  ShuffleLane<T> mine{lane, value, from, value};
  warp_collective(mask, mine, what, where, [&](ShuffleLane<T>** lanes) {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1u) || lanes[i] == nullptr) continue;
      const int source = lanes[i]->from;
      if (!(mask >> source & 1u) || lanes[source] == nullptr) {
        fail(std::string(what) + ": reads lane " + std::to_string(source) + ", which takes no part",
             where);
      }
      lanes[i]->result = lanes[source]->value;
    }
  });
  return mine.result;
}

inline uint32_t ballot(uint32_t mask, bool predicate, const char* what, Where where) {
  struct Lane {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  warp_collective(mask, mine, what, where, [&](Lane** lanes) {
    uint32_t bits = 0;
    for (int i = 0; i < 32; ++i) {
      if ((mask >> i & 1u) && lanes[i] && lanes[i]->predicate) bits |= 1u << i;
    }
    for (int i = 0; i < 32; ++i) {
      if ((mask >> i & 1u) && lanes[i]) lanes[i]->result = bits;
    }
  });
  return mine.result;
}

// A place where another thread may come first.
template <class T, class Change>
T atomic_update(T* address, Where where, Change change) {
  check_aligned(address, sizeof(T), "atomic", where);
  before_atomic(address);
  std::atomic_ref<T> cell(*address);
  T old = cell.load(std::memory_order_relaxed);
  while (!cell.compare_exchange_weak(old, change(old), std::memory_order_relaxed)) {
  }
  after_atomic(address);
  return old;
}

}  // namespace densecl::emulator

#define DENSECL_WHERE densecl::emulator::Where where = densecl::emulator::Where::current()

inline void __syncthreads(DENSECL_WHERE) {
  densecl::emulator::block_barrier(0, densecl::emulator::threads_in_block(), true, "__syncthreads",
                                   where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, DENSECL_WHERE) {
  const int first = densecl::emulator::thread_in_block() / 32 * 32;
  if (densecl::emulator::meet(first, 32, mask, nullptr, "__syncwarp", where, true)) {
    densecl::emulator::release();
  }
}
inline void __threadfence() { densecl::emulator::fence(); }
inline void __threadfence_block() { densecl::emulator::fence(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, DENSECL_WHERE) {
  const int lane = densecl::emulator::thread_in_block() % 32;
  const int source = lane / width * width + (from & (width - 1));
  return densecl::emulator::shuffle(mask, value, source, "__shfl_sync", where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, DENSECL_WHERE) {
  const int lane = densecl::emulator::thread_in_block() % 32;
  const int source = lane ^ bits;
  const bool inside = source / width <= lane / width && source < 32;
  return densecl::emulator::shuffle(mask, value, inside ? source : lane, "__shfl_xor_sync", where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, DENSECL_WHERE) {
  const int lane = densecl::emulator::thread_in_block() % 32;
  const int source = lane + static_cast<int>(delta);
  const bool inside = source < (lane / width + 1) * width;
  return densecl::emulator::shuffle(mask, value, inside ? source : lane, "__shfl_down_sync", where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, DENSECL_WHERE) {
  const int lane = densecl::emulator::thread_in_block() % 32;
  const int source = lane - static_cast<int>(delta);
  const bool inside = source >= lane / width * width;
  return densecl::emulator::shuffle(mask, value, inside ? source : lane, "__shfl_up_sync", where);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, DENSECL_WHERE) {
  return densecl::emulator::ballot(mask, predicate, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, bool predicate, DENSECL_WHERE) {
  return densecl::emulator::ballot(mask, predicate, "__any_sync", where) != 0;
}
inline int __all_sync(unsigned mask, bool predicate, DENSECL_WHERE) {
  return densecl::emulator::ballot(mask, !predicate, "__all_sync", where) == 0;
}

template <class T>
T atomicAdd(T* address, T value, DENSECL_WHERE) {
  static_assert(std::is_integral_v<T>, "sums of floats by atomics depend on the order");
  return densecl::emulator::atomic_update(address, where,
                                          [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, T value, DENSECL_WHERE) {
  return densecl::emulator::atomic_update(address, where, [=](T old) { return max(old, value); });
}
template <class T>
T atomicMin(T* address, T value, DENSECL_WHERE) {
  return densecl::emulator::atomic_update(address, where, [=](T old) { return min(old, value); });
}
template <class T>
T atomicExch(T* address, T value, DENSECL_WHERE) {
  return densecl::emulator::atomic_update(address, where, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T compare, T value, DENSECL_WHERE) {
  return densecl::emulator::atomic_update(address, where,
                                          [=](T old) { return old == compare ? value : old; });
}
// Counts 0, 1, ..., limit, 0, ...
inline unsigned atomicInc(unsigned* address, unsigned limit, DENSECL_WHERE) {
  return densecl::emulator::atomic_update(
      address, where, [=](unsigned old) { return old >= limit ? 0u : old + 1u; });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
inline int __vimax3_s32(int a, int b, int c) { return max(max(a, b), c); }
// Four of the eight bytes of a (0 to 3) and b (4 to 7), by the selector's digits.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return out;
}
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return ::ffs(bits); }

namespace densecl::cuda {

// The block's dynamic shared memory.
template <class T = unsigned char>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared());
}

// An address as shared-memory instructions take it: here the offset in the block's memory, plus a
// kilobyte, since 0 is an address that no kernel owns.
inline uint32_t shared_address(const void* p) {
  return 1024u + static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::shared());
}
inline void* shared_pointer(uint32_t address) { return emulator::shared() + (address - 1024u); }

}  // namespace densecl::cuda

// Twin of cuda/ptx/wgmma.cuh. Products are computed when they are waited for, from what shared
// memory and the registers of a hold by then; until then d holds NaN. So reuse before the wait
// shows.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <vector>

#include <ptx/device.cuh>
#include "cuda_emulator/products.h"
#include "cuda_emulator/race.h"
#include "densecl/half.h"
#include "densecl/types.h"
#include "sm90/descriptor.cuh"

namespace densecl::emulator {

struct Product {
  bool bf16;
  int n;
  float* d;
  const uint32_t* a;  // in registers; or null
  uint64_t a_matrix, b_matrix;
  bool accumulate;
};

// Of one thread.
struct Products {
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  std::map<float*, std::vector<float>> sums;  // what d held, and then the sums so far
  bool fenced = false;
};

inline Products& products() {
  static std::map<std::pair<const unsigned char*, int>, Products> all;
  static int launch = 0;
  if (launch != launches()) all.clear();  // what a launch that failed left behind
  launch = launches();
  return all[{shared(), thread_in_block()}];
}

inline int leading_bytes(uint64_t matrix) { return static_cast<int>(matrix >> 16 & 0x3fff) * 16; }
inline int stride_bytes(uint64_t matrix) { return static_cast<int>(matrix >> 32 & 0x3fff) * 16; }

// A 16-bit element of a swizzled matrix: `offset` bytes from its start before the swizzle.
inline uint16_t element(uint64_t matrix, int offset, Where where) {
  uint32_t address = static_cast<uint32_t>(matrix & 0x3fff) * 16 + static_cast<uint32_t>(offset);
  address ^= (address >> 7 & 7) << 4;
  const void* p = cuda::shared_pointer(address);
  check_shared(p, 2, 2, "wgmma", where);
  uint16_t bits, seen;
  std::memcpy(&bits, p, 2);
  std::memcpy(&seen, async_view(p), 2);
  if (bits != seen) fail("wgmma: reads what was written without fence.proxy.async", where);
  return bits;
}

// The bits that a chip reads beside the address and the two offsets.
inline void check_descriptor(uint64_t matrix, bool k_major, Where where) {
  if (matrix >> 62 != 1) fail("wgmma: a descriptor of another swizzle than 128 bytes", where);
  if (matrix >> 49 & 7) fail("wgmma: a descriptor with a base offset", where);
  if (matrix &
      (uint64_t{0x1fff} << 49 | uint64_t{7} << 46 | uint64_t{3} << 30 | uint64_t{3} << 14)) {
    fail("wgmma: a descriptor with bits that mean nothing", where);
  }
  if (matrix >> 3 & 7) fail("wgmma: a descriptor's rows start within a swizzled pattern", where);
  if (k_major && leading_bytes(matrix) != 16) {
    fail("wgmma: a K-major descriptor whose leading offset is not 1", where);
  }
}

inline void issue(const Product& product, Where where) {
  const Unwatched unwatched;
  Products& mine = products();
  if (!mine.fenced) fail("wgmma without wgmma.fence before it", where);
  if (product.a == nullptr) check_descriptor(product.a_matrix, true, where);
  check_descriptor(product.b_matrix, product.a == nullptr, where);
  const int registers = product.n / 2;
  if (!mine.sums.contains(product.d)) {
    mine.sums[product.d].assign(product.d, product.d + registers);
    poison(product.d, sizeof(float) * static_cast<std::size_t>(registers));
  }
  mine.open.push_back(product);
}

// The `index`th product of the oldest group, for all 128 threads.
inline void compute(Products** threads, std::size_t index, Where where) {
  const Product& one = threads[0]->groups.front()[index];
  const auto widen = [&](uint16_t bits) { return one.bf16 ? bf16_to_f32(bits) : f16_to_f32(bits); };
  const auto n = static_cast<std::size_t>(one.n);
  std::vector<float> a(64 * 16), b(16 * n), sums(64 * n);
  for (int r = 0; r < 64; ++r) {
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      if (one.a) {
        const Product& holder = threads[r / 16 * 32 + r % 8 * 4 + k % 8 / 2]->groups.front()[index];
        bits = static_cast<uint16_t>(holder.a[r % 16 / 8 + k / 8 * 2] >> (k % 2 * 16));
      } else {
        bits =
            element(one.a_matrix, r / 8 * stride_bytes(one.a_matrix) + r % 8 * 128 + 2 * k, where);
      }
      a[static_cast<std::size_t>(r * 16 + k)] = widen(bits);
    }
  }
  for (int c = 0; c < one.n; ++c) {
    for (int k = 0; k < 16; ++k) {
      const int offset = one.a ? c / 64 * leading_bytes(one.b_matrix) +
                                     k / 8 * stride_bytes(one.b_matrix) + k % 8 * 128 + c % 64 * 2
                               : c / 8 * stride_bytes(one.b_matrix) + c % 8 * 128 + 2 * k;
      b[static_cast<std::size_t>(k * one.n + c)] = widen(element(one.b_matrix, offset, where));
    }
  }
  for (int t = 0; t < 128; ++t) {
    const Product& same = threads[t]->groups.front()[index];
    if (same.b_matrix != one.b_matrix || same.n != one.n) fail("wgmma: divergent", where);
  }
  const auto sum_of = [&](int r, int c) -> float& {
    Products& holder = *threads[r / 16 * 32 + r % 8 * 4 + c % 8 / 2];
    std::vector<float>& held = holder.sums[holder.groups.front()[index].d];
    return held[static_cast<std::size_t>(c / 8 * 4 + r % 16 / 8 * 2 + c % 2)];
  };
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < one.n; ++c) {
      sums[static_cast<std::size_t>(r * one.n + c)] = one.accumulate ? sum_of(r, c) : 0.0f;
    }
  }
  add_product(sums.data(), a.data(), b.data(), 64, one.n, 16, 16);
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < one.n; ++c) sum_of(r, c) = sums[static_cast<std::size_t>(r * one.n + c)];
  }
}

}  // namespace densecl::emulator

namespace densecl::cuda {

inline void fence_products() {
  const emulator::Unwatched unwatched;
  emulator::products().fenced = true;
}

inline void commit_products() {
  const emulator::Unwatched unwatched;
  emulator::Products& mine = emulator::products();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int left>
void wait_products(DENSECL_WHERE) {
  const emulator::Unwatched unwatched;
  emulator::Products& mine = emulator::products();
  const int first = emulator::thread_in_block() / 128 * 128;
  mine.fenced = false;  // the registers may be written from here on
  while (mine.groups.size() > static_cast<std::size_t>(left)) {
    if (void** members = emulator::meet(first, 128, 0, &mine, "wgmma.wait_group", where)) {
      auto** threads = reinterpret_cast<emulator::Products**>(members);
      for (std::size_t i = 0; i < mine.groups.front().size(); ++i) {
        emulator::compute(threads, i, where);
      }
      emulator::release();
    }
    mine.groups.pop_front();
    for (auto sum = mine.sums.begin(); sum != mine.sums.end();) {
      bool pending = false;
      for (const auto& group : mine.groups) {
        for (const auto& product : group) pending = pending || product.d == sum->first;
      }
      if (pending) {
        ++sum;
        continue;
      }
      std::copy(sum->second.begin(), sum->second.end(), sum->first);
      sum = mine.sums.erase(sum);
    }
  }
}

template <int count>
void fence_operand(float (&)[count]) {}
template <int count>
void fence_operand(uint32_t (&)[count][4]) {}

inline void settle(const float (&numbers)[2], DENSECL_WHERE) {
  if (numbers[0] + numbers[1] < 0.0f) emulator::fail("settle: a negative number", where);
}

template <DType type, int n>
void multiply_shared(float (&d)[n / 2], uint64_t a, uint64_t b, int accumulate, DENSECL_WHERE) {
  emulator::issue({type == DType::bf16, n, d, nullptr, a, b, accumulate != 0}, where);
}
template <DType type, int n>
void multiply_registers(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, int accumulate,
                        DENSECL_WHERE) {
  emulator::issue({type == DType::bf16, n, d, a, 0, b, accumulate != 0}, where);
}

template <int count>
void take_registers() {}
template <int count>
void give_registers() {}

}  // namespace densecl::cuda

// Twin of cuda/ptx/ldmatrix.cuh.
#pragma once

#include <ptx/device.cuh>

namespace densecl::emulator {

template <int count>
void load_matrices(uint32_t* out, const void* row, bool transposed, Where where) {
  struct Lane {
    const unsigned char* row;
    uint32_t* out;
  } mine{static_cast<const unsigned char*>(row), out};
  check_shared(row, 16, 16, "ldmatrix", where);
  // The rows are read here too, as far as ThreadSanitizer can tell.
  if (thread_in_block() % 32 < 8 * count) (void)*static_cast<const volatile uint64_t*>(row);
  warp_collective(0xffffffffu, mine, "ldmatrix", where, [&](Lane** lanes) {
    const auto element = [&](int matrix, int r, int c) {
      uint16_t bits;
      std::memcpy(&bits, lanes[8 * matrix + r]->row + 2 * c, 2);
      return static_cast<uint32_t>(bits);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int major = lane / 4, minor = 2 * (lane % 4);
      for (int m = 0; m < count; ++m) {
        const uint32_t low = transposed ? element(m, minor, major) : element(m, major, minor);
        const uint32_t high =
            transposed ? element(m, minor + 1, major) : element(m, major, minor + 1);
        lanes[lane]->out[m] = low | high << 16;
      }
    }
  });
}

}  // namespace densecl::emulator

namespace densecl::cuda {

template <int count>
void load_matrix(uint32_t (&out)[count], const void* row, DENSECL_WHERE) {
  static_assert(count == 1 || count == 2 || count == 4);
  emulator::load_matrices<count>(out, row, false, where);
}
template <int count>
void load_matrix_transposed(uint32_t (&out)[count], const void* row, DENSECL_WHERE) {
  static_assert(count == 1 || count == 2 || count == 4);
  emulator::load_matrices<count>(out, row, true, where);
}

}  // namespace densecl::cuda

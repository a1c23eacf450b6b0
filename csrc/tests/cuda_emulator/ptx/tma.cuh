// Twin of cuda/ptx/tma.cuh: a box holds NaN from the start of its copy until it comes, some time
// later.
#pragma once

#include <ptx/mbarrier.cuh>

#include "densecl/cuda/launch.h"

namespace densecl::cuda {

struct alignas(64) TensorMap {
  const unsigned char* data;
  int64_t rows, columns, stride;
  int box_rows;
};

constexpr int box_columns = 64;

inline Status describe_matrix(TensorMap* map, const void* data, int64_t rows, int64_t columns,
                              int64_t stride, int box_rows) {
  // What cuTensorMapEncodeTiled refuses.
  const auto size_fits = [](int64_t size) { return size > 0 && size <= int64_t{1} << 32; };
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || reinterpret_cast<uintptr_t>(data) % 16 != 0 ||
      !size_fits(rows) || !size_fits(columns) || stride % 8 != 0 || stride < columns ||
      stride >= int64_t{1} << 39 || box_rows < 1 || box_rows > 256) {
    return launch_failure(1);
  }
  *map = {static_cast<const unsigned char*>(data), rows, columns, stride, box_rows};
  return Status::ok;
}

inline void prefetch_map(const TensorMap*) {}

enum class CacheHint : uint64_t { evict_first, evict_last };

inline void copy_box(void* to, const TensorMap* map, int column, int row, Barrier* barrier,
                     CacheHint, int box_rows, DENSECL_WHERE) {
  const emulator::Unwatched unwatched;
  const std::size_t bytes = 128 * static_cast<std::size_t>(box_rows);
  emulator::check_shared(to, bytes, 1024, "TMA", where);
  emulator::check_copy_barrier(barrier, "TMA", where);
  if (box_rows != map->box_rows) emulator::fail("TMA: not the map's box", where);
  unsigned char* const seen = emulator::async_view(to);
  emulator::poison(to, bytes);
  emulator::poison(seen, bytes);
  emulator::later([=, map = *map] {
    unsigned char* out = static_cast<unsigned char*>(to);
    for (int r = 0; r < box_rows; ++r) {
      for (int c = 0; c < box_columns; ++c) {
        unsigned char* at = out + 128 * r + ((c / 8 ^ r % 8) * 16 + c % 8 * 2);
        const bool inside = row + r < map.rows && column + c < map.columns;
        if (inside) {
          std::memcpy(at, map.data + 2 * ((row + r) * map.stride + column + c), 2);
        } else {
          std::memset(at, 0, 2);
        }
      }
    }
    std::memcpy(seen, to, bytes);
    emulator::bytes_came(barrier, static_cast<int>(bytes));
  });
}

inline void copy_block(void* to, const void* from, int bytes, Barrier* barrier, DENSECL_WHERE) {
  const emulator::Unwatched unwatched;
  const auto size = static_cast<std::size_t>(bytes);
  emulator::check_shared(to, size, 16, "bulk copy", where);
  emulator::check_aligned(from, 16, "bulk copy", where);
  if (bytes <= 0 || bytes % 16 != 0) emulator::fail("bulk copy: bytes not a multiple of 16", where);
  emulator::check_copy_barrier(barrier, "bulk copy", where);
  unsigned char* const seen = emulator::async_view(to);
  emulator::poison(to, size);
  emulator::poison(seen, size);
  emulator::later([=] {
    std::memcpy(to, from, size);
    std::memcpy(seen, to, size);
    emulator::bytes_came(barrier, bytes);
  });
}

inline void fence_proxy_async() { emulator::fence_proxy_async(); }

}  // namespace densecl::cuda

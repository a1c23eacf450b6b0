// Scratch memory of a task: floats on a cache line's boundary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace densecl {

class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t count)
      : data_(static_cast<float*>(::operator new(static_cast<std::size_t>(count) * sizeof(float),
                                                 std::align_val_t{64}))) {}
  ~AlignedFloats() { ::operator delete(data_, std::align_val_t{64}); }
  AlignedFloats(const AlignedFloats&) = delete;
  AlignedFloats& operator=(const AlignedFloats&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

}  // namespace densecl

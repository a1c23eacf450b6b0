// What the kernel tests share: buffers with guard zones, typed test data, threads, instruction
// sets.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "densecl/executor.h"
#include "densecl/half.h"
#include "densecl/isa.h"
#include "densecl/types.h"

namespace densecl {
inline void PrintTo(Isa isa, std::ostream* out) { *out << name(isa); }
}  // namespace densecl

namespace densecl::test {

// Tasks go to whichever thread asks first, so that nothing may depend on the order.
class ThreadExecutor final : public Executor {
 public:
  explicit ThreadExecutor(int threads) : threads_(threads) {}

  void run(int64_t tasks, void (*body)(void*, int64_t), void* context) override {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      for (int64_t task = next++; task < tasks; task = next++) body(context, task);
    };
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads_; ++i) helpers.emplace_back(work);
    work();
    for (std::thread& helper : helpers) helper.join();
  }

 private:
  int threads_;
};

// An array between two zones of a known pattern, 64-byte aligned, exactly as long as asked for.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, unsigned char fill = 0xa5) : count_(count) {
    bytes_ = static_cast<unsigned char*>(
        ::operator new(2 * zone + count * sizeof(T), std::align_val_t{64}));
    std::memset(bytes_, pattern, zone);
    std::memset(bytes_ + zone, fill, count * sizeof(T));
    std::memset(bytes_ + zone + count * sizeof(T), pattern, zone);
  }
  ~Guarded() {
    for (size_t i = 0; i < zone; ++i) {
      EXPECT_EQ(bytes_[i], pattern) << "written " << zone - i << " bytes before the array";
      EXPECT_EQ(bytes_[zone + count_ * sizeof(T) + i], pattern)
          << "written " << i << " bytes past the array";
    }
    ::operator delete(bytes_, std::align_val_t{64});
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return reinterpret_cast<T*>(bytes_ + zone); }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return count_; }
  std::vector<T> copy() { return {data(), data() + count_}; }

 private:
  static constexpr size_t zone = 128;
  static constexpr unsigned char pattern = 0xc3;
  int64_t count_;
  unsigned char* bytes_;
};

inline float round_to(float value, DType dtype) {
  if (dtype == DType::bf16) return bf16_to_f32(f32_to_bf16(value));
  if (dtype == DType::f16) return f16_to_f32(f32_to_f16(value));
  return value;
}

inline const char* dtype_name(DType dtype) {
  return dtype == DType::f32 ? "f32" : dtype == DType::bf16 ? "bf16" : "f16";
}

// Elements of any type, and the same values in double.
class Typed {
 public:
  Typed(const std::vector<float>& values, DType dtype)
      : dtype_(dtype), storage_(static_cast<int64_t>(values.size()) * element_size(dtype)) {
    for (size_t i = 0; i < values.size(); ++i) set(static_cast<int64_t>(i), values[i]);
  }
  void set(int64_t i, float value) {
    if (dtype_ == DType::f32) {
      std::memcpy(storage_.data() + i * 4, &value, 4);
    } else {
      const uint16_t bits = dtype_ == DType::bf16 ? f32_to_bf16(value) : f32_to_f16(value);
      std::memcpy(storage_.data() + i * 2, &bits, 2);
    }
  }
  float operator[](int64_t i) {
    if (dtype_ == DType::f32) {
      float value;
      std::memcpy(&value, storage_.data() + i * 4, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, storage_.data() + i * 2, 2);
    return dtype_ == DType::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
  }
  void* data() { return storage_.data(); }
  DType dtype() const { return dtype_; }
  int64_t size() const { return storage_.size() / element_size(dtype_); }
  std::vector<unsigned char> bytes() { return storage_.copy(); }

 private:
  DType dtype_;
  Guarded<unsigned char> storage_;
};

inline std::vector<float> normal(int64_t count, unsigned seed, float scale = 1.0f) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> draw(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = draw(generator);
  return values;
}

inline std::vector<Isa> available_isas() {
  std::vector<Isa> found;
  for (int i = 0; i < static_cast<int>(Isa::count); ++i) {
    if (available(static_cast<Isa>(i))) found.push_back(static_cast<Isa>(i));
  }
  return found;
}

// A test that runs once for every instruction set of this machine.
class EveryIsa : public testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { setenv("DENSECL_CPU_ISA", name(GetParam()), 1); }
  void TearDown() override { unsetenv("DENSECL_CPU_ISA"); }
};

inline std::string isa_name(const testing::TestParamInfo<Isa>& info) { return name(info.param); }

#define DENSECL_FOR_EVERY_ISA(suite) \
  INSTANTIATE_TEST_SUITE_P(, suite, testing::ValuesIn(available_isas()), isa_name)

}  // namespace densecl::test

// Compiled without sanitizers: it touches no memory of a kernel, and is most of the emulator's
// time.
#include "cuda_emulator/products.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

namespace densecl::emulator {
namespace {

constexpr int extra_bits = 1;
constexpr int most_addends = 32;

// Exponent of a nonzero double: 2^e <= |x| < 2^(e+1). Zero gives a very small one.
inline int exponent_of(double x) {
  return static_cast<int>(std::bit_cast<uint64_t>(x) >> 52 & 0x7ff) - 1023;
}
inline double power_of_two(int e) {
  return std::bit_cast<double>(static_cast<uint64_t>(e + 1023) << 52);
}

}  // namespace

float aligned_sum(float c, const double* addends, int count) {
  int top = exponent_of(c);
  for (int i = 0; i < count; ++i) top = std::max(top, exponent_of(addends[i]));
  if (top == 1024) {  // an infinity or a NaN
    double sum = c;
    for (int i = 0; i < count; ++i) sum += addends[i];
    return static_cast<float>(sum);
  }
  if (top < -200) return 0.0f;
  const int last = top - 23 - extra_bits;  // weight of the last bit that is kept
  const double scale = power_of_two(-last);
  int64_t sum = static_cast<int64_t>(c * scale);
  for (int i = 0; i < count; ++i) sum += static_cast<int64_t>(addends[i] * scale);
  const double exact = static_cast<double>(sum) * power_of_two(last);
  // Towards zero: the 29 bits that a float lacks are dropped.
  return static_cast<float>(std::bit_cast<double>(std::bit_cast<uint64_t>(exact) & ~0x1fffffffull));
}

void add_product(float* d, const float* a, const float* b, int rows, int columns, int depth,
                 int step) {
  std::array<double, most_addends> products;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      float sum = d[r * columns + c];
      for (int k = 0; k < depth; k += step) {
        for (int i = 0; i < step; ++i) {
          products[static_cast<size_t>(i)] =
              static_cast<double>(a[r * depth + k + i]) * b[(k + i) * columns + c];
        }
        sum = aligned_sum(sum, products.data(), step);
      }
      d[r * columns + c] = sum;
    }
  }
}

}  // namespace densecl::emulator

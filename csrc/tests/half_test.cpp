// Conversions of the 16-bit types, over every pattern and every rounding boundary.
#include "densecl/half.h"

#include <cmath>
#include <limits>

#include "tests/support.h"

namespace densecl {
namespace {

// The value of a binary format with the given widths, straight from its definition.
double decode(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1));
  const double sign = (bits >> 15) & 1u ? -1.0 : 1.0;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1u << mantissa_bits), exponent - bias - mantissa_bits);
}

struct Format {
  const char* name;
  int exponent_bits, mantissa_bits;
  uint32_t infinity;
  float (*widen)(uint16_t);
  uint16_t (*narrow)(float);
};

class Half : public testing::TestWithParam<Format> {};

TEST_P(Half, EveryPatternWidensToItsValueAndComesBack) {
  const Format format = GetParam();
  for (uint32_t bits = 0; bits < 0x10000u; ++bits) {
    const float value = format.widen(static_cast<uint16_t>(bits));
    const double expected = decode(bits, format.exponent_bits, format.mantissa_bits);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(value)) << bits;
      ASSERT_TRUE(std::isnan(format.widen(format.narrow(value)))) << bits;
      continue;
    }
    ASSERT_EQ(value, expected) << bits;
    ASSERT_EQ(std::signbit(value), (bits & 0x8000u) != 0) << bits;
    ASSERT_EQ(format.narrow(value), bits);
  }
}

TEST_P(Half, RoundsToNearestAndTiesToEven) {
  const Format format = GetParam();
  for (uint32_t low = 0; low < format.infinity; ++low) {
    // What would follow the largest number, were there room, is where infinity begins to win.
    const double below = decode(low, format.exponent_bits, format.mantissa_bits);
    const double step = below - (low ? decode(low - 1, format.exponent_bits, format.mantissa_bits)
                                     : -decode(1, format.exponent_bits, format.mantissa_bits));
    const double above = low + 1 < format.infinity
                             ? decode(low + 1, format.exponent_bits, format.mantissa_bits)
                             : below + step;
    if (above > std::numeric_limits<float>::max()) continue;
    const float middle = static_cast<float>((below + above) / 2);
    if (static_cast<double>(middle) != (below + above) / 2) continue;  // below float32's grid
    const float infinity = std::numeric_limits<float>::infinity();
    for (const float sign : {1.0f, -1.0f}) {
      const uint32_t sign_bit = sign < 0 ? 0x8000u : 0u;
      ASSERT_EQ(format.narrow(sign * middle), (low % 2 ? low + 1 : low) | sign_bit) << low;
      ASSERT_EQ(format.narrow(sign * std::nextafter(middle, 0.0f)), low | sign_bit) << low;
      ASSERT_EQ(format.narrow(sign * std::nextafter(middle, infinity)), (low + 1) | sign_bit)
          << low;
    }
  }
}

TEST_P(Half, OverflowAndSpecialValues) {
  const Format format = GetParam();
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(format.narrow(infinity), format.infinity);
  EXPECT_EQ(format.narrow(-infinity), format.infinity | 0x8000u);
  EXPECT_EQ(format.narrow(std::numeric_limits<float>::max()), format.infinity);
  EXPECT_EQ(format.narrow(-0.0f), 0x8000u);
  // A NaN whose payload sits in the low bits alone must not become infinity.
  EXPECT_TRUE(std::isnan(format.widen(format.narrow(std::bit_cast<float>(0x7f800001u)))));
}

std::string format_name(const testing::TestParamInfo<Format>& format) { return format.param.name; }

INSTANTIATE_TEST_SUITE_P(, Half,
                         testing::Values(Format{"bf16", 8, 7, 0x7f80u, bf16_to_f32, f32_to_bf16},
                                         Format{"f16", 5, 10, 0x7c00u, f16_to_f32, f32_to_f16}),
                         format_name);

}  // namespace
}  // namespace densecl

// bfloat16 features that lie side by side go through vdpbf16ps as they stand: pairs of features,
// products exact, sums in float32. Everything else as with AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/aligned.h"
#include "densecl/dense_match.h"
#include "densecl/half.h"

#include "cpu/target_avx512bf16.h"

#include "cpu/dense_match_tile.h"
#include "cpu/vec_avx512.h"

namespace densecl {
namespace {

struct Vec : avx512::Vec {};  // a type of its own: its templates must not serve plain AVX-512

struct Bf16Dot {
  using Element = uint16_t;
  using Operand = __m512i;
  using Sum = __m512;
  static constexpr DType dtype = DType::bf16;
  static constexpr int width = 32;
  static constexpr int key_rows = 4;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Operand load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Sum add_product(Operand a, Operand b, Sum sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  static float total(Sum sum) { return Vec::sum(sum); }
};

}  // namespace

void match_avx512bf16(const MatchTask& task) {
  if (task.query->dtype == DType::bf16 && task.key->dtype == DType::bf16) {
    match_positions<Vec, Bf16Dot>(task);
  } else {
    match_positions<Vec, FloatDot<Vec>>(task);
  }
}

}  // namespace densecl

#include "cpu/target_end.h"
#endif

#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/aligned.h"
#include "densecl/half.h"
#include "densecl/dense_match.h"

#include "cpu/target_avx512.h"

#include "cpu/dense_match_tile.h"
#include "cpu/vec_avx512.h"

namespace densecl {
void match_avx512(const MatchTask& task) {
  match_positions<avx512::Vec, FloatDot<avx512::Vec>>(task);
}
}  // namespace densecl

#include "cpu/target_end.h"
#endif

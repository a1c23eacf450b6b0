#if defined(__aarch64__)
#include "cpu/dense_match_tile.h"
#include "cpu/vec_neon.h"

namespace densecl {
void match_neon(const MatchTask& task) { match_positions<neon::Vec, FloatDot<neon::Vec>>(task); }
}  // namespace densecl
#endif

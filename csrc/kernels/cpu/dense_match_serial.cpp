#include "cpu/dense_match_tile.h"
#include "cpu/vec_serial.h"

namespace densecl {
void match_serial(const MatchTask& task) {
  match_positions<serial::Vec, FloatDot<serial::Vec>>(task);
}
}  // namespace densecl

// How tensor cores add.
//
// Not as a float32 unit does: the addends of one step are aligned to the largest and cut off below
// it, and the sum is truncated. How many bits stay differs by chip and is not documented; here one
// bit more than float32 has stays, the least that measurements of sm_80 and later report. A kernel
// whose accuracy survives this survives the chip.
#pragma once

namespace densecl::emulator {

// c + the addends, in one step.
float aligned_sum(float c, const double* addends, int count);

// d (rows, columns) += a (rows, depth) b (depth, columns), `step` products a step; all row by row.
void add_product(float* d, const float* a, const float* b, int rows, int columns, int depth,
                 int step);

}  // namespace densecl::emulator

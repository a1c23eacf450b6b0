// One launch for up to two problems: a training step has two losses, one with 49 times the rows of
// the other, and the small one alone cannot fill the chip.
#pragma once

#include <ptx/device.cuh>

namespace densecl::cuda {

// As a kernel's parameter: the blocks of the first problem, then those of the second.
template <class Problem>
struct Batch {
  Problem of[2];
  int count;
  uint32_t second;  // the block with which the second problem begins
};

// The parameters of a kernel for the problems, and how many blocks they take in all.
template <class To, class From, class Make, class Blocks>
Batch<To> make_batch(const Batch<From>& from, Make make, Blocks blocks_of, unsigned* blocks) {
  Batch<To> batch{};
  batch.count = from.count;
  for (int i = 0; i < from.count; ++i) {
    batch.of[i] = make(from.of[i]);
    *blocks = (i == 0 ? 0 : batch.second) + static_cast<unsigned>(blocks_of(batch.of[i]));
    if (i == 0) batch.second = *blocks;
  }
  return batch;
}

// What a block works on: which problem, and its number among that one's blocks.
struct BatchBlock {
  int problem;
  uint32_t number;
  template <class Problem>
  __device__ __forceinline__ explicit BatchBlock(const Batch<Problem>& batch)
      : problem(blockIdx.x >= batch.second), number(blockIdx.x - (problem ? batch.second : 0u)) {}
};

}  // namespace densecl::cuda

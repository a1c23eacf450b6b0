// The CUDA key_gradient, emulated: sums in double precision, and the CPU kernel's bits.
#include "densecl/cuda/key_gradient.h"

#include "cuda_emulator/emulator.h"
#include "tests/key_gradient_case.h"

namespace densecl::cuda {
namespace {

using test::KeyGradientCase;

TEST(CudaKeyGradient, SumsTheRowsOfEveryKey) {
  emulator::for_each_schedule([](const emulator::Schedule&) {
    for (const auto& [images, positions, keys, features] : test::key_gradient_shapes) {
      for (const bool strided : {false, true}) {
        KeyGradientCase c(images, positions, keys, features, strided);
        KeyGradientCase cpu(images, positions, keys, features, strided);
        ASSERT_EQ(key_gradient(c.problem(), nullptr), Status::ok);
        c.check();
        SerialExecutor executor;
        densecl::key_gradient(cpu.problem(), executor);
        EXPECT_EQ(c.out.copy(), cpu.out.copy());
      }
    }
  });
}

TEST(CudaKeyGradient, AMatchOutOfRangeShowsAtTheNearestKey) {
  KeyGradientCase c(1, 3, 4, 1);
  c.match = {-1, 4, -2};
  float rows[] = {1.0f, 2.0f, 3.0f};
  KeyGradientProblem problem = c.problem();
  problem.rows.data = rows;
  ASSERT_EQ(key_gradient(problem, nullptr), Status::ok);
  EXPECT_EQ(c.out.copy(), (std::vector<float>{3.0f, 0.0f, 0.0f, 2.0f}));
}

}  // namespace
}  // namespace densecl::cuda

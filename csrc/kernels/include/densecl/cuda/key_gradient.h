// key_gradient on a GPU: the contract of densecl/key_gradient.h with device pointers.
#pragma once

#include "densecl/cuda/launch.h"
#include "densecl/key_gradient.h"

namespace densecl::cuda {

// One launch, none where there is nothing to write.
Status key_gradient(const KeyGradientProblem& problem, Stream stream);

}  // namespace densecl::cuda

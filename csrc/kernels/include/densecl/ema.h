// target = momentum * target + (1 - momentum) * source over a list of tensors (MoCo, eq. 2).
#pragma once

#include "densecl/executor.h"
#include "densecl/isa.h"
#include "densecl/types.h"

namespace densecl {

struct EmaPair {
  void* target;
  const void* source;
  DType target_dtype;
  DType source_dtype;
  int64_t count;  // elements, both dense and in the same order
};

// Arithmetic in float32, 12 bytes of traffic per float32 element.
Status ema_update(const EmaPair* pairs, int64_t pair_count, double momentum, Executor& executor);

}  // namespace densecl

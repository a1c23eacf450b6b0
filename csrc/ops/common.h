// What every binding needs: torch tensors as the kernels' views, torch's threads as an Executor.
//
// Arguments are checked in Python, which raises the errors that the documentation promises. The
// checks here guard memory for whoever calls torch.ops directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "densecl/executor.h"
#include "densecl/types.h"

namespace densecl::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " must be float32, bfloat16 or float16");
  }
  return DType::f32;
}

// (images, features, positions)
inline GridView grid_of(const Tensor& grid, const char* op, const char* argument) {
  STD_TORCH_CHECK(grid.dim() == 3, op, ": ", argument, " must have 3 dimensions, got ", grid.dim());
  return {grid.const_data_ptr(), dtype_of(grid, op, argument), grid.stride(0), grid.stride(1),
          grid.stride(2)};
}

// (rows, features)
inline RowsView rows_of(const Tensor& rows, const char* op, const char* argument) {
  STD_TORCH_CHECK(rows.dim() == 2, op, ": ", argument, " must have 2 dimensions, got ", rows.dim());
  return {rows.const_data_ptr(), dtype_of(rows, op, argument), rows.stride(0), rows.stride(1)};
}

// A one-element int64 tensor.
inline int64_t* counter_of(const Tensor& counter, const char* op, const char* argument) {
  STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Long && counter.numel() == 1, op, ": ",
                  argument, " must be one int64 element");
  return static_cast<int64_t*>(counter.data_ptr());
}

inline void check(Status status, const char* op) {
  STD_TORCH_CHECK(status == Status::ok, op, ": ", message(status));
}

// Tasks on torch's own thread pool: torch.set_num_threads rules.
class TorchExecutor final : public Executor {
 public:
  void run(int64_t tasks, void (*body)(void*, int64_t), void* context) override {
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) body(context, task);
    });
  }
};

}  // namespace densecl::binding

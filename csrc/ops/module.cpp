// The Python module _C: importing it registers the operators; it holds nothing else.
#include <Python.h>

#include "ops/common.h"

// Grids are (N, D, S); (M, D) rows come as (M, D, 1). loss is (N, S), the gradients per unit of
// each row's loss are (N, S, D) float32, empty where not asked for. scheduled is a momentum on the
// device, float64; momentum then says nothing.
STABLE_TORCH_LIBRARY(densecl_ext, m) {
  m.def(
      "_info_nce(Tensor query, Tensor positive, Tensor? match, Tensor queue, Tensor? filled, "
      "float temperature, bool normalize, bool grad_query, bool grad_positive) "
      "-> (Tensor loss, Tensor grad_query, Tensor grad_positive)");
  // _info_nce of rows without match and _info_nce of grids, in one go.
  m.def(
      "_joint_info_nce(Tensor query, Tensor positive, Tensor queue, Tensor? filled, "
      "Tensor query_grid, Tensor key_grid, Tensor match, Tensor dense_queue, Tensor? dense_filled, "
      "float temperature, bool normalize, bool grad_query, bool grad_positive, "
      "bool grad_query_grid, bool grad_key_grid) "
      "-> (Tensor loss, Tensor grad_query, Tensor grad_positive, "
      "Tensor dense_loss, Tensor grad_query_grid, Tensor grad_key_grid)");
  // grad_rows (N, S, D) float32, match (N, S) -> (N, key_positions, D).
  m.def("_key_gradient(Tensor grad_rows, Tensor match, int key_positions) -> Tensor");
  m.def("_dense_match(Tensor query_features, Tensor key_features, bool mutual) -> Tensor");
  m.def(
      "_ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, "
      "Tensor? scheduled=None) -> ()");
  m.def(
      "_enqueue_(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys, Tensor(c!)? filled, "
      "bool normalize) -> ()");
  // x and out (N, S, C) contiguous, all else (C,) float32; on a GPU only.
  m.def(
      "_split_batch_norm(Tensor x, Tensor(a!) out, Tensor? weight, Tensor? bias, "
      "Tensor(b!)? running_mean, Tensor(c!)? running_var, int groups, float factor, float eps) "
      "-> ()");
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

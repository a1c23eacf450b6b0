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
  m.def("_dense_match(Tensor query_features, Tensor key_features, bool mutual) -> Tensor");
  m.def(
      "_ema_update_(Tensor(a!)[] targets, Tensor[] sources, float momentum, "
      "Tensor? scheduled=None) -> ()");
  m.def(
      "_enqueue_(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys, Tensor(c!)? filled, "
      "bool normalize) -> ()");
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

// Conversions and exp2, exposed for the tests that hold every instruction set to its bounds.
#include <pybind11/pybind11.h>

#include "vmath.h"

namespace py = pybind11;

namespace {
template <typename T>
void narrow_typed(const float* in, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = from_float<T>(in[i]);
}
template <typename T>
void widen_typed(const T* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = to_float(in[i]);
}

// dtype 1: bf16, 2: fp16
void narrow(uintptr_t in, uintptr_t out, int64_t n, int dtype) {
  auto* x = reinterpret_cast<const float*>(in);
  if (dtype == static_cast<int>(DType::kBF16))
    narrow_typed(x, reinterpret_cast<bf16*>(out), n);
  else
    narrow_typed(x, reinterpret_cast<f16*>(out), n);
}
void widen(uintptr_t in, uintptr_t out, int64_t n, int dtype) {
  auto* y = reinterpret_cast<float*>(out);
  if (dtype == static_cast<int>(DType::kBF16))
    widen_typed(reinterpret_cast<const bf16*>(in), y, n);
  else
    widen_typed(reinterpret_cast<const f16*>(in), y, n);
}

// out[i] = 2^in[i], n a multiple of the vector's length
void exp2_all(uintptr_t in, uintptr_t out, int64_t n) {
  auto* x = reinterpret_cast<const float*>(in);
  auto* y = reinterpret_cast<float*>(out);
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) store(y + i, exp2_small(load(x + i)));
}
}  // namespace

void bind_numerics(py::module_& m) {
  m.def("narrow", &narrow);
  m.def("widen", &widen);
  m.def("exp2", &exp2_all);
}

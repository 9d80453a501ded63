// Conversions and exp2, exposed for the tests that hold every instruction set to its bounds.
#include "kernels.h"
#include "simd.h"
#include "vmath.h"

void narrow(const float* in, void* out, int64_t n, DType dtype) {
  for (int64_t i = 0; i < n; i++) {
    if (dtype == DType::kBF16)
      static_cast<bf16*>(out)[i] = from_float<bf16>(in[i]);
    else
      static_cast<f16*>(out)[i] = from_float<f16>(in[i]);
  }
}

void widen(const void* in, float* out, int64_t n, DType dtype) {
  for (int64_t i = 0; i < n; i++)
    out[i] = dtype == DType::kBF16 ? to_float(static_cast<const bf16*>(in)[i])
                                   : to_float(static_cast<const f16*>(in)[i]);
}

void exp2_all(const float* in, float* out, int64_t n) {
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) store(out + i, exp2_small(load(in + i)));
}

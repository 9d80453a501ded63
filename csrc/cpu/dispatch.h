// From a dtype code of Python to a type.
#pragma once

#include "kernels.h"
#include "simd.h"

template <typename F>
void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::kF32)
    f(float{});
  else if (dtype == DType::kBF16)
    f(bf16{});
  else
    f(f16{});
}

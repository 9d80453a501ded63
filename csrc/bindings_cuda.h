// The part of the Python module that hands calls to the CUDA library.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/kernels.h"

void bind_cuda(pybind11::class_<CudaKernels>& cuda);

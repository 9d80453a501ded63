// The part of the Python module that serves a decoding step's calls past PyTorch's Python layers.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/kernels.h"

void bind_direct(pybind11::module_& m);

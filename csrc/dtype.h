// What Python tells the libraries of kernels apart by.
#pragma once

#include <array>
#include <cstdint>

enum class DType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kU8 = 3 };

using Strides = std::array<int64_t, 3>;  // elements from one batch, token, head to the next

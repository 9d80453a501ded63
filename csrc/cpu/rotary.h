// Rotation of fp32 rows: the first half of rotary_dim with the second, the rest as it is.
#pragma once

#include <algorithm>

#include "simd.h"

// direction 1 rotates, -1 is the transpose, for gradients; cos and sin [half] of the row's position
inline void rotate_row(float* row, const float* cos, const float* sin, int64_t half,
                       float direction) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    vf a = load(row + i), b = load(row + half + i), c = load(cos + i);
    vf s = load(sin + i) * direction;
    store(row + i, a * c - b * s);
    store(row + half + i, b * c + a * s);
  }
  if (i < half) {
    int n = static_cast<int>(half - i);
    vf a = load_partial(row + i, n), b = load_partial(row + half + i, n);
    vf c = load_partial(cos + i, n), s = load_partial(sin + i, n) * direction;
    store_partial(row + i, a * c - b * s, n);
    store_partial(row + half + i, b * c + a * s, n);
  }
}

// out[0 ... n) = in, widened; out[n ... padded) = 0
template <typename T>
inline void load_row(const T* in, float* out, int64_t n, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) {
    store(out + i, load_partial(in + i, static_cast<int>(n - i)));
    i += kLanes;
  }
  for (; i < padded; i += kLanes) store(out + i, vf{});
}

template <typename T>
inline void store_row(const float* in, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(in + i));
  if (i < n) store_partial(out + i, load(in + i), static_cast<int>(n - i));
}

// Products of few rows with the rows of a weight: both run along memory, so neither is packed.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

// In registers: through memory, the sums at the end of a tile cost a tenth of it.
template <int N>
inline float add_lanes(const float __attribute__((vector_size(4 * N))) & v) {
  if constexpr (N == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    typedef float half __attribute__((vector_size(2 * N)));
    half low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return add_lanes<N / 2>(low + high);
  }
}

// One step along a row: floats, or pairs of bf16 that multiply in one instruction into fp32 sums.
template <typename T>
struct Step {
  static constexpr int kElements = kLanes;
  static vf read(const T* p) { return load(p); }
  static vf read(const T* p, int n) { return load_partial(p, n); }
  static void add(vf& sum, vf a, vf b) { sum += a * b; }
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  static constexpr int kElements = 2 * kLanes;
  static __m512bh read(const bf16* p) { return bit_cast<__m512bh>(_mm512_loadu_si512(p)); }
  static __m512bh read(const bf16* p, int n) {
    bf16 lanes[kElements] = {};
    std::memcpy(lanes, p, n * sizeof(bf16));
    return read(lanes);
  }
  static void add(vf& sum, __m512bh a, __m512bh b) {
    sum = (vf)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};
#endif

// Rows that a tile asks memory for, a line of each a step: the processor drops long bursts of
// prefetches, and those from a page that it has not looked up.
template <typename T>
struct Ahead {
  const T* row = nullptr;
  int64_t stride = 0, rows = 0;

  void look_up(int64_t n) const {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i : {int64_t{0}, n - 1})
        (void)*static_cast<const volatile char*>(
            reinterpret_cast<const char*>(row + r * stride + i));
  }
  void ask(int64_t i) const {
    for (int64_t r = 0; r < rows; r++) __builtin_prefetch(row + r * stride + i);
  }
};

// out[m][e] += x[m] . weight[e] over n elements. An element's sum does not depend on M and N.
template <int M, int N, typename T>
void dot_tile(const T* x, int64_t x_stride, const T* weight, int64_t weight_stride, int64_t n,
              float* out, int64_t out_stride, const Ahead<T>& ahead = {}) {
  vf acc[M][N] = {};
  ahead.look_up(n);
  auto step = [&](auto read, int64_t i) {
    ahead.ask(i);
    decltype(read(x)) row[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) row[m] = read(x + m * x_stride + i);
#pragma GCC unroll 8
    for (int e = 0; e < N; e++) {
      auto w = read(weight + e * weight_stride + i);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) Step<T>::add(acc[m][e], row[m], w);
    }
  };
  int64_t i = 0;
  for (; i + Step<T>::kElements <= n; i += Step<T>::kElements)
    step([](const T* p) { return Step<T>::read(p); }, i);
  for (; i < n; i += Step<T>::kElements) {
    int left = static_cast<int>(n - i);
    step([left](const T* p) { return Step<T>::read(p, left); }, i);
  }
  for (int m = 0; m < M; m++)
    for (int e = 0; e < N; e++) out[m * out_stride + e] += add_lanes<kLanes>(acc[m][e]);
}

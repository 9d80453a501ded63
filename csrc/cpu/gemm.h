// The register-tiled inner loop every CPU kernel builds its matrix products on.
// A panel: a[k][kMR]; B panel: b[k][kNR]; both contiguous, zero-padded at the edges.
#pragma once

#include "simd.h"

#if defined(__AVX512F__)
constexpr int kMR = 12, kNV = 2;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kMR = 6, kNV = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kMR = 8, kNV = 3;  // 24 of 32
#else
constexpr int kMR = 6, kNV = 2;
#endif
constexpr int kNR = kNV * kLanes;

// acc[m][n] += sum over k of a[k][m] * b[k][n]
inline void gemm_micro_kernel(int64_t depth, const float* __restrict a, const float* __restrict b,
                              vf (&acc)[kMR][kNV]) {
  for (int64_t k = 0; k < depth; k++) {
    vf bv[kNV];
#pragma GCC unroll 4
    for (int n = 0; n < kNV; n++) bv[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kMR; m++) {
#pragma GCC unroll 4
      for (int n = 0; n < kNV; n++) acc[m][n] += a[m] * bv[n];
    }
    a += kMR;
    b += kNR;
  }
}

// The same at any tile size, each step of k moving a by lda and b by ldb floats.
template <int MR, int NV>
inline void micro_kernel(int64_t depth, const float* __restrict a, int64_t lda,
                         const float* __restrict b, int64_t ldb, vf (&acc)[MR][NV]) {
  for (int64_t k = 0; k < depth; k++) {
    vf bv[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) bv[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) acc[m][n] += a[m] * bv[n];
    }
    a += lda;
    b += ldb;
  }
}

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

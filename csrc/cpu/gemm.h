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

// A long sum of equal signs (flat image areas, one token after another) loses bits, so the terms of
// each step are summed apart.
constexpr int64_t kDepthStep = 128;

// acc[m][n] += sum over k of a[k][m] * b[k][n]
inline void gemm_micro_kernel(int64_t depth, const float* __restrict a, const float* __restrict b,
                              vf (&acc)[kMR][kNV]) {
  for (int64_t begin = 0; begin < depth; begin += kDepthStep) {
    vf part[kMR][kNV] = {};
    int64_t end = depth < begin + kDepthStep ? depth : begin + kDepthStep;
    for (int64_t k = begin; k < end; k++) {
      vf bv[kNV];
#pragma GCC unroll 4
      for (int n = 0; n < kNV; n++) bv[n] = load(b + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kMR; m++) {
#pragma GCC unroll 4
        for (int n = 0; n < kNV; n++) part[m][n] += a[m] * bv[n];
      }
      a += kMR;
      b += kNR;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kMR; m++) {
#pragma GCC unroll 4
      for (int n = 0; n < kNV; n++) acc[m][n] += part[m][n];
    }
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

// What a panel holds at one step of k: a float, or on CPUs with bf16 dot products two bf16 that
// follow each other along k (the first in the low half), which multiply twice as fast. Only inputs
// that are bf16 anyway are packed so; the sums are fp32 either way.
template <typename Unit>
inline constexpr int units_per = 0;
template <>
inline constexpr int units_per<float> = 1;
template <>
inline constexpr int units_per<uint32_t> = 2;

template <typename Unit>
inline Unit make_unit(const float* x);
template <>
inline float make_unit<float>(const float* x) {
  return *x;
}

template <typename T>
struct PanelUnitOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct PanelUnitOf<bf16> {
  using type = uint32_t;
};
template <>
inline uint32_t make_unit<uint32_t>(const float* x) {
  return from_float<bf16>(x[0]).bits | static_cast<uint32_t>(from_float<bf16>(x[1]).bits) << 16;
}
// Lane by lane, rounded to nearest even; subnormals are 0, as they are to the dot product.
inline vu make_pair(vf low, vf high) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);  // low in the first half
  return (vu)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)both);
}
inline void store_pair(uint32_t* out, vf low, vf high) {
  vu pair = make_pair(low, high);
  std::memcpy(out, &pair, sizeof(pair));
}

inline void gemm_micro_kernel(int64_t depth, const uint32_t* __restrict a,
                              const uint32_t* __restrict b, vf (&acc)[kMR][kNV]) {
  for (int64_t begin = 0; begin < depth; begin += kDepthStep) {
    __m512 part[kMR][kNV] = {};
    int64_t end = depth < begin + kDepthStep ? depth : begin + kDepthStep;
    for (int64_t k = begin; k < end; k++) {
      __m512bh bv[kNV];
#pragma GCC unroll 4
      for (int n = 0; n < kNV; n++) std::memcpy(&bv[n], b + n * kLanes, sizeof(bv[n]));
#pragma GCC unroll 16
      for (int m = 0; m < kMR; m++) {
        __m512bh av = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[m]));
#pragma GCC unroll 4
        for (int n = 0; n < kNV; n++) part[m][n] = _mm512_dpbf16_ps(part[m][n], av, bv[n]);
      }
      a += kMR;
      b += kNR;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kMR; m++) {
#pragma GCC unroll 4
      for (int n = 0; n < kNV; n++) acc[m][n] += (vf)part[m][n];
    }
  }
}

template <int MR, int NV>
inline void micro_kernel(int64_t depth, const uint32_t* __restrict a, int64_t lda,
                         const uint32_t* __restrict b, int64_t ldb, vf (&acc)[MR][NV]) {
  for (int64_t k = 0; k < depth; k++) {
    __m512bh bv[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) std::memcpy(&bv[n], b + n * kLanes, sizeof(bv[n]));
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      __m512bh av = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[m]));
#pragma GCC unroll 8
      for (int n = 0; n < NV; n++) acc[m][n] = (vf)_mm512_dpbf16_ps((__m512)acc[m][n], av, bv[n]);
    }
    a += lda;
    b += ldb;
  }
}
#endif
template <typename T>
using PanelUnit = typename PanelUnitOf<T>::type;

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

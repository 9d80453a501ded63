// Vector functions on top of simd.h: maximum, exp2, and transposition by perfect shuffles.
#pragma once

#include "simd.h"

// Larger of bound and x; x where x is not a number.
inline vf max_or_nan(vf bound, vf x) { return bound > x ? bound : x; }

// 2^x within 1 ulp of the true value on [-126, 127] (1.25 without FMA; tests/test_attention.py
// holds it), and exactly 0 below -126.5, minus infinity included. Not for x above 127.
inline vf exp2_small(vf x) {
  constexpr float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23 makes the FPU round to an integer
  x = max_or_nan(splat(-127.0f), x);
  vf shifted = x + kShift;
  vf f = x - (shifted - kShift);
  vf p = splat(1.5353362020e-04f);  // minimax of relative error on [-1/2, 1/2], p(0) = 1
  p = p * f + 1.3398874465e-03f;
  p = p * f + 9.6184373577e-03f;
  p = p * f + 5.5503324710e-02f;
  p = p * f + 2.4022647914e-01f;
  p = p * f + 6.9314720286e-01f;
  p = p * f + 1.0f;
  return p * bit_cast<vf>(bit_cast<vu>(shifted) << 23);
}

// e^x from the above; rounding x log2(e) adds up to |x| / 2 ulp.
inline vf exp_small(vf x) { return exp2_small(x * 1.44269504088896340736f); }

// e^x within 2 ulp for x in [-87, 87]: the multiple of ln 2 is taken off in two parts.
inline vf exp_near(vf x) {
  constexpr float kShift = 12582912.0f + 127.0f;
  vf shifted = x * 1.44269504088896340736f + kShift, n = shifted - kShift;
  vf rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return exp2_small(rest * 1.44269504088896340736f) * bit_cast<vf>(bit_cast<vu>(shifted) << 23);
}

// x, opaque to the compiler: a product is rounded here instead of fused with what follows.
inline vf rounded(vf x) {
#if defined(__x86_64__)
  __asm__("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#endif
  return x;
}

// a0 b0 a1 b1 ...: the low half of two vectors riffled into one, and the high half.
#if defined(__AVX512F__)
inline vf riffle_low(vf a, vf b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline vf riffle_high(vf a, vf b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
#elif defined(__AVX2__)
inline vf riffle_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline vf riffle_high(vf a, vf b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
inline vf riffle_low(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline vf riffle_high(vf a, vf b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// The opposite: a vector of every second lane of two that follow each other.
#if defined(__AVX512F__)
inline vf even_lanes(vf a, vf b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
inline vf odd_lanes(vf a, vf b) {
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#elif defined(__AVX2__)
inline vf even_lanes(vf a, vf b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
}
inline vf odd_lanes(vf a, vf b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15); }
#else
inline vf even_lanes(vf a, vf b) { return __builtin_shufflevector(a, b, 0, 2, 4, 6); }
inline vf odd_lanes(vf a, vf b) { return __builtin_shufflevector(a, b, 1, 3, 5, 7); }
#endif

// N vectors [N][kLanes] become [kLanes][N], stored one after the other in the same N vectors. Each
// riffle of the upper with the lower half moves the vector index's top bit below the lane's bits.
template <int N>
inline void transpose(vf (&r)[N]) {
#pragma GCC unroll 4
  for (int width = 1; width < N; width *= 2) {
    vf t[N];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; i++) {
      t[2 * i] = riffle_low(r[i], r[i + N / 2]);
      t[2 * i + 1] = riffle_high(r[i], r[i + N / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < N; i++) r[i] = t[i];
  }
}

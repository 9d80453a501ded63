// Bytes of a weight against pairs of integers of 16 bits: exact sums of their products.
#pragma once

#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

constexpr int64_t kInt8Block = 32;    // inputs that share a scale
constexpr int64_t kInt8Outputs = 16;  // whose bytes lie beside each other, four inputs of each
constexpr int64_t kInt8Four = 4;

inline vu load_fours(const uint8_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// The bytes of inputs 0 and 2, and 1 and 3, as integers of 16 bits.
inline vu even_bytes(vu v) { return v & 0x00ff00ffu; }
inline vu odd_bytes(vu v) { return (v >> 8) & 0x00ff00ffu; }

// sum += both products of a lane's two integers and those of `pair`
inline vi add_products(vi sum, vu bytes, int32_t pair) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)bytes, _mm512_set1_epi32(pair));
#elif defined(__AVX512BW__)
  return sum + (vi)_mm512_madd_epi16((__m512i)bytes, _mm512_set1_epi32(pair));
#elif defined(__AVX2__)
  return sum + (vi)_mm256_madd_epi16((__m256i)bytes, _mm256_set1_epi32(pair));
#elif defined(__SSE2__)
  return sum + (vi)_mm_madd_epi16((__m128i)bytes, _mm_set1_epi32(pair));
#else
  vi low = bit_cast<vi>(bytes & 0xffffu), high = bit_cast<vi>(bytes >> 16);
  return sum + low * static_cast<int16_t>(pair & 0xffff) + high * (pair >> 16);
#endif
}

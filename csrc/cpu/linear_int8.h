// Blocks of 32 signed bytes against integers of 16 bits: exact sums of their products, as floats.
#pragma once

#include "simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

constexpr int64_t kInt8Block = 32;

#if defined(__AVX512BW__)
using Int8Lanes = __m512i;
inline Int8Lanes widen_bytes(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline vf dot_bytes(Int8Lanes w, const int16_t* x) {
  return (vf)_mm512_cvtepi32_ps(_mm512_madd_epi16(w, _mm512_loadu_si512(x)));
}
#elif defined(__AVX2__)
struct Int8Lanes {
  __m256i part[2];
};
inline Int8Lanes widen_bytes(const int8_t* p) {
  auto* from = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(from)),
          _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1))};
}
inline vf dot_bytes(const Int8Lanes& w, const int16_t* x) {
  auto* at = reinterpret_cast<const __m256i*>(x);
  __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(w.part[0], _mm256_loadu_si256(at)),
                                 _mm256_madd_epi16(w.part[1], _mm256_loadu_si256(at + 1)));
  return (vf)_mm256_cvtepi32_ps(sum);
}
#else
typedef int8_t bytes4 __attribute__((vector_size(4)));
typedef int16_t shorts4 __attribute__((vector_size(8)));
struct Int8Lanes {
  vi part[kInt8Block / kLanes];
};
static_assert(kLanes == 4, "four lanes of 32 bits");
inline Int8Lanes widen_bytes(const int8_t* p) {
  Int8Lanes lanes;
  for (int i = 0; i < kInt8Block / kLanes; i++) {
    bytes4 four;
    std::memcpy(&four, p + i * kLanes, sizeof(four));
    lanes.part[i] = __builtin_convertvector(four, vi);
  }
  return lanes;
}
inline vf dot_bytes(const Int8Lanes& w, const int16_t* x) {
  vi sum = {};
  for (int i = 0; i < kInt8Block / kLanes; i++) {
    shorts4 four;
    std::memcpy(&four, x + i * kLanes, sizeof(four));
    sum += w.part[i] * __builtin_convertvector(four, vi);
  }
  return __builtin_convertvector(sum, vf);
}
#endif

// MXFP4 codes to floats: 16 bytes hold a block of 32, the even index in a byte's low nibble.
#pragma once

#include "simd.h"
#include "vmath.h"

constexpr int64_t kBlock = 32, kBlockBytes = 16;

// 2^(byte - 127); 255 is NaN.
struct Mxfp4Scales {
  float value[256];
  Mxfp4Scales() {
    value[0] = bit_cast<float>(1u << 22);
    for (uint32_t i = 1; i < 255; i++) value[i] = bit_cast<float>(i << 23);
    value[255] = bit_cast<float>(0x7fc00000u);
  }
};
inline const Mxfp4Scales kMxfp4Scales;

// GCC takes a conversion of four sizes apart, element by element.
inline vu load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  typedef uint8_t vb __attribute__((vector_size(kLanes)));
  vb bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, vu);
#endif
}

// E2M1 values of the codes in the low four bits; what lies above them is ignored.
#if defined(__AVX512F__)
inline vf decode(vu code) {
  const __m512 table =
      _mm512_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6);
  return (vf)_mm512_permutexvar_ps((__m512i)code, table);
}
#elif defined(__AVX2__)
inline vf decode(vu code) {
  const __m256 table = _mm256_setr_ps(0, .5f, 1, 1.5f, 2, 3, 4, 6);
  vu sign = (code << 28) & 0x80000000u;
  return bit_cast<vf>(bit_cast<vu>((vf)_mm256_permutevar8x32_ps(table, (__m256i)code)) ^ sign);
}
#else
inline vf decode(vu code) {
  vu bits = (code & 7u) << 22;
  vf small = bit_cast<vf>(bits | 0x3f800000u) - 1.0f;  // 0 and 1/2
  vi is_small = bit_cast<vi>(bits) < (2 << 22);
  vu value = (bit_cast<vu>(is_small) & bit_cast<vu>(small)) |
             (bit_cast<vu>(~is_small) & (bits + 0x3f000000u));
  return bit_cast<vf>(value ^ ((code << 28) & 0x80000000u));
}
#endif

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// 16 vectors of 16 bytes, transposed by riffles as vmath.h's.
inline void transpose_bytes(Bytes16 (&r)[16]) {
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    Bytes16 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      t[2 * i] = __builtin_shufflevector(r[i], r[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                         6, 22, 7, 23);
      t[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                             13, 29, 14, 30, 15, 31);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = t[i];
  }
}

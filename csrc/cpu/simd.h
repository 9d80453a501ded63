// One vector type at the width of the instruction set this file is compiled for.
// vf: kLanes floats. Loads and stores convert from and to bf16 / fp16 (round to nearest even).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float vf __attribute__((vector_size(kVectorBytes)));
typedef int32_t vi __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vu __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vh __attribute__((vector_size(kVectorBytes / 2)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// x - 0 is x, signed zeros included, and the compiler makes it a plain broadcast.
inline vf splat(float x) { return x - vf{}; }

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }

inline vf load(const bf16* p) {
  vh h;
  std::memcpy(&h, p, sizeof(h));
  return bit_cast<vf>(__builtin_convertvector(h, vu) << 16);
}

inline vu round_to_bf16(vf v) {
  vu u = bit_cast<vu>(v);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  vi is_nan = v != v;
  return bit_cast<vu>((bit_cast<vi>(nan) & is_nan) | (bit_cast<vi>(rounded) & ~is_nan));
}
inline void store(bf16* p, vf v) {
  vh h = __builtin_convertvector(round_to_bf16(v), vh);
  std::memcpy(p, &h, sizeof(h));
}

#if defined(__AVX512F__)
inline vf load(const f16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(f16* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
}
#elif defined(__F16C__)
inline vf load(const f16* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(f16* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
}
#else
// The half's exponent and mantissa, moved into a float's places, are the value times 2^-112.
inline vf load(const f16* p) {
  vh h;
  std::memcpy(&h, p, sizeof(h));
  vu u = __builtin_convertvector(h, vu);
  vu sign = (u & 0x8000u) << 16, magnitude = (u & 0x7fffu) << 13;
  vf v = bit_cast<vf>(magnitude) * 0x1p112f;
  vi special = bit_cast<vi>(magnitude) >= 0x0f800000;  // infinity and NaN
  vu bits = bit_cast<vu>(v) | (bit_cast<vu>(special) & 0x7f800000u);
  return bit_cast<vf>(bits | sign);
}
// Adding a power of two whose last mantissa bit is the half's last bit makes the FPU round.
inline void store(f16* p, vf v) {
  vu u = bit_cast<vu>(v);
  vu sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  vi exponent = bit_cast<vi>(magnitude & 0x7f800000u);
  vi low = exponent < 0x38800000;  // below the smallest normal half, 2^-14
  vi clamped = (low & 0x38800000) | (~low & exponent);
  vf anchor = bit_cast<vf>(clamped + (13 << 23));  // ulp(anchor) = ulp of the half
  vf rounded = (bit_cast<vf>(magnitude) + anchor) - anchor;
  vu r = bit_cast<vu>(rounded);
  vu normal = (r - 0x38000000u) >> 13;
  vu subnormal = bit_cast<vu>(__builtin_convertvector(rounded * 0x1p24f, vi));
  vi is_sub = bit_cast<vi>(r) < 0x38800000;
  vi over = (bit_cast<vi>(r) >= 0x47800000) | (bit_cast<vi>(magnitude) >= 0x47800000);  // 2^16
  vi nan = v != v;
  vu h = (bit_cast<vu>(is_sub) & subnormal) | (bit_cast<vu>(~is_sub) & normal);
  h = (bit_cast<vu>(over) & 0x7c00u) | (bit_cast<vu>(~over) & h);
  h = (bit_cast<vu>(nan) & 0x7e00u) | (bit_cast<vu>(~nan) & h);
  vh out = __builtin_convertvector(h | sign, vh);
  std::memcpy(p, &out, sizeof(out));
}
#endif

// One element at a time goes through the vector code, so both round alike.
template <typename T>
inline float to_float(T x) {
  T lanes[kLanes] = {x};
  return load(lanes)[0];
}
template <>
inline float to_float<float>(float x) {
  return x;
}
template <typename T>
inline T from_float(float x) {
  T lanes[kLanes];
  store(lanes, vf{x});
  return lanes[0];
}
template <>
inline float from_float<float>(float x) {
  return x;
}

// The first n lanes (0 <= n <= kLanes); the rest are zero / untouched.
template <typename T>
inline vf load_partial(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
template <typename T>
inline void store_partial(T* p, vf v, int n) {
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// Past the caches, for outputs larger than them: no line is read before it is written. p is aligned
// to what is stored; finish_streams() comes before another thread reads.
template <typename T>
inline void stream(T* p, vf v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
  } else {
    alignas(kVectorBytes) T lanes[kLanes];
    store(lanes, v);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(lanes));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
  } else {
    alignas(kVectorBytes) T lanes[kLanes];
    store(lanes, v);
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(lanes));
  }
#else
  store(p, v);
#endif
}
inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

inline float reduce_add(vf v) {
  float s = 0;
  for (int i = 0; i < kLanes; i++) s += v[i];
  return s;
}

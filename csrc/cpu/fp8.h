// fp8 e4m3 (no infinities, largest 448): widened exactly, narrowed to nearest even and saturated.
#pragma once

#include <cmath>

#include "simd.h"

struct e4m3 {
  uint8_t bits;
};
typedef uint8_t vb __attribute__((vector_size(kLanes)));

// Exponent and mantissa, moved into a float's places, are the value times 2^-120.
inline vf load(const e4m3* p) {
  vb b;
  std::memcpy(&b, p, sizeof(b));
  vu u = __builtin_convertvector(b, vu);
  vu magnitude = u & 0x7fu;
  vi nan = bit_cast<vi>(magnitude) == 0x7f;
  vf v = bit_cast<vf>(magnitude << 20) * 0x1p120f;
  return bit_cast<vf>(bit_cast<vu>(v) | (u & 0x80u) << 24 | (bit_cast<vu>(nan) & 0x7fc00000u));
}

inline e4m3 to_e4m3(float x) {
  uint32_t u = bit_cast<uint32_t>(x), sign = u >> 24 & 0x80u;
  float magnitude = bit_cast<float>(u & 0x7fffffffu);
  uint32_t code;
  if (magnitude != magnitude) {
    code = 0x7f;
  } else if (magnitude >= 448.0f) {
    code = 0x7e;
  } else if (magnitude < 0x1p-6f) {
    code = static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p9f));
  } else {
    uint32_t bits = bit_cast<uint32_t>(magnitude);
    code = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  }
  return {static_cast<uint8_t>(code | sign)};
}

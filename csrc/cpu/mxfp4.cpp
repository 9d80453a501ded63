// MXFP4: blocks of 32 four-bit floats that share a power of two, packed and unpacked.
#include <algorithm>
#include <array>

#include "buffer.h"
#include "dispatch.h"
#include "kernels.h"
#include "simd.h"

namespace {
constexpr int kBlock = 32, kBytes = kBlock / 2;
constexpr int kNan = 0x7f800000;  // magnitudes above are NaN
constexpr float kMagnitude[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};

// The values of a byte's two codes, low nibble first.
std::array<std::array<float, 2>, 256> byte_values() {
  std::array<std::array<float, 2>, 256> table;
  for (int byte = 0; byte < 256; byte++)
    for (int i = 0; i < 2; i++) {
      int code = byte >> 4 * i & 15;
      table[byte][i] = code & 8 ? -kMagnitude[code & 7] : kMagnitude[code & 7];
    }
  return table;
}

// 2^(scale - 127); 2^-127 is subnormal, 255 is NaN
float scale_value(uint8_t scale) {
  uint32_t bits = scale == 0 ? 0x00400000u : static_cast<uint32_t>(scale) << 23;
  return bit_cast<float>(scale == 255 ? 0x7fc00000u : bits);
}

// Nearest code of each, ties to the even one. Comparisons give -1 where they hold.
inline vi codes_of(vf v, float inverse) {
  vi sign = bit_cast<vi>(bit_cast<vu>(v) >> 28) & 8;
  vf a = bit_cast<vf>(bit_cast<vi>(v) & 0x7fffffff) * inverse;
  vi steps = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) +
             (a > 5.0f);
  return sign | -steps;
}

template <typename T>
void quantize_block(const T* in, uint8_t* out, uint8_t* scale) {
  vf v[kBlock / kLanes];
  vi most = {};
  for (int i = 0; i < kBlock / kLanes; i++) {
    v[i] = load(in + i * kLanes);
    vi magnitude = bit_cast<vi>(v[i]) & 0x7fffffff;  // floats above zero order as their bits do
    vi above = magnitude > most;
    most = (magnitude & above) | (most & ~above);
  }
  int largest = 0;
  for (int i = 0; i < kLanes; i++) largest = std::max(largest, most[i]);
  if (largest > kNan) {
    *scale = 255;
    std::fill_n(out, kBytes, 0);
    return;
  }
  int byte = std::max((largest >> 23) - 2, 0);
  *scale = static_cast<uint8_t>(byte);
  float inverse = bit_cast<float>((254 - byte) << 23);
  int32_t codes[kBlock];
  for (int i = 0; i < kBlock / kLanes; i++) {
    vi c = codes_of(v[i], inverse);
    std::memcpy(codes + i * kLanes, &c, sizeof(c));
  }
  for (int i = 0; i < kBytes; i++)
    out[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
}
}  // namespace

void mxfp4_quantize(DType dtype, const void* in, int64_t count, uint8_t* blocks, uint8_t* scales) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* values = static_cast<const T*>(in);
#pragma omp parallel for schedule(static) if (count > 256)
    for (int64_t i = 0; i < count; i++)
      quantize_block(values + i * kBlock, blocks + i * kBytes, scales + i);
  });
}

void mxfp4_dequantize(DType dtype, const uint8_t* blocks, const uint8_t* scales, int64_t count,
                      void* out) {
  static const auto table = byte_values();
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* values = static_cast<T*>(out);
    advise_huge_pages(out, count * kBlock * sizeof(T));
#pragma omp parallel for schedule(static) if (count > 256)
    for (int64_t i = 0; i < count; i++) {
      float scale = scale_value(scales[i]);
      for (int b = 0; b < kBytes; b += kLanes / 2) {
        float pairs[kLanes];
        for (int j = 0; j < kLanes / 2; j++)
          std::memcpy(pairs + 2 * j, &table[blocks[i * kBytes + b + j]], 2 * sizeof(float));
        store(values + i * kBlock + 2 * b, load(pairs) * scale);
      }
    }
  });
}

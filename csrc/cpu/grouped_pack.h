// One expert's weights as panels of floats, whatever they are stored as.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "grouped_gemm.h"
#include "mxfp4_decode.h"
#include "vmath.h"

namespace grouped {
struct Matrix {  // one expert's
  const Stack* of;
  const void* data;
  const uint8_t* scales;
};

inline Matrix matrix_of(const Stack& stack, int64_t expert) {
  int64_t size = stack.k * stack.n;
  if (stack.scales != nullptr)
    return {&stack, static_cast<const uint8_t*>(stack.data) + expert * size / 2,
            stack.scales + expert * size / kBlock};
  int64_t bytes = stack.dtype == DType::kF32 ? 4 : 2;
  return {&stack, static_cast<const char*>(stack.data) + expert * size * bytes, nullptr};
}

// Where column c of a packed chunk of `depth` rows lies: panels [c / kNR][k][kNR].
inline float* packed_at(float* out, int64_t depth, int64_t k, int64_t c) {
  return out + (c / kNR * depth + k) * kNR + c % kNR;
}

// Columns [n0, n0 + count) and rows [k0, k0 + depth) to places [at, at + round_up(count, kNR)).
template <typename T>
void pack_wide_rows(const T* data, int64_t ld, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                    float* out, int64_t at) {
  int64_t padded = round_up(count, kNR);
  for (int64_t k = 0; k < depth; k++) {
    const T* row = data + (k0 + k) * ld + n0;
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf v = c + kLanes <= count
                 ? load(row + c)
                 : load_partial(row + c, static_cast<int>(std::max<int64_t>(0, count - c)));
      store(packed_at(out, depth, k, at + c), v);
    }
  }
}

template <typename T>
void pack_deep_rows(const T* data, int64_t ld, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                    float* out, int64_t at) {
  int64_t padded = round_up(count, kNR);
  for (int64_t c = 0; c < padded; c += kLanes)
    for (int64_t k = 0; k < depth; k += kLanes) {
      int deep = static_cast<int>(std::min<int64_t>(kLanes, depth - k));
      vf r[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const T* row = data + (n0 + c + i) * ld + k0 + k;
        r[i] = c + i >= count ? vf{} : deep == kLanes ? load(row) : load_partial(row, deep);
      }
      transpose(r);
      for (int i = 0; i < deep; i++) store(packed_at(out, depth, k + i, at + c), r[i]);
    }
}

// Blocks along n: a block of 16 bytes is 32 columns of one k.
inline void pack_wide_blocks(const Matrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                             float* out, int64_t at) {
  int64_t ld = b.of->n / kBlock;
  for (int64_t k = 0; k < depth; k++) {
    int64_t first = (k0 + k) * ld + n0 / kBlock;
    for (int64_t c = 0; c < count; c += kBlock) {
      int64_t block = first + c / kBlock;
      const uint8_t* bytes = static_cast<const uint8_t*>(b.data) + block * kBlockBytes;
      vf scale = splat(kMxfp4Scales.value[b.scales[block]]);
      for (int i = 0; i < kBlockBytes; i += kLanes) {
        vu codes = load_bytes(bytes + i);
        vf even = decode(codes) * scale, odd = decode(codes >> 4) * scale;
        store(packed_at(out, depth, k, at + c + 2 * i), riffle_low(even, odd));
        store(packed_at(out, depth, k, at + c + 2 * i + kLanes), riffle_high(even, odd));
      }
    }
    for (int64_t c = count; c < round_up(count, kNR); c += kLanes)
      store(packed_at(out, depth, k, at + c), vf{});
  }
}

// Blocks along k: the bytes of 16 columns are transposed, so that a vector is one k of them.
inline void pack_deep_blocks(const Matrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                             float* out, int64_t at) {
  int64_t ld = b.of->k / kBlock, padded = round_up(count, kNR);
  for (int64_t c = 0; c < padded; c += 16)
    for (int64_t k = 0; k < depth; k += kBlock) {
      Bytes16 r[16];
      float scale[16];
      for (int i = 0; i < 16; i++) {
        int64_t block = (n0 + c + i) * ld + (k0 + k) / kBlock;
        bool there = c + i < count;
        r[i] = Bytes16{};
        if (there)
          std::memcpy(&r[i], static_cast<const uint8_t*>(b.data) + block * kBlockBytes, 16);
        scale[i] = there ? kMxfp4Scales.value[b.scales[block]] : 0.0f;
      }
      transpose_bytes(r);
      for (int j = 0; j < 16; j++) {
        uint8_t bytes[16];
        std::memcpy(bytes, &r[j], 16);
        for (int i = 0; i < 16 && c + i < padded; i += kLanes) {
          vu codes = load_bytes(bytes + i);
          vf s = load(scale + i);
          store(packed_at(out, depth, k + 2 * j, at + c + i), decode(codes) * s);
          store(packed_at(out, depth, k + 2 * j + 1, at + c + i), decode(codes >> 4) * s);
        }
      }
    }
}

inline void pack_weights(const Matrix& b, int64_t k0, int64_t depth, const Columns& columns,
                         float* out) {
  for (int part = 0; part < columns.parts; part++) {
    int64_t n0 = columns.begin[part], at = columns.at[part], count = columns.count;
    const Stack& of = *b.of;
    if (of.scales != nullptr) {
      (of.n_contiguous ? pack_wide_blocks : pack_deep_blocks)(b, k0, depth, n0, count, out, at);
      continue;
    }
    with_dtype(of.dtype, [&](auto tag) {
      auto* data = static_cast<const decltype(tag)*>(b.data);
      if (of.n_contiguous)
        pack_wide_rows(data, of.n, k0, depth, n0, count, out, at);
      else
        pack_deep_rows(data, of.k, k0, depth, n0, count, out, at);
    });
  }
}

// Asks for one of `shares` parts of the weights that pack_weights reads next. Only short runs of
// dense rows need it: there every row is another page, which the hardware does not see coming.
inline void prefetch_weights(const Matrix& b, int64_t k0, int64_t depth, const Columns& columns,
                             int64_t share, int64_t shares) {
  const Stack& of = *b.of;
  if (of.scales != nullptr || !of.n_contiguous) return;
  int64_t bytes = of.dtype == DType::kF32 ? 4 : 2;
  for (int64_t k = k0 + depth * share / shares; k < k0 + depth * (share + 1) / shares; k++)
    for (int part = 0; part < columns.parts; part++) {
      const char* row = static_cast<const char*>(b.data) + (k * of.n + columns.begin[part]) * bytes;
      for (int64_t at = 0; at < columns.count * bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
    }
}
}  // namespace grouped

// Few rows as sums of bf16 values, which dot products take against MXFP4 weights as they stream by.
#pragma once

#include "grouped_pack.h"

namespace grouped {
constexpr int64_t kGroup = 128;  // weights in a cache line

// One of a row's values, of N bf16 that add up to it: 8 N bits of it count. A row is groups of 128:
// for each summand four vectors of 32, where place t of vector j holds value 4 t + j, as nibble j
// of word t holds its weight.
template <int N>
struct Split {
  uint16_t bits[N];
};

#if defined(__AVX512BF16__)
template <int N>
void arrange(float* line, int64_t width, Split<N>* out) {
  auto* to = reinterpret_cast<uint16_t*>(out);
  for (int64_t k = 0; k < width; k += kGroup)
    for (int n = 0; n < N; n++, to += kGroup)
      for (int64_t i = 0; i < kGroup; i += 2 * kLanes) {
        vu words[2];
        for (int half = 0; half < 2; half++) {
          float* from = line + k + i + half * kLanes;
          vf v = load(from), top = bit_cast<vf>(bit_cast<vu>(v) & 0xffff0000u);
          words[half] = n + 1 < N ? bit_cast<vu>(v) >> 16 : round_to_bf16(v);
          store(from, v == top ? vf{} : v - top);  // an infinity leaves nothing
        }
        __m512i both =
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)words[0])),
                               _mm512_cvtepi32_epi16((__m512i)words[1]), 1);
        for (int j = 0; j < 4; j++)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j * 32 + i / 4),
                           _mm512_cvtepi64_epi16(_mm512_srli_epi64(both, 16 * j)));
      }
}

// Scales of four blocks, each in the four lanes that its products come out in. A byte is the
// exponent of a float, but for 0 (2^-127, a subnormal) and 255 (NaN).
template <bool SPECIAL>
inline vf spread_scales(uint32_t bytes) {
  const __m512i to_top = _mm512_setr_epi64(
      (int64_t)0x0080808000808080, (int64_t)0x0080808000808080, (int64_t)0x0180808001808080,
      (int64_t)0x0180808001808080, (int64_t)0x0280808002808080, (int64_t)0x0280808002808080,
      (int64_t)0x0380808003808080, (int64_t)0x0380808003808080);
  __m512i e = _mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_set1_epi32((int)bytes), to_top), 1);
  if (!SPECIAL) return (vf)e;
  const __m512i top = _mm512_set1_epi32(0x7f800000);
  e = _mm512_max_epu32(e, _mm512_set1_epi32(1 << 22));
  return (vf)_mm512_mask_mov_epi32(e, _mm512_cmpeq_epi32_mask(e, top),
                                   _mm512_set1_epi32(0x7fc00000));
}

inline bool any_special(const uint8_t* scales, int64_t count) {
  __mmask64 found = 0;
  for (int64_t i = 0; i < count; i += 64) {
    __mmask64 live = count - i >= 64 ? ~0ull : (1ull << (count - i)) - 1;
    // 255 + 1 is 0, 0 + 1 is 1
    __m512i v = _mm512_maskz_loadu_epi8(live, scales + i);
    found |= _mm512_mask_cmple_epu8_mask(live, _mm512_add_epi8(v, _mm512_set1_epi8(1)),
                                         _mm512_set1_epi8(1));
  }
  return found != 0;
}

// E2M1 values as bf16; an index is five bits, the fifth of them another code's.
alignas(64) constexpr uint16_t kBf16Values[32] = {
    0,      0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
    0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0,      0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
    0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

// Into the second cache: the first holds too few lines on their way for memory to keep up.
inline void ask_ahead(const uint8_t* p) { __builtin_prefetch(p, 0, 2); }

template <int MR, int NB, bool SPECIAL, int N>
void dots_of_groups(const PackedRow (&w)[NB], int64_t depth, const Split<N>* a, int64_t stride,
                    vf (*sums)[kLanes]) {
  constexpr int64_t kScalesAhead = 4 << 10;
  int64_t ahead = round_up(8 << 10, NB * depth / 2);
  const __m512i values = _mm512_load_si512(kBf16Values);
  vf acc[MR][NB] = {};
  auto step = [&](int64_t at, auto&& codes_of, auto&& scales_of) {
    const Split<N>* group = a + at * 2;
    __m512i codes[NB];
    __m512 part[MR][NB];
#pragma GCC unroll 4
    for (int i = 0; i < NB; i++) {
      ask_ahead(w[i].bytes + at + ahead);
      codes[i] = codes_of(w[i].bytes + at);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) part[m][i] = _mm512_setzero_ps();
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      __m512bh v[NB];
#pragma GCC unroll 4
      for (int i = 0; i < NB; i++)
        v[i] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes[i], 4 * j), values);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          auto* x = reinterpret_cast<const uint16_t*>(group + m * stride) + n * kGroup + j * 32;
          auto pairs = (__m512bh)_mm512_loadu_si512(x);
#pragma GCC unroll 4
          for (int i = 0; i < NB; i++) part[m][i] = _mm512_dpbf16_ps(part[m][i], pairs, v[i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < NB; i++) {
      vf scale = spread_scales<SPECIAL>(scales_of(w[i].scales + at / kBlockBytes));
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) acc[m][i] += (vf)part[m][i] * scale;
    }
  };
  for (int i = 0; i < NB; i++)
    for (int64_t b = 0; b < depth / kBlock; b += 64) ask_ahead(w[i].scales + b + kScalesAhead);
  int64_t bytes = depth / 2, at = 0;
  for (; at + 64 <= bytes; at += 64)
    step(
        at, [](const uint8_t* p) { return _mm512_loadu_si512(p); },
        [](const uint8_t* p) {
          uint32_t scales;
          std::memcpy(&scales, p, 4);
          return scales;
        });
  if (int64_t left = bytes - at; left > 0)
    step(
        at, [&](const uint8_t* p) { return _mm512_maskz_loadu_epi8((1ull << left) - 1, p); },
        [&](const uint8_t* p) {
          uint32_t scales = 0;
          for (int64_t b = 0; b < left / kBlockBytes; b++) scales |= uint32_t{p[b]} << 8 * b;
          return scales;
        });
  for (int m = 0; m < MR; m++)
    for (int i = 0; i < NB; i++) sums[m][i] = acc[m][i];
}

template <int MR, int NB, int N>
void dots(const PackedRow (&w)[NB], int64_t depth, const Split<N>* a, int64_t stride,
          vf (*sums)[kLanes]) {
  bool special = false;
  for (int i = 0; i < NB; i++) special = special || any_special(w[i].scales, depth / kBlock);
  if (!special) return dots_of_groups<MR, NB, false>(w, depth, a, stride, sums);
  for (int i = 0; i < NB; i++)
    for (int m = 0; m < MR; m++) {
      const PackedRow one[1] = {w[i]};
      vf sum[1][kLanes];
      dots_of_groups<1, 1, true>(one, depth, a + m * stride, stride, sum);
      sums[m][i] = sum[0][0];
    }
}
#endif
}  // namespace grouped

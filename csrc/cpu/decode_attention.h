// Inner loops of decode_attention over one block of keys and values, and what they hold.
//
// Rows are the lanes of their scores, eight at a time, and each key is broadcast to them: nothing
// is transposed and the softmax needs no horizontal step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fp8.h"
#include "gemm.h"
#include "rotary.h"

namespace decoding {
constexpr int kChunk = 8;  // rows of a chunk: the lanes of its scores
constexpr int kTileKeys = kVectorBytes > 32 ? 8 : 4;
constexpr int kTileRows = kLanes > 8 ? 8 : 4, kTileVectors = 2;

// Operands are held in units of U (gemm.h): floats, or pairs of bf16 that follow each other along
// the dimension that a product sums over. A vector of them, and the sum with a times it:
inline vf load_units(const float* p) { return load(p); }
inline vf add_product(vf sum, float a, vf b) { return sum + a * b; }

// The kChunk rows' lanes: sum + a key's unit times theirs.
typedef float vr __attribute__((vector_size(4 * kChunk)));
inline vr add_key(vr sum, const float* rows, float key) {
  vr q;
  std::memcpy(&q, rows, sizeof(q));
  return sum + q * key;
}
#if defined(__AVX512BF16__)
inline __m512bh load_units(const uint32_t* p) {
  __m512bh v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline vf add_product(vf sum, uint32_t a, __m512bh b) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), b);
}
inline vr add_key(vr sum, const uint32_t* rows, uint32_t key) {
  __m256bh q;
  std::memcpy(&q, rows, sizeof(q));
  return (vr)_mm256_dpbf16_ps((__m256)sum, q, (__m256bh)_mm256_set1_epi32(static_cast<int>(key)));
}
#endif

// A row of fp32 as units, there or in `out`
inline const float* to_units(const float* row, float*, int64_t) { return row; }
#if defined(__AVX512BF16__)
inline const uint32_t* to_units(const float* row, uint32_t* out, int64_t padded) {
  store_row(row, reinterpret_cast<bf16*>(out), padded);
  return out;
}
#endif

// A row of keys as units [padded]
template <typename C>
inline void copy_key(const C* in, float* out, int64_t n, int64_t padded) {
  load_row(in, out, n, padded);
}
#if defined(__AVX512BF16__)
inline void copy_key(const bf16* in, uint32_t* out, int64_t n, int64_t padded) {
  std::memset(out + n / 2, 0, (padded - n / 2) * sizeof(uint32_t));
  std::memcpy(out, in, n * sizeof(bf16));
}
#endif

// Two vectors of units of one row of values, or of two that follow each other.
inline void load_values(const float* row, const float*, vf (&v)[2]) {
  v[0] = load(row), v[1] = load(row + kLanes);
}
template <typename C>
inline void copy_values(const C* row, const C*, float* out, int64_t n, int64_t padded) {
  load_row(row, out, n, padded);
}
#if defined(__AVX512BF16__)
alignas(64) constexpr uint16_t kPairs[64] = {
    // a0 b0 a1 b1 ...
    0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
    11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
    22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
inline void load_values(const bf16* low, const bf16* high, __m512bh (&v)[2]) {
  __m512i a = _mm512_loadu_si512(low), b = _mm512_loadu_si512(high);
  v[0] = (__m512bh)_mm512_permutex2var_epi16(a, _mm512_load_si512(kPairs), b);
  v[1] = (__m512bh)_mm512_permutex2var_epi16(a, _mm512_load_si512(kPairs + 32), b);
}
inline void copy_values(const bf16* low, const bf16* high, uint32_t* out, int64_t n,
                        int64_t padded) {
  bf16 rows[2][2 * kLanes] = {};
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    int64_t bytes = std::min<int64_t>(2 * kLanes, n - i) * sizeof(bf16);
    std::memcpy(rows[0], low + i, bytes);
    std::memcpy(rows[1], high + i, bytes);
    __m512bh v[2];
    load_values(rows[0], rows[1], v);
    std::memcpy(out + i, v, sizeof(v[0]) * (i + kLanes < padded ? 2 : 1));
  }
}
#endif

// A vector's pattern of the kChunk rows that its lanes are, in the i-th of kPatterns vectors
constexpr int kPatterns = kChunk > kLanes ? kChunk / kLanes : 1;
inline vf row_lanes(const float* rows, int i) {
  if constexpr (kLanes <= kChunk) return load(rows + i * kLanes);
  float lanes[kLanes];
  for (int n = 0; n < kLanes; n += kChunk) std::memcpy(lanes + n, rows, sizeof(float) * kChunk);
  return load(lanes);
}
// The sum or maximum of the keys in a vector's lanes, for each row; all keys' lanes get it.
template <typename F>
inline vf across_keys(vf v, const F& f) {
#if defined(__AVX512F__)
  static_assert(kLanes == 2 * kChunk, "two keys in a vector");
  return f(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
#else
  static_assert(kLanes <= kChunk, "one key in a vector");
  return v;
#endif
}

// The lines of the next block's rows of all heads, in the order in which they lie in memory, asked
// for two by two while this block is worked on. The processor drops a prefetch from a page that it
// has not looked up; hence a load from each page first, all at once since each waits for memory.
class Ahead {
 public:
  void start(const void* const* rows, int64_t count, int64_t heads, int64_t head_bytes,
             int64_t run_bytes) {
    rows_ = reinterpret_cast<const char* const*>(rows), end_ = rows_ + count;
    bool joined = head_bytes == run_bytes;
    heads_ = joined ? 1 : heads, head_bytes_ = head_bytes;
    run_ = joined ? heads * run_bytes : run_bytes;
    head_ = 0, line_ = run_end_ = nullptr;
    if (count > 0) line_ = *rows_, run_end_ = line_ + run_;
    uintptr_t page = 0;
    for (int64_t h = 0; h < heads_; h++)
      for (int64_t j = 0; j < count; j++)
        for (const char* at : {rows_[j] + h * head_bytes, rows_[j] + h * head_bytes + run_ - 1}) {
          if (reinterpret_cast<uintptr_t>(at) / 4096 == page) continue;
          page = reinterpret_cast<uintptr_t>(at) / 4096;
          (void)*static_cast<const volatile char*>(at);
        }
  }
  inline void ask() {
    if (line_ >= run_end_ && !next_run()) return;
    __builtin_prefetch(line_, 0, 2);
    __builtin_prefetch(line_ + 64, 0, 2);
    line_ += 128;
  }

 private:
  bool next_run() {
    if (rows_ == end_) return false;
    if (++head_ == heads_) {
      head_ = 0;
      if (++rows_ == end_) return false;
    }
    line_ = *rows_ + head_ * head_bytes_, run_end_ = line_ + run_;
    return true;
  }
  const char *const *rows_ = nullptr, *const *end_ = nullptr;
  const char *line_ = nullptr, *run_end_ = nullptr;
  int64_t heads_ = 0, head_bytes_ = 0, run_ = 0, head_ = 0;
};

// out[MR rows][NV vectors] = out * rescale + sum over keys of p[key][row] values[key]; depth and ld
// in units; values(j, v) loads NV vectors
template <int MR, int NV, typename U, typename Values>
[[gnu::always_inline]] inline void add_values(int64_t depth, const U* p, const Values& values,
                                              const float* rescale, float* out, int64_t padded) {
  vf acc[MR][NV] = {};
  for (int64_t j = 0; j < depth; j++) {
    decltype(load_units(p)) v[NV];
    values(j, v);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) acc[m][n] = add_product(acc[m][n], p[j * kChunk + m], v[n]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) {
      float* at = out + m * padded + n * kLanes;
      store(at, load(at) * rescale[m] + acc[m][n]);
    }
}

// f(row, tag) for tiles of rows, as many as the tag's value says
template <typename F>
inline void for_tiles(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) f(r, std::integral_constant<int, kTileRows>{});
  if constexpr (kTileRows > 4)
    for (; r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>{});
  for (; r + 2 <= rows; r += 2) f(r, std::integral_constant<int, 2>{});
  if (r < rows) f(r, std::integral_constant<int, 1>{});
}

template <typename C>
const C kZeros[256] = {};  // a row of them
}  // namespace decoding

// What the two passes of attention share: shapes, visibility, and operands in the micro-kernel's
// order.
//
// H query heads, G key heads, D head_dim (Dp padded to whole vectors), R rotary_dim. A "row" is one
// query of one of the H / G heads that share a key head, numbered position * (H / G) + head, so a
// panel of rows sees nearly one range of keys. Rows lie in vector lanes and keys down the panel
// (scores are held as [keys][kRows]): the softmax needs no horizontal step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "gemm.h"
#include "kernels.h"
#include "rotary.h"
#include "vmath.h"

namespace attention {
#if defined(__AVX512F__)
constexpr int kAR = 8, kBV = 3;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kAR = 4, kBV = 3;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kAR = 4, kBV = 5;  // 20 of 32
#else
constexpr int kAR = 4, kBV = 2;
#endif
constexpr int kRows = kBV * kLanes;
constexpr int64_t kSumStep = 32;  // fp32 terms of one product summed in one chain
constexpr int kKeys = 96;         // most keys between two updates of the running maximum
constexpr int kPackedKeys = 384;  // keys in the micro-kernel's order at one time
static_assert(kKeys % kLanes == 0 && kPackedKeys % kKeys == 0 && kLanes % kAR == 0, "whole panels");

struct Problem : AttentionProblem {
  explicit Problem(const AttentionProblem& p) : AttentionProblem(p) {}
  int64_t group() const { return heads / kv_heads; }
  int64_t padded() const { return round_up(head_dim, kLanes); }
  int64_t batches() const { return cu_q != nullptr ? 1 : sequences; }
};

struct Range {
  int64_t lo, hi;
  bool empty() const { return lo >= hi; }
};

// One sequence: which tokens, and what they see.
struct Sequence {
  int64_t batch, first_q, first_k, len_q, len_k, lse_base, lse_head;
  const Problem* p;

  Sequence(const Problem& problem, int64_t n) : p(&problem) {
    bool packed = p->cu_q != nullptr;
    batch = packed ? 0 : n;
    first_q = packed ? p->cu_q[n] : 0;
    first_k = packed ? p->cu_k[n] : 0;
    len_q = packed ? p->cu_q[n + 1] - p->cu_q[n] : p->tokens_q;
    len_k = packed ? p->cu_k[n + 1] - p->cu_k[n] : p->tokens_k;
    lse_base = packed ? first_q : n * p->heads * p->tokens_q;
    lse_head = p->tokens_q;
  }
  int64_t rows() const { return len_q * p->group(); }
  Range visible(int64_t query) const {
    int64_t at = query + len_k - len_q;
    int64_t lo = p->window_left < 0 ? 0 : std::max<int64_t>(0, at - p->window_left);
    int64_t hi =
        p->window_right < 0 ? len_k : std::clamp<int64_t>(at + p->window_right + 1, 0, len_k);
    return lo < hi ? Range{lo, hi} : Range{0, 0};
  }
  Range visible_to_rows(Range rows) const {
    if (rows.empty()) return {0, 0};
    Range a = visible(rows.lo / p->group()), b = visible((rows.hi - 1) / p->group());
    return {a.lo, std::max(a.hi, b.hi)};  // an empty range is {0, 0}: queries before the first key
  }
  // Where key j of this sequence stands in the tables.
  int64_t position(int64_t key) const {
    return p->position_ids ? p->position_ids[batch * p->tokens_k + first_k + key] : key;
  }
  int64_t lse_index(int64_t query, int64_t head) const {
    return lse_base + head * lse_head + query;
  }
  template <typename T>
  T* query(T* data, const Strides& s, int64_t token, int64_t head) const {
    return data + batch * s[0] + (first_q + token) * s[1] + head * s[2];
  }
  template <typename T>
  T* key(T* data, const Strides& s, int64_t token, int64_t head) const {
    return data + batch * s[0] + (first_k + token) * s[1] + head * s[2];
  }
};

// The rows of one panel and the keys that each lane sees.
struct Panel {
  int64_t first, count;
  Range any, all;  // seen by some row, by every row
  vi lo[kBV], hi[kBV];

  Panel() = default;
  Panel(const Sequence& s, Range rows) : first(rows.lo), count(rows.hi - rows.lo) {
    any = {s.len_k, 0}, all = {0, s.len_k};
    int32_t los[kRows], his[kRows];
    for (int64_t r = 0; r < kRows; r++) {
      Range seen = s.visible((first + std::min(r, count - 1)) / s.p->group());
      los[r] = static_cast<int32_t>(seen.lo), his[r] = static_cast<int32_t>(seen.hi);
      all.lo = std::max(all.lo, seen.lo), all.hi = std::min(all.hi, seen.hi);
      if (seen.empty()) continue;
      any.lo = std::min(any.lo, seen.lo), any.hi = std::max(any.hi, seen.hi);
    }
    std::memcpy(lo, los, sizeof(lo));
    std::memcpy(hi, his, sizeof(hi));
  }
  // Scores of keys that a lane does not see become minus infinity.
  void mask(vf (&scores)[kAR][kBV], int64_t first_key) const {
    if (first_key >= all.lo && first_key + kAR <= all.hi) return;
    for (int m = 0; m < kAR; m++) {
      vi key = vi{} + static_cast<int32_t>(first_key + m);
      for (int n = 0; n < kBV; n++)
        scores[m][n] = (key >= lo[n]) & (key < hi[n]) ? scores[m][n] : splat(-__builtin_inff());
    }
  }
};

// Operands are held in units (gemm.h): floats, or pairs of bf16 that follow each other along the
// dimension that a product sums over. That many units hold n terms:
template <typename U>
inline int64_t units(int64_t n) {
  return (n + units_per<U> - 1) / units_per<U>;
}

// tile[kAR keys][kRows] = panel of keys or values times columns of queries or their gradients; in
// fp32 in steps: after a channel 100 times larger than the rest, one long sum would round every
// later term.
template <typename U>
inline void multiply(int64_t dim, const U* panel, const U* columns, vf (&tile)[kAR][kBV]) {
  int64_t depth = units<U>(dim), step = units_per<U> == 1 ? kSumStep : depth;
  for (int64_t d = 0; d < depth; d += step) {
    vf part[kAR][kBV] = {};
    micro_kernel(std::min(depth - d, step), panel + d * kAR, kAR, columns + d * kRows, kRows, part);
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < kBV; n++) tile[m][n] = d == 0 ? part[m][n] : tile[m][n] + part[m][n];
  }
}

// sum [MR][NV vectors] at stride ld = sum * factor + a product of `depth` units. The product is
// summed apart: added one by one to a long sum, its terms would lose bits.
template <int MR, int NV, typename U>
inline void add_product(int64_t depth, const U* a, int64_t lda, const U* b, int64_t ldb, float* sum,
                        int64_t ld, const vf (&factor)[NV]) {
  vf acc[MR][NV] = {};
  micro_kernel(depth, a, lda, b, ldb, acc);
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) {
      float* at = sum + m * ld + n * kLanes;
      store(at, load(at) * factor[n] + acc[m][n]);
    }
}

// Scores times scale. Each product is rounded before anything is subtracted from it, in both passes
// alike: a query that sees one key then has a probability of exactly 1, as in eager PyTorch.
inline void scale_scores(vf (&scores)[kAR][kBV], float scale) {
#pragma GCC unroll 8
  for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < kBV; n++) scores[m][n] = rounded(scores[m][n] * scale);
}

// The keys of `wanted` that a block [lo, lo + kPackedKeys) covers, whole panels of kAR.
inline Range clip_to_block(Range wanted, int64_t block) {
  int64_t lo = std::max(wanted.lo / kAR * kAR, block);
  int64_t hi = std::min(round_up(wanted.hi, kAR), block + kPackedKeys);
  return {lo, std::max(lo, hi)};
}

// Length of the steps that cover `keys` in equal parts of at most kKeys, whole panels of kAR.
inline int64_t step_length(Range keys) {
  int64_t count = keys.hi - keys.lo, steps = (count + kKeys - 1) / kKeys;
  return steps == 0 ? kKeys : round_up((count + steps - 1) / steps, kAR);
}

// U units of `terms` vectors that follow each other along a product's dimension, each to its place:
// put(unit, vector of U).
template <typename U, int N, typename Put>
inline void make_units(const vf (&terms)[N], int64_t count, const Put& put) {
#if defined(__AVX512BF16__)
  if constexpr (units_per<U> == 2) {
    for (int64_t i = 0; i < count; i += 2) put(i / 2, make_pair(terms[i], terms[i + 1]));
    return;
  }
#endif
  for (int64_t i = 0; i < count; i++) put(i, terms[i]);
}

template <typename V>
inline void put_vector(void* out, const V& v) {
  std::memcpy(out, &v, sizeof(v));
}

// rows [kRows][Dp] -> columns [units of D][kRows]
template <typename U>
void transpose_panel(const float* rows, U* columns, int64_t dim, int64_t padded) {
  for (int n = 0; n < kBV; n++)
    for (int64_t d0 = 0; d0 < dim; d0 += kLanes) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = load(rows + (n * kLanes + i) * padded + d0);
      transpose(r);
      U* out = columns + units<U>(d0) * kRows + n * kLanes;
      make_units<U>(r, std::min<int64_t>(kLanes, dim - d0),
                    [&](int64_t unit, auto v) { put_vector(out + unit * kRows, v); });
    }
}

// sum + the products of two vectors of units, as the micro-kernel adds them
inline vf add_units(vf sum, const float* a, const float* b) { return sum + load(a) * load(b); }
#if defined(__AVX512BF16__)
inline vf add_units(vf sum, const uint32_t* a, const uint32_t* b) {
  __m512bh x, y;
  std::memcpy(&x, a, sizeof(x));
  std::memcpy(&y, b, sizeof(y));
  return (vf)_mm512_dpbf16_ps((__m512)sum, x, y);
}
#endif

// Rows of fp32 that unite_rows() will put at `out` are made there at once if a unit is a float.
template <typename U>
inline float* landing_rows(U* out, float* rows) {
  if constexpr (units_per<U> == 1)
    return out;
  else
    return rows;
}

// rows [count][Dp] of landing_rows -> out [units of count][Dp], paired along the rows; count is
// even
template <typename U>
inline void unite_rows(const float* rows, U* out, int64_t count, int64_t padded) {
  if constexpr (units_per<U> > 1)
    for (int64_t k = 0; k < count; k += units_per<U>)
      for (int64_t d = 0; d < padded; d += kLanes) {
        vf r[units_per<U>];
        for (int i = 0; i < units_per<U>; i++) r[i] = load(rows + (k + i) * padded + d);
        make_units<U>(r, units_per<U>,
                      [&](int64_t, auto v) { put_vector(out + units<U>(k) * padded + d, v); });
      }
}

// columns [Dp][kRows] -> rows [kRows][Dp], each lane multiplied by its factor
inline void untranspose_panel(const float* columns, float* rows, int64_t padded,
                              const vf (&factor)[kBV]) {
  for (int n = 0; n < kBV; n++)
    for (int64_t d0 = 0; d0 < padded; d0 += kLanes) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; i++)
        r[i] = load(columns + (d0 + i) * kRows + n * kLanes) * factor[n];
      transpose(r);
      for (int i = 0; i < kLanes; i++) store(rows + (n * kLanes + i) * padded + d0, r[i]);
    }
}

// rows of keys [count][Dp] -> A panels [count / kAR][units of D][kAR]; count is a multiple of
// kLanes
template <typename U>
void pack_panels(const float* rows, U* panels, int64_t count, int64_t dim, int64_t padded) {
  int64_t depth = units<U>(dim);
  for (int64_t k0 = 0; k0 < count; k0 += kLanes)
    for (int64_t d0 = 0; d0 < dim; d0 += kLanes) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = load(rows + (k0 + i) * padded + d0);
      transpose(r);
      U* out = panels + k0 * depth + units<U>(d0) * kAR;
      make_units<U>(r, std::min<int64_t>(kLanes, dim - d0), [&](int64_t unit, auto v) {
        U lanes[kLanes];
        put_vector(lanes, v);
        for (int part = 0; part < kLanes / kAR; part++)
          std::memcpy(out + part * kAR * depth + unit * kAR, lanes + part * kAR, kAR * sizeof(U));
      });
    }
}

// Queries (or their gradients) of one panel as fp32 rows [kRows][Dp]; missing rows are 0.
template <typename T>
void load_queries(const Sequence& s, const Panel& panel, int64_t kv_head, const T* data,
                  const Strides& strides, bool rotated, float* rows) {
  const Problem& p = *s.p;
  int64_t group = p.group(), padded = p.padded();
  int64_t token = panel.first / group, head = panel.first % group;
  for (int64_t r = 0; r < panel.count; r++) {
    float* row = rows + r * padded;
    load_row(s.query(data, strides, token, kv_head * group + head), row, p.head_dim, padded);
    if (rotated && p.cos != nullptr) {
      int64_t at = s.position(token + s.len_k - s.len_q) * p.half;
      rotate_row(row, p.cos + at, p.sin + at, p.half, 1.0f);
    }
    if (++head == group) head = 0, token++;
  }
  std::fill(rows + panel.count * padded, rows + kRows * padded, 0.0f);
}

// Keys or values [lo, hi) as fp32 rows [round_up(hi - lo, kLanes)][Dp]; missing rows are 0.
template <typename T>
void load_keys(const Sequence& s, int64_t kv_head, Range keys, const T* data,
               const Strides& strides, bool rotated, float* rows) {
  const Problem& p = *s.p;
  int64_t padded = p.padded(), count = keys.hi - keys.lo;
  for (int64_t j = 0; j < count; j++) {
    float* row = rows + j * padded;
    load_row(s.key(data, strides, keys.lo + j, kv_head), row, p.head_dim, padded);
    if (rotated && p.cos != nullptr) {
      int64_t at = s.position(keys.lo + j) * p.half;
      rotate_row(row, p.cos + at, p.sin + at, p.half, 1.0f);
    }
  }
  std::fill(rows + count * padded, rows + round_up(count, kLanes) * padded, 0.0f);
}

// What one thread does at a time: rows of one (sequence, key head), and about how much work.
struct Unit {
  int64_t sequence, kv_head;
  Range rows;
  int64_t cost;
};

// Throws where lengths, window or positions would lead outside the tensors.
std::vector<Sequence> make_sequences(const Problem& p);
}  // namespace attention

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
constexpr int kKeys = 96;         // most keys between two updates of the running maximum
constexpr int kPackedKeys = 384;  // keys in the micro-kernel's order at one time
static_assert(kKeys % kLanes == 0 && kPackedKeys % kKeys == 0 && kLanes % kAR == 0, "whole panels");

struct Problem : AttentionProblem {
  explicit Problem(const AttentionProblem& p) : AttentionProblem(p) {}

  int64_t group() const { return heads / kv_heads; }
  int64_t padded() const { return round_up(head_dim, kLanes); }
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

// rows [kRows][Dp] -> columns [D][kRows]
inline void transpose_panel(const float* rows, float* columns, int64_t dim, int64_t padded) {
  for (int n = 0; n < kBV; n++)
    for (int64_t d0 = 0; d0 < dim; d0 += kLanes) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = load(rows + (n * kLanes + i) * padded + d0);
      transpose(r);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, dim - d0); i++)
        store(columns + (d0 + i) * kRows + n * kLanes, r[i]);
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

// natural rows of keys [count][Dp] -> A panels [count / kAR][D][kAR], multiplied by `factor`;
// count is a multiple of kLanes
inline void pack_panels(const float* rows, float* panels, int64_t count, int64_t dim,
                        int64_t padded, float factor) {
  for (int64_t k0 = 0; k0 < count; k0 += kLanes)
    for (int64_t d0 = 0; d0 < dim; d0 += kLanes) {
      vf r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = load(rows + (k0 + i) * padded + d0) * factor;
      transpose(r);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, dim - d0); i++) {
        float lanes[kLanes];
        store(lanes, r[i]);
        for (int part = 0; part < kLanes / kAR; part++)
          std::memcpy(panels + (k0 + part * kAR) * dim + (d0 + i) * kAR, lanes + part * kAR,
                      kAR * sizeof(float));
      }
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

// What the experts' forward and backward share: the activation, a token's sum, tensors by name.
//
// T tokens, K experts a token, S = T K rows sorted by expert, E experts, H hidden, I intermediate.
#pragma once

#include <algorithm>
#include <type_traits>

#include "buffer.h"
#include "grouped_gemm.h"
#include "vmath.h"

namespace experts {
using Problem = ExpertsProblem;
using grouped::Rows;
using grouped::Segment;
using grouped::Stack;
using grouped::Tile;

// x W, and d_y W^T, of both projections; [in, out] and [out, in] differ in what is contiguous.
inline Stack gate_up(const Problem& p) {
  bool wide = p.gate_up_scales == nullptr && p.in_out;
  return {p.gate_up, p.gate_up_scales, p.dtype, wide, p.hidden, 2 * p.intermediate};
}
inline Stack down(const Problem& p) {
  bool wide = p.down_scales == nullptr && p.in_out;
  return {p.down, p.down_scales, p.dtype, wide, p.intermediate, p.hidden};
}
inline Stack transposed(const Stack& s) {
  return {s.data, s.scales, s.dtype, !s.n_contiguous, s.n, s.k};
}
inline Stack low_rank(const Problem& p, const void* matrix, int64_t outputs, int64_t inputs) {
  return {matrix, nullptr, p.dtype, false, inputs, outputs};  // stored [outputs, inputs]
}

inline Rows typed(const void* data, DType dtype, int64_t width, const int32_t* index = nullptr) {
  int bits = dtype == DType::kBF16 ? 8 : dtype == DType::kF16 ? 11 : 24;
  return {data, dtype, width, index, nullptr, bits};
}
inline Rows floats(const float* data, int64_t width, const float* scale = nullptr) {
  return {data, DType::kF32, width, nullptr, scale};
}

// The rows a x (stack), times factor, to out [S, n].
inline void plain_product(const Problem& p, const Rows& a, const Stack& b, float factor,
                          float* out) {
  grouped::product(p.expert_offs, p.experts, {{a, b}}, false, [&](const Tile& t) {
    for (int64_t r = 0; r < t.rows; r++)
      for (int64_t n = 0; n < t.columns.count; n++)
        out[(t.row + r) * b.n + t.columns.begin[0] + n] = t.c[r * t.stride + n] * factor;
  });
}

inline vf sigmoid(vf x) {
  vf t = x > 87.0f ? splat(87.0f) : max_or_nan(splat(-87.0f), x);
  return 1.0f / (1.0f + exp_near(-t));
}

struct Gate {  // the activation and its slopes at one place
  vf value, d_gate, d_up;
};

// A gate whose sigmoid is 0 counts as 0: sigmoid() stops at e^-87, and an overflowed half is -inf.
inline vf unless_closed(vf gate, vf argument) { return argument < -87.0f ? vf{} : gate; }

inline Gate activate(const Problem& p, vf gate, vf up) {
  if (p.plain) {
    vf s = sigmoid(gate);
    gate = unless_closed(gate, gate);
    return {gate * s * up, up * s * (1.0f + gate * (1.0f - s)), gate * s};
  }
  vf limit = splat(p.limit), g = gate > limit ? limit : gate;
  vf u = up > limit ? limit : up < -limit ? -limit : up;
  vf s = sigmoid(g * p.alpha);
  g = unless_closed(g, g * p.alpha);
  vf slope = (u + 1.0f) * s * (1.0f + p.alpha * g * (1.0f - s)), zero = {};
  return {(u + 1.0f) * (g * s), gate <= limit ? slope : zero,
          (up <= limit) & (up >= -limit) ? g * s : zero};
}

// v such that rounding it to T leaves it on its side of `limit`, or the saved pre-activation would
// block another gradient than the true one. It moves by a unit in the last place at most.
template <typename T>
inline vf keep_side(vf v, vf limit) {
  if constexpr (sizeof(T) == 4) return v;
  T narrow[kLanes];
  store(narrow, v);
  constexpr float kStep = std::is_same_v<T, bf16> ? 0x1p-8f : 0x1p-11f;
  vi above = v > limit, stays = load(narrow) > limit;
  return above == stays ? v : above != 0 ? v * (1 + kStep) : v * (1 - kStep);
}

// out [T, H] in dtype T = each token's sum of its rows [S, H], times weights [T, K] unless null.
template <typename T>
void combine(const Problem& p, const float* rows, const float* weights, T* out) {
  advise_huge_pages(out, p.tokens * p.hidden * static_cast<int64_t>(sizeof(T)));
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < p.tokens; t++)
    for (int64_t h = 0; h < p.hidden; h += kLanes) {
      int live = static_cast<int>(std::min<int64_t>(kLanes, p.hidden - h));
      vf sum = {};
      for (int64_t k = 0; k < p.topk; k++) {
        int64_t slot = t * p.topk + k;
        const float* row = rows + p.scatter[slot] * p.hidden + h;
        vf v = live == kLanes ? load(row) : load_partial(row, live);
        sum += weights != nullptr ? v * weights[slot] : v;
      }
      if (live == kLanes)
        store(out + t * p.hidden + h, sum);
      else
        store_partial(out + t * p.hidden + h, sum, live);
    }
}

// Throws where an index would lead outside the tensors.
void check_indices(const Problem& p);
}  // namespace experts

// Forward of the experts: two grouped products with bias and SwiGLU between, then a token's sum.
#include "experts.h"

#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace experts {
void check_indices(const Problem& p) {
  int64_t rows = p.tokens * p.topk;
  bool rises = p.expert_offs[0] == 0 && p.expert_offs[p.experts] == rows;
  for (int64_t e = 0; e < p.experts; e++) rises = rises && p.expert_offs[e] <= p.expert_offs[e + 1];
  if (!rises)
    throw std::invalid_argument("experts: expected expert_offs rising from 0 to " +
                                std::to_string(rows) + ", got other offsets");
  auto check = [&](const int32_t* index, int64_t end, const char* name) {
    for (int64_t s = 0; s < rows; s++)
      if (index[s] < 0 || index[s] >= end)
        throw std::invalid_argument(std::string("experts: expected ") + name + " from 0 to " +
                                    std::to_string(end - 1) + ", got " + std::to_string(index[s]));
  };
  check(p.gather, p.tokens, "gather_indices");
  check(p.scatter, rows, "scatter_indices");
}

namespace {
// Columns of a tile's bias, in the tile's places; zeros without one.
template <typename T>
void load_bias(const T* bias, const Tile& t, int64_t width, float* out) {
  for (int part = 0; part < t.columns.parts; part++) {
    int64_t count = t.columns.count;
    float* to = out + t.columns.at[part];
    if (bias == nullptr) {
      std::fill_n(to, count, 0.0f);
      continue;
    }
    const T* from = bias + t.expert * width + t.columns.begin[part];
    int64_t n = 0;
    for (; n + kLanes <= count; n += kLanes) store(to + n, load(from + n));
    if (int rest = static_cast<int>(count - n); rest > 0)
      store_partial(to + n, load_partial(from + n, rest), rest);
  }
}

template <typename T>
void keep_row(const Problem& p, T* out, const float* in, int64_t count) {
  vf limit = splat(p.limit);
  for (int64_t n = 0; n < count; n += kLanes) {
    int live = static_cast<int>(std::min<int64_t>(kLanes, count - n));
    vf v = live == kLanes ? load(in + n) : load_partial(in + n, live);
    if (!p.plain) v = -keep_side<T>(-keep_side<T>(v, limit), limit);
    if (live == kLanes)
      store(out + n, v);
    else
      store_partial(out + n, v, live);
  }
}

// The tile's pre-activations get their bias, are kept, and become hidden values [S, I].
template <typename T>
void finish_gate_up(const Problem& p, const Tile& t, const T* bias, T* pre, float* hidden) {
  int64_t width = 2 * p.intermediate;
  int64_t first = t.columns.begin[0], pairs = t.columns.count;
  if (p.interleaved) first /= 2, pairs /= 2;
  Buffer<float> start(t.stride);
  load_bias(bias, t, width, start.get());
  for (int64_t r = 0; r < t.rows; r++) {
    float* c = t.c + r * t.stride;
    for (int part = 0; part < t.columns.parts; part++) {
      int64_t at = t.columns.at[part], count = t.columns.count;
      for (int64_t n = 0; n < count; n++) c[at + n] += start[at + n];
      if (pre != nullptr)
        keep_row(p, pre + (t.row + r) * width + t.columns.begin[part], c + at, count);
    }
    float* out = hidden + (t.row + r) * p.intermediate + first;
    for (int64_t j = 0; j < pairs; j += kLanes) {
      vf gate, up;
      if (p.interleaved) {
        vf low = load(c + 2 * j), high = load(c + 2 * j + kLanes);
        gate = even_lanes(low, high), up = odd_lanes(low, high);
      } else {
        gate = load(c + j), up = load(c + t.columns.at[1] + j);
      }
      int live = static_cast<int>(std::min<int64_t>(kLanes, pairs - j));
      vf value = activate(p, gate, up).value;
      if (live == kLanes)
        store(out + j, value);
      else
        store_partial(out + j, value, live);
    }
  }
}

template <typename T>
void forward(const Problem& p, const ExpertsForward& f) {
  int64_t rows = p.tokens * p.topk, width = 2 * p.intermediate;
  Buffer<float> hidden(rows * p.intermediate), out(rows * p.hidden);
  Buffer<float> low(rows * std::max(p.gate_up_rank, p.down_rank));
  auto* pre = static_cast<T*>(f.pre_activation);
  if (pre != nullptr) advise_huge_pages(pre, rows * width * static_cast<int64_t>(sizeof(T)));

  std::vector<Segment> segments{{typed(f.x, p.dtype, p.hidden, p.gather), gate_up(p)}};
  if (p.gate_up_a != nullptr) {
    plain_product(p, segments[0].a, low_rank(p, p.gate_up_a, p.gate_up_rank, p.hidden),
                  p.lora_scaling, low.get());
    segments.push_back(
        {floats(low.get(), p.gate_up_rank), low_rank(p, p.gate_up_b, width, p.gate_up_rank)});
  }
  grouped::product(p.expert_offs, p.experts, segments, !p.interleaved, [&](const Tile& t) {
    finish_gate_up(p, t, static_cast<const T*>(p.gate_up_bias), pre, hidden.get());
  });

  segments = {{floats(hidden.get(), p.intermediate), down(p)}};
  if (sizeof(T) == 2) segments[0].a.bits = 16;  // of a 16-bit output they are enough
  if (p.down_a != nullptr) {
    plain_product(p, segments[0].a, low_rank(p, p.down_a, p.down_rank, p.intermediate),
                  p.lora_scaling, low.get());
    segments.push_back(
        {floats(low.get(), p.down_rank), low_rank(p, p.down_b, p.hidden, p.down_rank)});
  }
  grouped::product(p.expert_offs, p.experts, segments, false, [&](const Tile& t) {
    Buffer<float> start(t.stride);
    load_bias(static_cast<const T*>(p.down_bias), t, p.hidden, start.get());
    for (int64_t r = 0; r < t.rows; r++) {
      const float* c = t.c + r * t.stride;
      float* to = out.get() + (t.row + r) * p.hidden + t.columns.begin[0];
      for (int64_t n = 0; n < t.columns.count; n++) to[n] = c[n] + start[n];
    }
  });
  combine(p, out.get(), p.topk_weights, static_cast<T*>(f.y));
}
}  // namespace
}  // namespace experts

void experts_fwd(const ExpertsProblem& p, const ExpertsForward& f) {
  experts::check_indices(p);
  with_dtype(p.dtype, [&](auto tag) { experts::forward<decltype(tag)>(p, f); });
}

// Gradients of the experts: two grouped products back, and one outer product a trained matrix.
#include "dispatch.h"
#include "experts.h"

namespace experts {
namespace {
constexpr int64_t kPart = 32;  // tiles begin at multiples of it

// What a tile of W_down d_y gives: columns of d_pre, of the hidden values where they are wanted,
// and this tile's share of each row's d_topk_weight.
struct Middle {
  const float* weights;  // [S], routing weight of each sorted row
  float* d_pre;          // [S, 2I]
  float* hidden;         // [S, I] or null
  float* shares;         // [S, parts]
  int64_t parts;
};

template <typename T>
void finish_hidden(const Problem& p, const Tile& t, const T* pre, const Middle& to) {
  int64_t width = 2 * p.intermediate, first = t.columns.begin[0], count = t.columns.count;
  int64_t padded = round_up(count, kLanes);
  // Columns of the two halves, or the interleaved pairs, of this tile.
  int64_t begins[2] = {p.interleaved ? 2 * first : first, p.intermediate + first};
  int64_t counts = p.interleaved ? 2 * count : count;
  int64_t places[2] = {0, padded};
  Buffer<float> in(2 * padded + kLanes), out(2 * padded + kLanes);
  std::fill_n(in.get(), 2 * padded + kLanes, 0.0f);
  for (int64_t r = 0; r < t.rows; r++) {
    int64_t row = t.row + r;
    for (int part = 0; part < (p.interleaved ? 1 : 2); part++)
      grouped::read_row(typed(pre, p.dtype, width), row, begins[part], counts,
                        in.get() + places[part]);
    vf weight = splat(to.weights[row]), share = {};
    const float* c = t.c + r * t.stride;
    for (int64_t j = 0; j < count; j += kLanes) {
      int live = static_cast<int>(std::min<int64_t>(kLanes, count - j));
      vf d = live == kLanes ? load(c + j) : load_partial(c + j, live);
      vf gate, up;
      if (p.interleaved) {
        vf low = load(in.get() + 2 * j), high = load(in.get() + 2 * j + kLanes);
        gate = even_lanes(low, high), up = odd_lanes(low, high);
      } else {
        gate = load(in.get() + j), up = load(in.get() + padded + j);
      }
      Gate g = activate(p, gate, up);
      share += d * g.value;
      vf d_gate = d * weight * g.d_gate, d_up = d * weight * g.d_up;
      if (p.interleaved) {
        store(out.get() + 2 * j, riffle_low(d_gate, d_up));
        store(out.get() + 2 * j + kLanes, riffle_high(d_gate, d_up));
      } else {
        store(out.get() + j, d_gate);
        store(out.get() + padded + j, d_up);
      }
      if (to.hidden != nullptr)
        store_partial(to.hidden + row * p.intermediate + first + j, g.value, live);
    }
    for (int part = 0; part < (p.interleaved ? 1 : 2); part++)
      std::copy_n(out.get() + places[part], counts, to.d_pre + row * width + begins[part]);
    to.shares[row * to.parts + first / kPart] = reduce_add(share);
  }
}

// d_topk_weights [T, K] = d_y . (W h + b): the tiles' shares, and d_y . b.
template <typename T>
void weight_gradients(const Problem& p, const T* d_y, const Middle& m, float* out) {
  auto* bias = static_cast<const T*>(p.down_bias);
#pragma omp parallel for schedule(static)
  for (int64_t e = 0; e < p.experts; e++)
    for (int64_t s = p.expert_offs[e]; s < p.expert_offs[e + 1]; s++) {
      float sum = 0;
      for (int64_t i = 0; i < m.parts; i++) sum += m.shares[s * m.parts + i];
      if (bias != nullptr) {
        const T *a = d_y + p.gather[s] * p.hidden, *b = bias + e * p.hidden;
        vf dot = {};
        int64_t h = 0;
        for (; h + kLanes <= p.hidden; h += kLanes) dot += load(a + h) * load(b + h);
        int rest = static_cast<int>(p.hidden - h);
        sum += reduce_add(dot + load_partial(a + h, rest) * load_partial(b + h, rest));
      }
      m.shares[s * m.parts] = sum;
    }
  for (int64_t slot = 0; slot < p.tokens * p.topk; slot++)
    out[slot] = m.shares[p.scatter[slot] * m.parts];
}

// One projection's gradients: inputs [S, in] and d_outputs [S, out] of its rows.
struct Projection {
  Rows inputs, d_outputs;
  void *d_weight, *d_bias;
  const void *a, *b;
  void *d_a, *d_b;
  int64_t rank;
};

void projection_gradients(const Problem& p, const Projection& q, const float* d_low, float* low) {
  auto outer = [&](const Rows& a, const Rows& b, float factor, void* out) {
    grouped::outer(p.expert_offs, p.experts, a, b, factor, p.dtype, out);
  };
  if (q.d_weight != nullptr) {
    if (p.in_out)
      outer(q.inputs, q.d_outputs, 1.0f, q.d_weight);
    else
      outer(q.d_outputs, q.inputs, 1.0f, q.d_weight);
  }
  if (q.d_bias != nullptr)
    grouped::column_sums(p.expert_offs, p.experts, q.d_outputs, p.dtype, q.d_bias);
  if (q.d_a != nullptr) outer(floats(d_low, q.rank), q.inputs, 1.0f, q.d_a);
  if (q.d_b != nullptr) {
    plain_product(p, q.inputs, low_rank(p, q.a, q.rank, q.inputs.width), 1.0f, low);
    outer(q.d_outputs, floats(low, q.rank), p.lora_scaling, q.d_b);
  }
}

template <typename T>
void backward(const Problem& p, const ExpertsBackward& g) {
  int64_t rows = p.tokens * p.topk, width = 2 * p.intermediate;
  Buffer<float> weights(rows), weighted(rows * p.down_rank), low(rows * p.down_rank);
  for (int64_t slot = 0; slot < rows; slot++) weights[p.scatter[slot]] = p.topk_weights[slot];
  bool wants_hidden = g.d_down != nullptr || g.d_down_a != nullptr || g.d_down_b != nullptr;
  int64_t parts = (p.intermediate + kPart - 1) / kPart;
  Buffer<float> d_pre(rows * width), hidden(wants_hidden ? rows * p.intermediate : 0);
  Buffer<float> shares(rows * parts);
  std::fill_n(shares.get(), rows * parts, 0.0f);
  Middle middle{weights.get(), d_pre.get(), wants_hidden ? hidden.get() : nullptr, shares.get(),
                parts};

  Rows d_y = typed(g.d_y, p.dtype, p.hidden, p.gather);
  std::vector<Segment> segments{{d_y, transposed(down(p))}};
  if (p.down_a != nullptr) {
    plain_product(p, d_y, transposed(low_rank(p, p.down_b, p.hidden, p.down_rank)), p.lora_scaling,
                  low.get());
    segments.push_back({floats(low.get(), p.down_rank),
                        transposed(low_rank(p, p.down_a, p.down_rank, p.intermediate))});
  }
  grouped::product(p.expert_offs, p.experts, segments, false, [&](const Tile& t) {
    finish_hidden(p, t, static_cast<const T*>(g.pre_activation), middle);
  });
  if (g.d_topk_weights != nullptr)
    weight_gradients(p, static_cast<const T*>(g.d_y), middle, g.d_topk_weights);

  Rows d_out = d_y;  // with the routing weight
  d_out.scale = weights.get();
  for (int64_t s = 0; s < rows; s++)
    for (int64_t r = 0; r < p.down_rank; r++)
      weighted[s * p.down_rank + r] = low[s * p.down_rank + r] * weights[s];
  projection_gradients(p,
                       {floats(hidden.get(), p.intermediate), d_out, g.d_down, g.d_down_bias,
                        p.down_a, p.down_b, g.d_down_a, g.d_down_b, p.down_rank},
                       weighted.get(), low.get());

  Rows d_gate_up = floats(d_pre.get(), width);
  Buffer<float> low_up(rows * p.gate_up_rank), scratch(rows * p.gate_up_rank);
  segments = {{d_gate_up, transposed(gate_up(p))}};
  if (p.gate_up_a != nullptr && (g.d_x != nullptr || g.d_gate_up_a != nullptr)) {
    plain_product(p, d_gate_up, transposed(low_rank(p, p.gate_up_b, width, p.gate_up_rank)),
                  p.lora_scaling, low_up.get());
    segments.push_back({floats(low_up.get(), p.gate_up_rank),
                        transposed(low_rank(p, p.gate_up_a, p.gate_up_rank, p.hidden))});
  }
  projection_gradients(
      p,
      {typed(g.x, p.dtype, p.hidden, p.gather), d_gate_up, g.d_gate_up, g.d_gate_up_bias,
       p.gate_up_a, p.gate_up_b, g.d_gate_up_a, g.d_gate_up_b, p.gate_up_rank},
      low_up.get(), scratch.get());
  if (g.d_x == nullptr) return;
  Buffer<float> d_rows(rows * p.hidden);
  grouped::product(p.expert_offs, p.experts, segments, false, [&](const Tile& t) {
    for (int64_t r = 0; r < t.rows; r++)
      std::copy_n(t.c + r * t.stride, t.columns.count,
                  d_rows.get() + (t.row + r) * p.hidden + t.columns.begin[0]);
  });
  combine(p, d_rows.get(), nullptr, static_cast<T*>(g.d_x));
}
}  // namespace
}  // namespace experts

void experts_bwd(const ExpertsProblem& p, const ExpertsBackward& g) {
  experts::check_indices(p);
  with_dtype(p.dtype, [&](auto tag) { experts::backward<decltype(tag)>(p, g); });
}

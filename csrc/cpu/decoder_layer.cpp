// One gpt-oss layer of a decoding step in one call: the kernels of its ops, one after the other.
//
// T tokens, H hidden. What passes from op to op is rounded to the layer's dtype, as between
// modules.
#include <algorithm>
#include <cmath>

#include "buffer.h"
#include "dispatch.h"
#include "kernels.h"

namespace {
// out = x / rms(x) * weight, in fp32 until it is stored
template <typename T>
void rms_norm(const T* x, const T* weight, float epsilon, int64_t tokens, int64_t hidden, T* out) {
  for (int64_t t = 0; t < tokens; t++, x += hidden, out += hidden) {
    vf sum = {};
    int64_t whole = hidden / kLanes * kLanes;
    int rest = static_cast<int>(hidden - whole);
    for (int64_t h = 0; h < whole; h += kLanes) {
      vf v = load(x + h);
      sum += v * v;
    }
    if (rest > 0) {
      vf v = load_partial(x + whole, rest);
      sum += v * v;
    }
    float factor = 1 / std::sqrt(reduce_add(sum) / static_cast<float>(hidden) + epsilon);
    for (int64_t h = 0; h < whole; h += kLanes)
      store(out + h, load(weight + h) * (load(x + h) * factor));
    if (rest > 0)
      store_partial(out + whole,
                    load_partial(weight + whole, rest) * (load_partial(x + whole, rest) * factor),
                    rest);
  }
}

template <typename T>
void add(const T* a, const T* b, int64_t count, T* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    int live = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    store_partial(out + i, load_partial(a + i, live) + load_partial(b + i, live), live);
  }
}

template <typename T>
void project(const Projection& p, const T* x, int64_t tokens, int64_t in, int64_t out, T* y) {
  DType dtype = sizeof(T) == 4 ? DType::kF32 : DType::kBF16;
  if (p.scales == nullptr)
    linear({dtype, tokens, in, out, x, p.weight, p.bias, y});
  else
    linear_int8(
        {dtype, tokens, in, out, x, {static_cast<const uint8_t*>(p.weight), p.scales}, p.bias, y});
}

template <typename T>
void run(const DecoderLayer& p) {
  const DecodeProblem& a = p.attention;
  ExpertsProblem e = p.experts;
  int64_t tokens = e.tokens, hidden = e.hidden, slots = tokens * e.topk;
  int64_t wide = a.heads * a.head_dim, narrow = a.kv_heads * a.head_dim;
  auto* x = static_cast<const T*>(p.x);
  Buffer<T> normed(tokens * hidden), joined(tokens * hidden), y(tokens * hidden);
  Buffer<T> q(tokens * wide), k(tokens * narrow), v(tokens * narrow), seen(tokens * wide);

  rms_norm(x, static_cast<const T*>(p.input_norm), p.epsilon, tokens, hidden, normed.get());
  project(p.q, normed.get(), tokens, hidden, wide, q.get());
  project(p.k, normed.get(), tokens, hidden, narrow, k.get());
  project(p.v, normed.get(), tokens, hidden, narrow, v.get());
  Strides q_strides{a.tokens * wide, wide, a.head_dim};
  Strides k_strides{a.tokens * narrow, narrow, a.head_dim};
  decode_attention(a, e.dtype, false,
                   {q.get(), k.get(), v.get(), p.k_cache, p.v_cache, q_strides, k_strides,
                    k_strides, p.k_cache_strides, p.v_cache_strides, seen.get()});
  project(p.o, seen.get(), tokens, wide, hidden, y.get());
  add(x, y.get(), tokens * hidden, joined.get());

  rms_norm(joined.get(), static_cast<const T*>(p.post_norm), p.epsilon, tokens, hidden,
           normed.get());
  Buffer<float> logits(tokens * e.experts), weights(slots);
  Buffer<int32_t> ids(slots), order(2 * e.experts + 1 + 2 * slots);
  int32_t *offs = &order[e.experts], *gather = offs + e.experts + 1;
  constexpr int kTopkSoftmax = 0;
  routing_fwd({tokens, hidden, e.experts, e.topk, kTopkSoftmax, true},
              {e.dtype,
               normed.get(),
               p.router_weight,
               hidden,
               p.router_bias,
               nullptr,
               nullptr,
               logits.get(),
               weights.get(),
               ids.get(),
               {order.get(), offs, gather, gather + slots}});
  e.topk_weights = weights.get(), e.expert_offs = offs;
  e.gather = gather, e.scatter = gather + slots;
  experts_fwd(e, {normed.get(), y.get(), nullptr});
  add(joined.get(), y.get(), tokens * hidden, static_cast<T*>(p.y));
}
}  // namespace

void decoder_layer(const DecoderLayer& p) {
  if (p.experts.dtype == DType::kF32)
    run<float>(p);
  else
    run<bf16>(p);
}

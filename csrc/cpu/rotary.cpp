// Rotary position embedding of q and k in one parallel loop over tokens.
//
// H heads, D head_dim, half = R / 2. Rotation reads any strides and writes contiguous rows.
#include "rotary.h"

#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "dispatch.h"

namespace {
using Problem = RotaryProblem;
using Tensor = RotaryTensor;

constexpr int64_t kStreamBytes = 16 << 20;  // outputs larger than this leave the caches anyway

template <bool Streamed, typename T>
inline void put(T* p, vf v) {
  if constexpr (Streamed) {
    stream(p, v);
  } else {
    store(p, v);
  }
}

template <bool Streamed, typename T>
void rotate_token(const Problem& p, const Tensor& t, int64_t batch, int64_t token, const float* cos,
                  const float* sin) {
  for (int64_t h = 0; h < t.heads; h++) {
    const T* in = static_cast<const T*>(t.in) + batch * t.strides[0] + token * t.strides[1] +
                  h * t.strides[2];
    T* out = static_cast<T*>(t.out) + ((batch * p.tokens + token) * t.heads + h) * p.head_dim;
    int64_t i = 0;
    for (; i + kLanes <= p.half; i += kLanes) {
      vf a = load(in + i), b = load(in + p.half + i), c = load(cos + i);
      vf s = load(sin + i) * p.direction;
      put<Streamed>(out + i, a * c - b * s);
      put<Streamed>(out + p.half + i, b * c + a * s);
    }
    if (i < p.half) {
      int n = static_cast<int>(p.half - i);
      vf a = load_partial(in + i, n), b = load_partial(in + p.half + i, n);
      vf c = load_partial(cos + i, n), s = load_partial(sin + i, n) * p.direction;
      store_partial(out + i, a * c - b * s, n);
      store_partial(out + p.half + i, b * c + a * s, n);
    }
    std::copy(in + 2 * p.half, in + p.head_dim, out + 2 * p.half);
  }
}

// position[batch * tokens + token], checked against the tables
std::vector<int32_t> positions(const Problem& p) {
  std::vector<int32_t> at(p.batches * p.tokens);
  if (p.position_ids != nullptr) {
    std::copy_n(p.position_ids, at.size(), at.begin());
  } else if (p.cu_seqlens != nullptr) {
    if (p.cu_seqlens[0] != 0 || p.cu_seqlens[p.sequences] != p.tokens)
      throw std::invalid_argument("apply_rotary: expected cu_seqlens from 0 to " +
                                  std::to_string(p.tokens) + ", got other ends");
    for (int64_t n = 0; n < p.sequences; n++) {
      if (p.cu_seqlens[n + 1] < p.cu_seqlens[n] || p.cu_seqlens[n + 1] > p.tokens)
        throw std::invalid_argument("apply_rotary: expected rising cu_seqlens, got a fall at " +
                                    std::to_string(n + 1));
      for (int32_t t = p.cu_seqlens[n]; t < p.cu_seqlens[n + 1]; t++) at[t] = t - p.cu_seqlens[n];
    }
  } else {
    for (size_t i = 0; i < at.size(); i++) at[i] = static_cast<int32_t>(i % p.tokens);
  }
  for (int32_t position : at)
    if (position < 0 || position >= p.table_length)
      throw std::invalid_argument("apply_rotary: expected positions in 0 ... " +
                                  std::to_string(p.table_length - 1) + ", got " +
                                  std::to_string(position));
  return at;
}
}  // namespace

void rotary(const Problem& p, DType dtype, const Tensor& query, const Tensor& key) {
  std::vector<int32_t> at = positions(p);
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    bool streamed = p.half % kLanes == 0 && p.head_dim % kLanes == 0;
    int64_t bytes = 0;
    for (const Tensor& t : {query, key}) {
      int64_t size = p.batches * p.tokens * t.heads * p.head_dim * sizeof(T);
      advise_huge_pages(t.out, size);
      bytes += size;
      streamed = streamed && reinterpret_cast<uintptr_t>(t.out) % kVectorBytes == 0;
    }
    streamed = streamed && bytes > kStreamBytes;
    auto rotate = [&](auto past_caches) {
#pragma omp parallel
      {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.batches * p.tokens; i++) {
          const float *c = p.cos + at[i] * p.half, *s = p.sin + at[i] * p.half;
          rotate_token<past_caches, T>(p, query, i / p.tokens, i % p.tokens, c, s);
          rotate_token<past_caches, T>(p, key, i / p.tokens, i % p.tokens, c, s);
        }
        if (past_caches) finish_streams();
      }
    };
    streamed ? rotate(std::true_type{}) : rotate(std::false_type{});
  });
}

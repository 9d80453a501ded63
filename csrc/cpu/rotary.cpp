// Rotary position embedding of q and k in one parallel loop over tokens.
//
// H heads, D head_dim, half = R / 2. Rotation reads any strides and writes contiguous rows.
#include "rotary.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "buffer.h"
#include "dispatch.h"

namespace py = pybind11;

namespace {
using Strides = std::array<int64_t, 3>;  // elements from one batch, token, head to the next

struct Tensor {
  const void* in;
  void* out;
  Strides strides;
  int64_t heads;
};

struct Problem {
  int64_t batches, tokens, head_dim, half, table_length;
  const float *cos, *sin;
  const int32_t* position_ids;  // [batches * tokens] or null
  const int32_t* cu_seqlens;    // [sequences + 1] or null
  int64_t sequences;
  float direction;
};

template <typename T>
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
      store(out + i, a * c - b * s);
      store(out + p.half + i, b * c + a * s);
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

void rotary(uintptr_t q, uintptr_t k, uintptr_t q_out, uintptr_t k_out, Strides q_strides,
            Strides k_strides, int64_t q_heads, int64_t k_heads, int dtype, int64_t batches,
            int64_t tokens, int64_t head_dim, int64_t half, uintptr_t cos, uintptr_t sin,
            int64_t table_length, uintptr_t position_ids, uintptr_t cu_seqlens, int64_t sequences,
            float direction) {
  Problem p{batches,
            tokens,
            head_dim,
            half,
            table_length,
            reinterpret_cast<const float*>(cos),
            reinterpret_cast<const float*>(sin),
            reinterpret_cast<const int32_t*>(position_ids),
            reinterpret_cast<const int32_t*>(cu_seqlens),
            sequences,
            direction};
  Tensor query{reinterpret_cast<const void*>(q), reinterpret_cast<void*>(q_out), q_strides,
               q_heads};
  Tensor key{reinterpret_cast<const void*>(k), reinterpret_cast<void*>(k_out), k_strides, k_heads};
  std::vector<int32_t> at = positions(p);
  with_dtype(static_cast<DType>(dtype), [&](auto tag) {
    using T = decltype(tag);
    for (const Tensor& t : {query, key})
      advise_huge_pages(t.out, batches * tokens * t.heads * head_dim * sizeof(T));
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < batches * tokens; i++) {
      const float *c = p.cos + at[i] * half, *s = p.sin + at[i] * half;
      rotate_token<T>(p, query, i / tokens, i % tokens, c, s);
      rotate_token<T>(p, key, i / tokens, i % tokens, c, s);
    }
  });
}
}  // namespace

void bind_rotary(py::module_& m) {
  m.def("rotary", &rotary, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("q_out"),
        py::arg("k_out"), py::arg("q_strides"), py::arg("k_strides"), py::arg("q_heads"),
        py::arg("k_heads"), py::arg("dtype"), py::arg("batches"), py::arg("tokens"),
        py::arg("head_dim"), py::arg("half"), py::arg("cos"), py::arg("sin"),
        py::arg("table_length"), py::arg("position_ids"), py::arg("cu_seqlens"),
        py::arg("sequences"), py::arg("direction"), py::call_guard<py::gil_scoped_release>());
}

// Gradients of the routing weights and logits, down to x, the router's weight and its bias.
//
// T tokens, H hidden, E experts, K topk.
#include <algorithm>

#include "buffer.h"
#include "dispatch.h"
#include "gemm.h"
#include "rotary.h"
#include "routing.h"

namespace {
using Problem = RoutingProblem;
using Backward = RoutingBackward;

constexpr int64_t kStep = 128;         // tokens summed apart, see gemm.h
constexpr int64_t kExperts = 32;       // summed apart in d_x
constexpr int64_t kColumns = 4 * kNR;  // of d_weight in a task: each row of x gives whole lines

// d[0 ... E) += the gradient that one token's weights hand to its logits
void token_gradient(const Problem& p, const Backward& b, int64_t t, float* d) {
  const float *w = b.topk_weights + t * p.topk, *d_w = b.d_topk_weights + t * p.topk;
  const float* logits = b.logits + t * p.experts;
  const int32_t* ids = b.topk_ids + t * p.topk;
  bool is_sigmoid = static_cast<Scoring>(p.scoring) == Scoring::kSigmoid;
  float mean = 0;
  for (int64_t k = 0; k < p.topk; k++) mean += w[k] * d_w[k];
  if (is_sigmoid) {
    float shared = p.renormalize ? mean : 0;
    for (int64_t k = 0; k < p.topk; k++)
      d[ids[k]] += w[k] * (d_w[k] - shared) * (1 - sigmoid(logits[ids[k]]));
  } else if (softmax_of_chosen(p)) {
    for (int64_t k = 0; k < p.topk; k++) d[ids[k]] += w[k] * (d_w[k] - mean);
  } else {
    float most = largest(logits, p.experts), sum = exp_sum(logits, p.experts, most);
    for (int64_t e = 0; e < p.experts; e++) d[e] -= mean * std::exp(logits[e] - most) / sum;
    for (int64_t k = 0; k < p.topk; k++) d[ids[k]] += w[k] * d_w[k];
  }
}

// d [T, stride], zero past E
void logits_gradient(const Problem& p, const Backward& b, float* d, int64_t stride) {
#pragma omp parallel for schedule(static) if (p.tokens > 64)
  for (int64_t t = 0; t < p.tokens; t++) {
    float* row = d + t * stride;
    std::fill_n(row, stride, 0.0f);
    if (b.d_logits != nullptr) std::copy_n(b.d_logits + t * p.experts, p.experts, row);
    if (b.d_topk_weights != nullptr) token_gradient(p, b, t, row);
  }
}

template <typename T>
void store_tile(const vf (&acc)[kNV], T* out, int64_t n) {
  for (int v = 0; v < kNV; v++) {
    int64_t left = n - v * kLanes;
    if (left >= kLanes)
      store(out + v * kLanes, acc[v]);
    else if (left > 0)
      store_partial(out + v * kLanes, acc[v], static_cast<int>(left));
  }
}

// d_x = d weight
template <typename T>
void gradient_of_x(const Problem& p, const Backward& b, const float* d, int64_t stride) {
  int64_t width = round_up(p.hidden, kNR);
  Buffer<float> weight(p.experts * width);
  const T* in = static_cast<const T*>(b.weight);
  T* out = static_cast<T*>(b.d_x);
  advise_huge_pages(out, p.tokens * p.hidden * sizeof(T));
#pragma omp parallel if (p.tokens > kMR)
  {
#pragma omp for schedule(static)
    for (int64_t e = 0; e < p.experts; e++)
      load_row(in + e * p.hidden, weight.get() + e * width, p.hidden, width);
    Buffer<float> panel(p.experts * kMR);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.tokens; t += kMR) {
      int64_t rows = std::min<int64_t>(kMR, p.tokens - t);
      for (int64_t e = 0; e < p.experts; e++)
        for (int64_t m = 0; m < kMR; m++)
          panel[e * kMR + m] = m < rows ? d[(t + m) * stride + e] : 0;
      for (int64_t h = 0; h < p.hidden; h += kNR) {
        vf acc[kMR][kNV] = {};
        for (int64_t e = 0; e < p.experts; e += kExperts) {
          vf part[kMR][kNV] = {};
          micro_kernel(std::min(kExperts, p.experts - e), panel.get() + e * kMR, kMR,
                       weight.get() + e * width + h, width, part);
          for (int m = 0; m < kMR; m++)
            for (int v = 0; v < kNV; v++) acc[m][v] += part[m][v];
        }
        for (int64_t m = 0; m < rows; m++)
          store_tile(acc[m], out + (t + m) * p.hidden + h, p.hidden - h);
      }
    }
  }
}

// d_weight [E, columns from h] = d^T x
template <typename T>
void gradient_of_weight(const Problem& p, const Backward& b, const float* d, int64_t stride,
                        int64_t h, float* x, vf (*sums)[kMR][kNV]) {
  int64_t tiles = kColumns / kNR, groups = stride / kMR;
  std::fill_n(&sums[0][0][0], groups * tiles * kMR * kNV, vf{});
  int64_t width = std::min(kColumns, p.hidden - h);
  for (int64_t t = 0; t < p.tokens; t += kStep) {
    int64_t rows = std::min(kStep, p.tokens - t);
    for (int64_t r = 0; r < rows; r++)
      load_row(static_cast<const T*>(b.x) + (t + r) * b.x_stride + h, x + r * kColumns, width,
               kColumns);
    for (int64_t n = 0; n < tiles && n * kNR < width; n++)
      for (int64_t g = 0; g < groups; g++) {
        vf acc[kMR][kNV] = {};
        micro_kernel(rows, d + t * stride + g * kMR, stride, x + n * kNR, kColumns, acc);
        for (int m = 0; m < kMR; m++)
          for (int v = 0; v < kNV; v++) sums[g * tiles + n][m][v] += acc[m][v];
      }
  }
  T* out = static_cast<T*>(b.d_weight);
  for (int64_t n = 0; n < tiles; n++)
    for (int64_t e = 0; e < p.experts; e++)
      store_tile(sums[e / kMR * tiles + n][e % kMR], out + e * p.hidden + h + n * kNR,
                 width - n * kNR);
}

template <typename T>
void gradients_of_weight(const Problem& p, const Backward& b, const float* d, int64_t stride) {
#pragma omp parallel if (p.tokens > 1)
  {
    Buffer<float> x(kStep * kColumns);
    Buffer<vf> sums(stride * kColumns / kLanes);
    auto* tiles = reinterpret_cast<vf(*)[kMR][kNV]>(sums.get());
#pragma omp for schedule(static)
    for (int64_t h = 0; h < p.hidden; h += kColumns)
      gradient_of_weight<T>(p, b, d, stride, h, x.get(), tiles);
  }
}

// In double: a sum over all tokens that costs nothing beside the products.
void gradient_of_bias(const Problem& p, const float* d, int64_t stride, float* d_bias) {
  Buffer<double> sum(p.experts);
  std::fill_n(sum.get(), p.experts, 0.0);
  for (int64_t t = 0; t < p.tokens; t++)
    for (int64_t e = 0; e < p.experts; e++) sum[e] += d[t * stride + e];
  for (int64_t e = 0; e < p.experts; e++) d_bias[e] = static_cast<float>(sum[e]);
}
}  // namespace

void routing_logits_bwd(const Problem& p, const Backward& b, float* d_logits) {
  logits_gradient(p, b, d_logits, p.experts);
}

void routing_bwd(const Problem& p, const Backward& b) {
  int64_t stride = round_up(p.experts, kMR);
  Buffer<float> d(p.tokens * stride);
  logits_gradient(p, b, d.get(), stride);
  with_dtype(b.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (b.d_x != nullptr) gradient_of_x<T>(p, b, d.get(), stride);
    if (b.d_weight != nullptr) gradients_of_weight<T>(p, b, d.get(), stride);
  });
  if (b.d_bias != nullptr) gradient_of_bias(p, d.get(), stride, b.d_bias);
}

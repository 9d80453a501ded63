// A layer of experts for few tokens, bound by reading each chosen expert's weights once.
//
// T tokens, K experts a token, S = T K rows sorted by expert, E experts, H hidden, I intermediate.
// Two launches: gate and up with bias and SwiGLU into hidden rows [S, I]; down with bias, routing
// weight and the sum over a token's experts. Sums are fp32, in an order fixed by the routing alone.
//
// MXFP4 and out_in weights run along memory in the inner dimension: a warp computes a few outputs
// and its lanes take the inner elements. in_out weights run along the outputs: a few lanes take 16
// bytes of them, and all other lanes and warps of the block the inner elements.
#include <algorithm>

#include "intrinsics.h"

namespace {
constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kDownWarps = 4, kDownThreads = kDownWarps * kWarp;
constexpr int kColumns = 4;  // outputs of a warp: gate and up of two intermediates, or four hidden
constexpr int kMaxRows = 4, kMaxColumnRows = 2;  // rows of an expert at a time
constexpr int kLanes = 4;                        // side by side along in_out outputs
constexpr int kGroups =
    kWarp / kLanes * kWarps;  // that share the inner dimension of in_out weights
constexpr int kBlock = 32;    // values of an MXFP4 scale

// Steps along the inner dimension whose loads come first: registers allow fewer for more rows.
template <int Rows>
constexpr int kAhead = Rows > 2 ? 1 : 2;

template <typename T>
struct Matrix {
  Global<const T> dense;  // or null:
  Global<const uint8_t> blocks, scales;
  Global<const T> bias;  // or null
};

template <typename T>
struct Layer {
  Global<const T> x;
  Global<const float> topk_weights;
  Global<const int32_t> offs, gather, scatter;
  Matrix<T> gate_up, down;
  Global<T> rows, y;  // [S, I], [T, H]
  int tokens, topk, experts, hidden, intermediate;
  bool interleaved, plain;
  float alpha, limit;
};

// The n-th expert that has rows, -1 where there are fewer. Of a whole warp.
__device__ __forceinline__ int nth_expert(Global<const int32_t> offs, int experts, int n) {
  int lane = threadIdx.x % kWarp;
  for (int base = 0; base < experts; base += kWarp) {
    int e = base + lane;
    bool some = e < experts && load(offs + e + 1) > load(offs + e);
    unsigned votes = __ballot_sync(kAllLanes, some);
    if (n < __popc(votes)) {
      for (; n > 0; n--) votes &= votes - 1;
      return base + __ffs(static_cast<int>(votes)) - 1;
    }
    n -= __popc(votes);
  }
  return -1;
}

// Nibbles 0 and 4, 1 and 5, 2 and 6, 3 and 7 as halves, which are 2^-14 of their values.
__device__ inline void decode8(uint32_t codes, float (&w)[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t at_nine = i == 3 ? codes >> 3 : codes << (9 - 4 * i);
    uint32_t pair = (at_nine & 0x0e000e00u) | ((codes << (12 - 4 * i)) & 0x80008000u);
    w[i] = widen(f16{static_cast<uint16_t>(pair)});
    w[i + 4] = widen(f16{static_cast<uint16_t>(pair >> 16)});
  }
}
// 2^(byte - 127); 255 is NaN.
__device__ inline float scale_of(uint8_t byte) {
  return __uint_as_float(byte == 0 ? 1u << 22 : byte == 255 ? 0x7fc00000u : uint32_t{byte} << 23);
}

template <typename T>
__device__ inline void read8(Global<const T> p, float (&x)[8]) {
  if constexpr (sizeof(T) == 2) {
    widen16<T>(load16(p), x);
  } else {
    float low[4], high[4];
    widen16<T>(load16(p), low);
    widen16<T>(load16(p + 4), high);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      x[i] = low[i];
      x[i + 4] = high[i];
    }
  }
}

// Products of Rows rows with kColumns outputs, the lane's share of the inner dimension.
template <typename T, int Rows>
struct Sums {
  float at[Rows][kColumns];
};

template <typename T, int Rows>
__device__ __forceinline__ void multiply_mxfp4(const Matrix<T>& m,
                                               const int64_t (&output)[kColumns], int inner,
                                               const Global<const T> (&x)[Rows],
                                               Sums<T, Rows>& sums) {
  int blocks = inner / kBlock, lane = threadIdx.x % kWarp;
  for (int base = lane; base < blocks; base += kAhead<Rows> * kWarp) {
    Bits16 codes[kAhead<Rows>][kColumns];
    uint8_t scales[kAhead<Rows>][kColumns];
#pragma unroll
    for (int n = 0; n < kAhead<Rows>; n++) {
      int block = min(base + n * kWarp, blocks - 1);
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        codes[n][c] = load16(m.blocks + (output[c] * blocks + block) * 16);
        scales[n][c] = load(m.scales + (output[c] * blocks + block));
      }
    }
#pragma unroll
    for (int n = 0; n < kAhead<Rows>; n++) {
      int block = base + n * kWarp;
      if (block >= blocks) break;
      // A scale multiplies a block's sum, or, where registers are short, each weight.
      constexpr bool late = Rows <= 2;
      Sums<T, Rows> part = {};
      Sums<T, Rows>& into = late ? part : sums;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float rows[Rows][8];
#pragma unroll
        for (int r = 0; r < Rows; r++) read8<T>(x[r] + (block * kBlock + j * 8), rows[r]);
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
          float w[8];
          decode8(codes[n][c].word[j], w);
#pragma unroll
          for (int i = 0; i < 8; i++) {
            if (!late) w[i] *= scale_of(scales[n][c]);
#pragma unroll
            for (int r = 0; r < Rows; r++) into.at[r][c] += rows[r][i] * w[i];
          }
        }
      }
      if constexpr (late) {
#pragma unroll
        for (int c = 0; c < kColumns; c++)
#pragma unroll
          for (int r = 0; r < Rows; r++) sums.at[r][c] += part.at[r][c] * scale_of(scales[n][c]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; r++)
#pragma unroll
    for (int c = 0; c < kColumns; c++) sums.at[r][c] *= 0x1p14f;
}

template <typename T, int Rows>
__device__ __forceinline__ void multiply_dense(const Matrix<T>& m,
                                               const int64_t (&output)[kColumns], int inner,
                                               const Global<const T> (&x)[Rows],
                                               Sums<T, Rows>& sums) {
  constexpr int V = kElements<T>;
  int lane = threadIdx.x % kWarp;
  for (int base = lane * V; base < inner; base += kAhead<Rows> * kWarp * V) {
    Bits16 weights[kAhead<Rows>][kColumns];
#pragma unroll
    for (int n = 0; n < kAhead<Rows>; n++) {
      int at = min(base + n * kWarp * V, inner - V);
#pragma unroll
      for (int c = 0; c < kColumns; c++) weights[n][c] = load16(m.dense + (output[c] * inner + at));
    }
#pragma unroll
    for (int n = 0; n < kAhead<Rows>; n++) {
      int at = base + n * kWarp * V;
      if (at >= inner) break;
      float rows[Rows][V];
#pragma unroll
      for (int r = 0; r < Rows; r++) widen16<T>(load16(x[r] + at), rows[r]);
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        float w[V];
        widen16<T>(weights[n][c], w);
#pragma unroll
        for (int r = 0; r < Rows; r++)
#pragma unroll
          for (int i = 0; i < V; i++) sums.at[r][c] += rows[r][i] * w[i];
      }
    }
  }
}

template <typename T, bool Packed, int Rows>
__device__ __forceinline__ void multiply(const Matrix<T>& m, const int64_t (&output)[kColumns],
                                         int inner, const Global<const T> (&x)[Rows],
                                         Sums<T, Rows>& sums) {
  if constexpr (Packed)
    multiply_mxfp4(m, output, inner, x, sums);
  else
    multiply_dense(m, output, inner, x, sums);
#pragma unroll
  for (int r = 0; r < Rows; r++)
#pragma unroll
    for (int c = 0; c < kColumns; c++) sums.at[r][c] = warp_sum(sums.at[r][c]);
}

// f of 1, 2 or Most as a type, and the first row, over an expert's rows
template <int Most, typename F>
__device__ __forceinline__ void each_rows(int begin, int end, F&& f) {
#pragma unroll 1
  for (int s = begin; s < end; s += Most) {
    if (end - s == 1)
      f(std::integral_constant<int, 1>{}, s);
    else if (end - s == 2)
      f(std::integral_constant<int, 2>{}, s);
    else
      f(std::integral_constant<int, Most>{}, s);
  }
}

template <typename T>
__device__ inline float bias_of(const Matrix<T>& m, int64_t at) {
  return m.bias == nullptr ? 0.0f : widen(load(m.bias + at));
}

template <typename T>
__device__ inline float activate(const Layer<T>& l, float gate, float up) {
  if (l.plain) return gate * sigmoid(gate) * up;
  gate = gate > l.limit ? l.limit : gate;  // NaN stays
  up = up > l.limit ? l.limit : up < -l.limit ? -l.limit : up;
  return (up + 1) * (gate * sigmoid(l.alpha * gate));
}

// Places of intermediate i's gate and up among 2 I.
template <typename T>
__device__ inline int gate_at(const Layer<T>& l, int i) {
  return l.interleaved ? 2 * i : i;
}
template <typename T>
__device__ inline int up_at(const Layer<T>& l, int i) {
  return l.interleaved ? 2 * i + 1 : l.intermediate + i;
}

template <typename T, bool Packed>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2) gate_up_kernel(Layer<T> l) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int first = (blockIdx.x * kWarps + warp) * 2;
  int e = nth_expert(l.offs, l.experts, blockIdx.y);
  if (e < 0 || first >= l.intermediate) return;
  int64_t width = 2 * int64_t{l.intermediate}, output[kColumns];
#pragma unroll
  for (int n = 0; n < 2; n++) {
    int i = min(first + n, l.intermediate - 1);
    output[2 * n] = e * width + gate_at(l, i);
    output[2 * n + 1] = e * width + up_at(l, i);
  }
  int end = load(l.offs + e + 1);
  each_rows<kMaxRows>(load(l.offs + e), end, [&](auto count, int s) {
    constexpr int Rows = decltype(count)::value;
    Global<const T> x[Rows];
#pragma unroll
    for (int r = 0; r < Rows; r++)
      x[r] = l.x + int64_t{load(l.gather + min(s + r, end - 1))} * l.hidden;
    Sums<T, Rows> sums = {};
    multiply<T, Packed, Rows>(l.gate_up, output, l.hidden, x, sums);
#pragma unroll
    for (int r = 0; r < Rows; r++) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        if (lane != r * 2 + n || s + r >= end || first + n >= l.intermediate) continue;
        float gate = sums.at[r][2 * n] + bias_of(l.gate_up, output[2 * n]);
        float up = sums.at[r][2 * n + 1] + bias_of(l.gate_up, output[2 * n + 1]);
        l.rows[int64_t{s + r} * l.intermediate + first + n] = narrow<T>(activate(l, gate, up));
      }
    }
  });
}

// y of all tokens in `columns` outputs from `first`, once a block has every row's product.
template <typename T>
__device__ __forceinline__ void combine(const Layer<T>& l, Shared<float> products, int first,
                                        int columns) {
  __syncthreads();
  for (int i = threadIdx.x; i < l.tokens * columns; i += blockDim.x) {
    int t = i / columns, c = i % columns;
    if (first + c >= l.hidden) continue;
    float sum = 0;
#pragma unroll 2
    for (int k = 0; k < l.topk; k++) {
      int row = load(l.scatter + (t * l.topk + k));
      float product = products[row * columns + c];
      sum += load(l.topk_weights + (t * l.topk + k)) * product;
    }
    l.y[int64_t{t} * l.hidden + first + c] = narrow<T>(sum);
  }
}

template <typename T, bool Packed>
__global__ void __launch_bounds__(kDownThreads, 3) down_kernel(Layer<T> l, Global<const T> rows) {
  DYNAMIC_SHARED(float, products);  // [S, kColumns]
  int lane = threadIdx.x % kWarp, first = blockIdx.x * kColumns;
  for (int n = threadIdx.x / kWarp;; n += kDownWarps) {
    int e = nth_expert(l.offs, l.experts, n);
    if (e < 0) break;
    int64_t output[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; c++)
      output[c] = int64_t{e} * l.hidden + min(first + c, l.hidden - 1);
    int end = load(l.offs + e + 1);
    each_rows<kMaxRows>(load(l.offs + e), end, [&](auto count, int s) {
      constexpr int Rows = decltype(count)::value;
      Global<const T> x[Rows];
#pragma unroll
      for (int r = 0; r < Rows; r++) x[r] = rows + int64_t{min(s + r, end - 1)} * l.intermediate;
      Sums<T, Rows> sums = {};
      multiply<T, Packed, Rows>(l.down, output, l.intermediate, x, sums);
#pragma unroll
      for (int r = 0; r < Rows; r++) {
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
          if (lane == r * kColumns + c && s + r < end)
            products[(s + r) * kColumns + c] = sums.at[r][c] + bias_of(l.down, output[c]);
        }
      }
    });
  }
  combine(l, products, first, kColumns);
}

// in_out weights. A lane takes V outputs at each of Parts places of the matrix, for its share of
// the inner dimension; sums [Rows, kLanes, Parts V] of the block end in `total`.
template <typename T, int Rows, int Parts>
__device__ __forceinline__ void multiply_columns(Global<const T> weight, int64_t stride,
                                                 const int (&at)[Parts], int inner,
                                                 const Global<const T> (&x)[Rows],
                                                 Shared<float> part, Shared<float> total) {
  constexpr int V = kElements<T>, kWide = Parts * V;
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float sums[Rows][kWide] = {};
  for (int base = threadIdx.x / kLanes; base < inner; base += kAhead<Rows> * kGroups) {
    Bits16 weights[kAhead<Rows>][Parts];
#pragma unroll
    for (int n = 0; n < kAhead<Rows>; n++)
#pragma unroll
      for (int p = 0; p < Parts; p++)
        weights[n][p] = load16(weight + (min(base + n * kGroups, inner - 1) * stride + at[p]));
#pragma unroll
    for (int n = 0; n < kAhead<Rows>; n++) {
      int k = min(base + n * kGroups, inner - 1);
      bool inside = base + n * kGroups < inner;
#pragma unroll
      for (int p = 0; p < Parts; p++) {
        float w[V];
        widen16<T>(inside ? weights[n][p] : Bits16{}, w);
#pragma unroll
        for (int r = 0; r < Rows; r++) {
          float value = inside ? widen(load(x[r] + k)) : 0.0f;
#pragma unroll
          for (int i = 0; i < V; i++) sums[r][p * V + i] += value * w[i];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; r++) {
#pragma unroll
    for (int i = 0; i < kWide; i++) {
      float sum = sums[r][i];
#pragma unroll
      for (int lanes = kLanes; lanes < kWarp; lanes *= 2)
        sum += __shfl_xor_sync(kAllLanes, sum, lanes);
      if (lane < kLanes) part[((warp * kMaxColumnRows + r) * kLanes + lane) * kWide + i] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Rows * kLanes * kWide; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += part[w * kMaxColumnRows * kLanes * kWide + i];
    total[i] = sum;
  }
  __syncthreads();
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gate_up_columns_kernel(Layer<T> l) {
  constexpr int V = kElements<T>;
  SHARED_ARRAY(float, part, kWarps * kMaxColumnRows * kLanes * 2 * V);
  SHARED_ARRAY(float, total, kMaxColumnRows * kLanes * 2 * V);
  int e = nth_expert(l.offs, l.experts, blockIdx.y);
  if (e < 0) return;
  int first = blockIdx.x * kLanes * V, lanes_first = first + threadIdx.x % kLanes * V;
  int begin = min(lanes_first, l.intermediate - V);  // the last lanes may have none of their own
  int at[2] = {gate_at(l, begin), l.interleaved ? 2 * begin + V : up_at(l, begin)};
  int64_t width = 2 * int64_t{l.intermediate};
  int end = load(l.offs + e + 1);
  each_rows<kMaxColumnRows>(load(l.offs + e), end, [&](auto count, int s) {
    constexpr int Rows = decltype(count)::value;
    Global<const T> x[Rows];
#pragma unroll
    for (int r = 0; r < Rows; r++)
      x[r] = l.x + int64_t{load(l.gather + min(s + r, end - 1))} * l.hidden;
    multiply_columns<T, Rows, 2>(l.gate_up.dense + e * width * l.hidden, width, at, l.hidden, x,
                                 part, total);
    for (int i = threadIdx.x; i < Rows * kLanes * V; i += kThreads) {
      int r = i / (kLanes * V), lane = i / V % kLanes, j = i % V, n = first + lane * V + j;
      if (s + r >= end || n >= l.intermediate) continue;
      Shared<float> sums = total + (r * kLanes + lane) * 2 * V;
      float gate = sums[l.interleaved ? 2 * j : j], up = sums[l.interleaved ? 2 * j + 1 : V + j];
      gate += bias_of(l.gate_up, e * width + gate_at(l, n));
      up += bias_of(l.gate_up, e * width + up_at(l, n));
      l.rows[int64_t{s + r} * l.intermediate + n] = narrow<T>(activate(l, gate, up));
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    down_columns_kernel(Layer<T> l, Global<const T> rows) {
  constexpr int V = kElements<T>, kWide = kLanes * V;
  DYNAMIC_SHARED(float, products);  // [S, kWide]
  SHARED_ARRAY(float, part, kWarps * kMaxColumnRows * kWide);
  SHARED_ARRAY(float, total, kMaxColumnRows* kWide);
  int first = blockIdx.x * kWide;
  int at[1] = {min(first + static_cast<int>(threadIdx.x) % kLanes * V, l.hidden - V)};
#pragma unroll 1
  for (int n = 0;; n++) {
    int e = nth_expert(l.offs, l.experts, n);
    if (e < 0) break;
    int end = load(l.offs + e + 1);
    each_rows<kMaxColumnRows>(load(l.offs + e), end, [&](auto count, int s) {
      constexpr int Rows = decltype(count)::value;
      Global<const T> x[Rows];
#pragma unroll
      for (int r = 0; r < Rows; r++) x[r] = rows + int64_t{min(s + r, end - 1)} * l.intermediate;
      multiply_columns<T, Rows, 1>(l.down.dense + int64_t{e} * l.intermediate * l.hidden, l.hidden,
                                   at, l.intermediate, x, part, total);
      for (int i = threadIdx.x; i < Rows * kWide; i += kThreads) {
        int r = i / kWide, c = i % kWide;
        if (s + r < end && first + c < l.hidden)
          products[s * kWide + i] = total[i] + bias_of(l.down, int64_t{e} * l.hidden + first + c);
      }
    });
  }
  combine(l, products, first, kWide);
}

template <typename T>
Layer<T> layer(const cuda::ExpertsCall& c) {
  auto matrix = [](const void* weight, const uint8_t* scales, const void* bias) {
    Matrix<T> m = {};
    if (scales == nullptr)
      m.dense = static_cast<const T*>(weight);
    else
      m.blocks = static_cast<const uint8_t*>(weight);
    m.scales = scales;
    m.bias = static_cast<const T*>(bias);
    return m;
  };
  Layer<T> l = {};
  l.x = static_cast<const T*>(c.x);
  l.topk_weights = c.topk_weights;
  l.offs = c.expert_offs;
  l.gather = c.gather;
  l.scatter = c.scatter;
  l.gate_up = matrix(c.gate_up, c.gate_up_scales, c.gate_up_bias);
  l.down = matrix(c.down, c.down_scales, c.down_bias);
  l.rows = static_cast<T*>(c.rows);
  l.y = static_cast<T*>(c.y);
  l.tokens = static_cast<int>(c.tokens);
  l.topk = static_cast<int>(c.topk);
  l.experts = static_cast<int>(c.experts);
  l.hidden = static_cast<int>(c.hidden);
  l.intermediate = static_cast<int>(c.intermediate);
  l.interleaved = c.interleaved;
  l.plain = c.plain;
  l.alpha = c.alpha;
  l.limit = c.limit;
  return l;
}

template <typename T>
const char* run(const Place& place, const cuda::ExpertsCall& c) {
  Layer<T> l = layer<T>(c);
  Global<const T> rows = static_cast<const T*>(c.rows);
  int slots = l.tokens * l.topk, experts = std::min(l.experts, slots);
  bool columns = c.gate_up_scales == nullptr && c.in_out;
  int wide = kLanes * kElements<T>;
  dim3 gate_up(ceil_div(l.intermediate, columns ? wide : 2 * kWarps), experts);
  dim3 down(ceil_div(l.hidden, columns ? wide : kColumns));
  int bytes = slots * (columns ? wide : kColumns) * static_cast<int>(sizeof(float));
  auto both = [&](auto first, auto second, int threads) {
    const char* reason = launch(first, place, gate_up, kThreads, 0, l);
    return *reason != 0 ? reason : launch(second, place, down, threads, bytes, l, rows);
  };
  if (columns) return both(gate_up_columns_kernel<T>, down_columns_kernel<T>, kThreads);
  if (c.gate_up_scales == nullptr)
    return both(gate_up_kernel<T, false>, down_kernel<T, false>, kDownThreads);
  return both(gate_up_kernel<T, true>, down_kernel<T, true>, kDownThreads);
}
}  // namespace

const char* cuda::experts(const Place& place, const ExpertsCall& c) {
  if (c.tokens * c.topk == 0) return "";
  return with_dtype(c.dtype, [&](auto tag) { return run<decltype(tag)>(place, c); });
}

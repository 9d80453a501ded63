// What the CUDA library offers: launchers over pointers, strides, sizes, a device and a stream.
//
// Launchers return the empty text, or the reason why nothing was launched. Absent tensors are null.
#pragma once

#include "../dtype.h"

struct Place {
  int device;
  void* stream;
};

// Empty when a kernel of this library runs on the device, else the driver's reason.
const char* cuda_probe(int device);

namespace cuda {
// Rotates q and k (direction 1) or takes their gradients back (-1). H heads, half = R / 2.
struct RotaryTensor {
  const void* in;
  void* out;        // contiguous
  int64_t b, t, h;  // strides of in, in elements: batch, token, head
  int64_t heads;
};
struct RotaryCall {
  RotaryTensor q, k;
  DType dtype;
  int64_t batches, tokens, head_dim, half, table_length;
  const float *cos, *sin;    // [table_length, half]
  const void* position_ids;  // or null
  bool wide_positions;       // int64, else int32
  int64_t position_b, position_t;
  const int32_t* cu_seqlens;  // [sequences + 1] or null
  int64_t sequences;
  float direction;
};
const char* rotary(const Place&, const RotaryCall&);

// T tokens, H hidden, E experts, K topk. Rows of x and weight start on 16 bytes; which limits
// apply, <op>/cuda.py knows.
struct RoutingCall {
  int64_t tokens, hidden, experts, topk;
  int scoring;  // 0 topk_softmax, 1 softmax_topk, 2 sigmoid
  bool renormalize;
  DType dtype;             // of x and weight
  const void *x, *weight;  // [T, H] with rows x_stride apart, [E, H]; null: the logits are given
  int64_t x_stride;
  const float *bias, *correction_bias;  // [E] or null
  const int32_t* given_ids;             // [T, K] or null
  float *logits, *topk_weights;         // [T, E], [T, K]; null: only the given ids are sorted
  int32_t* topk_ids;                    // [T, K]
  int32_t *hist, *offs, *gather, *scatter;
  int32_t* scratch;  // [1 + E * tiles of 32 tokens]
};
const char* routing(const Place&, const RoutingCall&);

// T tokens, K experts a token, S = T K rows sorted by expert, E experts, H hidden, I intermediate.
// Everything is contiguous, and rows of weights and x start on 16 bytes.
struct ExpertsCall {
  int64_t tokens, topk, experts, hidden, intermediate;
  DType dtype;                                    // of all that is not typed here
  const void* x;                                  // [T, H]
  const float* topk_weights;                      // [T, K]
  const int32_t *expert_offs, *gather, *scatter;  // [E + 1], [S], [S]
  const void *gate_up, *down;                     // dense, or MXFP4 blocks
  const uint8_t *gate_up_scales, *down_scales;    // null: dense
  const void *gate_up_bias, *down_bias;           // [E, 2I], [E, H] or null
  bool in_out, interleaved, plain;  // of dense weights, of gate and up, SwiGLU without clamps
  float alpha, limit;
  void *rows, *y;  // [S, I] between the launches, [T, H]
};
const char* experts(const Place&, const ExpertsCall&);

// B sequences of S new tokens, H query heads, G key heads, D head_dim.
constexpr int kDecodeSplit = 256;  // keys that a block reads
struct DecodeTensor {
  void* at;         // null: absent
  Strides strides;  // batch or page, token, head
};
struct DecodeCall {
  DType dtype;  // of q, k, v and out
  bool fp8;     // the caches are e4m3, else of that dtype
  int64_t batches, tokens, heads, kv_heads, head_dim;
  int64_t capacity, pages, page;  // keys a sequence may have
  const int32_t *seqlens, *block_table;
  int64_t table_stride;
  const float *cos, *sin;
  int64_t half, table_length;
  const float *k_scale, *v_scale, *sinks;  // [G], [G], [H], or null
  int64_t window_left;                     // -1: open
  float scale;
  DecodeTensor q, k, v, k_cache, v_cache;
  int64_t splits;  // of a sequence, at most
  float* parts;    // [B, S, H, splits, D + 2]
  void* out;       // [B, S, H, D]
};
const char* decode_attention(const Place&, const DecodeCall&);
}  // namespace cuda

struct CudaKernels {
  decltype(&::cuda_probe) probe;
  decltype(&cuda::rotary) rotary;
  decltype(&cuda::routing) routing;
  decltype(&cuda::experts) experts;
  decltype(&cuda::decode_attention) decode_attention;
};

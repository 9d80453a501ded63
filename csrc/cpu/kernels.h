// What one instruction set's library offers: plain functions over pointers and sizes.
//
// Every csrc/cpu source is compiled once per instruction set into a library of its own, whose only
// visible symbol returns this table; the Python module opens the library that fits the machine.
#pragma once

#include "../dtype.h"

// N images, T patches, R prefix rows an image, P patch side, D width, G side of the table (0:
// none).
struct PatchEmbedProblem {
  const void* pixels;  // uint8 HWC or float CHW, image after image
  DType pixel_dtype;
  const int32_t* sizes;  // [N, 2] height, width in pixels
  int64_t images, patches, prefix_rows, patch_size, width, grid;
  int interpolation;  // 0 bilinear antialias, 1 align corners, 2 bicubic, 3 bicubic antialias
  bool conv_layout;   // weight [D, C, P, P], else [D, P, P, C]
  float mean[3], std[3];
};

// Absent tensors and gradients that are not wanted are null. Everything is contiguous.
struct PatchEmbedForward {
  DType dtype;  // of weight, bias, prefix and tokens
  const void *weight, *bias;
  const float* table;  // [G, G, D]
  const void* prefix;
  void* tokens;     // [T + N R, D]
  int32_t* coords;  // [T + N R, 2]
};
struct PatchEmbedBackward {
  DType dtype;  // of d_tokens, weight, d_weight, d_bias and d_prefix
  const void *d_tokens, *weight;
  void *d_weight, *d_bias;
  float* d_table;
  void* d_prefix;
  float* d_pixels;
};

void patch_embed_fwd(const PatchEmbedProblem&, const PatchEmbedForward&);
void patch_embed_bwd(const PatchEmbedProblem&, const PatchEmbedBackward&);

// Rotates q and k (direction 1) or takes their gradients back (-1). H heads, half = R / 2.
struct RotaryProblem {
  int64_t batches, tokens, head_dim, half, table_length;
  const float *cos, *sin;       // [table_length, half]
  const int32_t* position_ids;  // [batches * tokens] or null
  const int32_t* cu_seqlens;    // [sequences + 1] or null
  int64_t sequences;
  float direction;
};
struct RotaryTensor {
  const void* in;
  void* out;  // contiguous
  Strides strides;
  int64_t heads;
};
void rotary(const RotaryProblem&, DType dtype, const RotaryTensor& q, const RotaryTensor& k);

struct AttentionProblem {
  int64_t sequences, heads, kv_heads, head_dim;
  int64_t tokens_q, tokens_k;  // of one batch entry, or packed in all
  const int32_t *cu_q, *cu_k;  // null: batched
  const float *cos, *sin;      // [table_length, half], null: no rotary
  int64_t half, table_length;
  const int32_t* position_ids;        // [tokens of k], null: counted
  int64_t window_left, window_right;  // -1: open
  float scale;
};
struct AttentionForward {
  const void *q, *k, *v;
  Strides q_strides, k_strides, v_strides, out_strides;
  const float* sinks;  // [H] or null
  void* out;
  float* lse;
};
struct AttentionBackward {
  const void *d_out, *q, *k, *v, *out;
  Strides d_out_strides, q_strides, k_strides, v_strides, out_strides;
  const float *d_lse, *lse, *sinks;  // d_lse [like lse] or null
  void *d_q, *d_k, *d_v;             // contiguous; null: not wanted
  float* d_sinks;
};
void attention_fwd(const AttentionProblem&, DType dtype, const AttentionForward&);
void attention_bwd(const AttentionProblem&, DType dtype, const AttentionBackward&);

// B sequences of S new tokens over caches of G heads; absent tensors are null.
struct DecodeProblem {
  int64_t batches, tokens, heads, kv_heads, head_dim;
  int64_t capacity;            // keys of a sequence that its cache or its pages hold
  const int32_t* seqlens;      // [B], -1: skipped
  const int32_t* block_table;  // [B, max_pages] with rows table_stride apart, null: dense
  int64_t table_stride, pages, page;
  const float *cos, *sin;  // [table_length, half]
  int64_t half, table_length;
  const float *k_scale, *v_scale, *sinks;  // [G], [G], [H]
  int64_t window_left;                     // -1: open
  float scale;
  bool append;  // of k and v
};
struct DecodeTensors {
  const void *q, *k, *v;
  void *k_cache, *v_cache;
  Strides q_strides, k_strides, v_strides;   // batch, token, head
  Strides k_cache_strides, v_cache_strides;  // batch or page, token, head
  void* out;                                 // contiguous
};
void decode_attention(const DecodeProblem&, DType dtype, bool fp8, const DecodeTensors&);

// T tokens, K experts a token, S = T K sorted rows, E experts, H hidden, I intermediate, R rank.
// Absent tensors and gradients that are not wanted are null. Everything is contiguous.
struct ExpertsProblem {
  int64_t tokens, topk, experts, hidden, intermediate;
  const float* topk_weights;                      // [T, K]
  const int32_t *expert_offs, *gather, *scatter;  // [E + 1], [S], [S]
  DType dtype;                                    // of all that is not float here
  const void *gate_up, *down;                     // dense, or blocks
  const uint8_t *gate_up_scales, *down_scales;    // null: dense
  const void *gate_up_bias, *down_bias;           // [E, 2I], [E, H]
  const void *gate_up_a, *gate_up_b;              // [E, R, H], [E, 2I, R]
  const void *down_a, *down_b;                    // [E, R, I], [E, H, R]
  int64_t gate_up_rank, down_rank;
  float lora_scaling;
  bool in_out, interleaved, plain;  // of dense weights, of gate and up, SwiGLU without clamps
  float alpha, limit;
};
struct ExpertsForward {
  const void* x;         // [T, H]
  void* y;               // [T, H]
  void* pre_activation;  // [S, 2I]
};
struct ExpertsBackward {
  const void *d_y, *pre_activation, *x;
  void* d_x;
  float* d_topk_weights;
  void *d_gate_up, *d_gate_up_bias, *d_down, *d_down_bias;
  void *d_gate_up_a, *d_gate_up_b, *d_down_a, *d_down_b;
};
void experts_fwd(const ExpertsProblem&, const ExpertsForward&);
void experts_bwd(const ExpertsProblem&, const ExpertsBackward&);

// T tokens, H hidden, E experts, K topk.
struct RoutingProblem {
  int64_t tokens, hidden, experts, topk;
  int scoring;  // 0 topk_softmax, 1 softmax_topk, 2 sigmoid
  bool renormalize;
};
struct RoutingOrder {
  int32_t *expert_hist, *expert_offs, *gather_indices, *scatter_indices;
};
struct RoutingForward {
  DType dtype;             // of x and weight
  const void *x, *weight;  // [T, H] with rows x_stride apart, [E, H]; null: the logits are given
  int64_t x_stride;
  const float *bias, *correction_bias;  // [E] or null
  const int32_t* given_ids;             // [T, K] or null
  float *logits, *topk_weights;         // [T, E], [T, K]
  int32_t* topk_ids;                    // [T, K]
  RoutingOrder order;
};
struct RoutingBackward {
  DType dtype;  // of x, weight, d_x, d_weight
  const void *x, *weight;
  int64_t x_stride;
  const float *d_topk_weights, *d_logits;  // null: none
  const float *topk_weights, *logits;
  const int32_t* topk_ids;
  void *d_x, *d_weight;  // null: not wanted
  float* d_bias;
};
void routing_fwd(const RoutingProblem&, const RoutingForward&);
void routing_sort(const int32_t* ids, int64_t tokens, int64_t topk, int64_t experts,
                  const RoutingOrder&);
void routing_bwd(const RoutingProblem&, const RoutingBackward&);
void routing_logits_bwd(const RoutingProblem&, const RoutingBackward&, float* d_logits);

// y [T, N] = x [T, K] weight [N, K]^T + bias [N] (null: none), for few tokens; all contiguous, in
// one dtype, summed in fp32
struct Linear {
  DType dtype;  // not fp16
  int64_t tokens, in, out;
  const void *x, *weight, *bias;
  void* y;
};
void linear(const Linear&);

// The same with a weight in blocks of 32 bytes, which are 128 too large: values [ceil(N / 16),
// K / 4, 16, 4], and scales [ceil(N / 16), K / 32, 16] in fp16
struct Int8Weight {
  const uint8_t* values;
  const void* scales;
};
struct LinearInt8 {
  DType dtype;  // of x, bias, y
  int64_t tokens, in, out;
  const void* x;
  Int8Weight weight;
  const void* bias;
  void* y;
};
void linear_int8(const LinearInt8&);

// One layer of a decoding step: norms, projections, attention over the cache, router, experts.
struct Projection {
  const void *weight, *scales, *bias;  // scales null: a dense weight in the layer's dtype
};
struct DecoderLayer {
  const void* x;  // [T, H]
  const void *input_norm, *post_norm;
  float epsilon;
  Projection q, k, v, o;
  DecodeProblem attention;  // T = batches * tokens
  void *k_cache, *v_cache;
  Strides k_cache_strides, v_cache_strides;
  const void* router_weight;  // [E, H]
  const float* router_bias;
  ExpertsProblem experts;  // without what routing gives
  void* y;                 // [T, H]
};
void decoder_layer(const DecoderLayer&);

// count blocks of 32 values, contiguous: 16 bytes and a scale each
void mxfp4_quantize(DType dtype, const void* in, int64_t count, uint8_t* blocks, uint8_t* scales);
void mxfp4_dequantize(DType dtype, const uint8_t* blocks, const uint8_t* scales, int64_t count,
                      void* out);

// out[i] = 2^in[i], n a multiple of the vector's length; for its accuracy test
void exp2_all(const float* in, float* out, int64_t n);

// fp32 <-> bf16 / fp16, for the tests that hold every instruction set to one rounding
void narrow(const float* in, void* out, int64_t n, DType dtype);
void widen(const void* in, float* out, int64_t n, DType dtype);

struct CpuKernels {
  const char* isa;
  decltype(&::narrow) narrow;
  decltype(&::widen) widen;
  decltype(&::patch_embed_fwd) patch_embed_fwd;
  decltype(&::patch_embed_bwd) patch_embed_bwd;
  decltype(&::exp2_all) exp2;
  decltype(&::rotary) rotary;
  decltype(&::attention_fwd) attention_fwd;
  decltype(&::attention_bwd) attention_bwd;
  decltype(&::decode_attention) decode_attention;
  decltype(&::experts_fwd) experts_fwd;
  decltype(&::experts_bwd) experts_bwd;
  decltype(&::routing_fwd) routing_fwd;
  decltype(&::routing_sort) routing_sort;
  decltype(&::routing_bwd) routing_bwd;
  decltype(&::routing_logits_bwd) routing_logits_bwd;
  decltype(&::linear) linear;
  decltype(&::linear_int8) linear_int8;
  decltype(&::decoder_layer) decoder_layer;
  decltype(&::mxfp4_quantize) mxfp4_quantize;
  decltype(&::mxfp4_dequantize) mxfp4_dequantize;
};

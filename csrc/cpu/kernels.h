// What one instruction set's library offers: plain functions over pointers and sizes.
//
// Every csrc/cpu source is compiled once per instruction set into a library of its own, whose only
// visible symbol returns this table; the Python module opens the library that fits the machine.
#pragma once

#include <cstdint>

enum class DType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kU8 = 3 };

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

// fp32 <-> bf16 / fp16, for the tests that hold every instruction set to one rounding
void narrow(const float* in, void* out, int64_t n, DType dtype);
void widen(const void* in, float* out, int64_t n, DType dtype);

struct CpuKernels {
  const char* isa;
  decltype(&::narrow) narrow;
  decltype(&::widen) widen;
  decltype(&::patch_embed_fwd) patch_embed_fwd;
  decltype(&::patch_embed_bwd) patch_embed_bwd;
};

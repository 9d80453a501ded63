// The one visible symbol of an instruction set's library.
#include "kernels.h"

extern "C" __attribute__((visibility("default"))) const CpuKernels* medgpt_cpu_kernels() {
  static const CpuKernels kernels = {
      MEDGPT_ISA,          &narrow,      &widen,         &patch_embed_fwd, &patch_embed_bwd,
      &exp2_all,           &rotary,      &attention_fwd, &attention_bwd,   &decode_attention,
      &experts_fwd,        &experts_bwd, &routing_fwd,   &routing_sort,    &routing_bwd,
      &routing_logits_bwd, &linear,      &linear_int8,   &decoder_layer,   &mxfp4_quantize,
      &mxfp4_dequantize};
  return &kernels;
}

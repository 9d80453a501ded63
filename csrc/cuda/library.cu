// The one visible symbol of the CUDA library.
#include "kernels.h"

extern "C" __attribute__((visibility("default"))) const CudaKernels* medgpt_cuda_kernels() {
  static const CudaKernels kernels = {&cuda_probe, &cuda::rotary, &cuda::routing, &cuda::experts,
                                      &cuda::decode_attention};
  return &kernels;
}

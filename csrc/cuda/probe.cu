// One launch that tells whether this build runs on this card and driver.
#include "intrinsics.h"

namespace {
__global__ void probe_kernel(int* out) { *out = 42; }
}  // namespace

const char* cuda_probe(int device) {
  OnDevice current(device);
  cudaError_t error = current.error();
  int *out = nullptr, value = 0;
  if (error == cudaSuccess) error = cudaMalloc(&out, sizeof(int));
  if (error == cudaSuccess) {
    const char* reason = launch(probe_kernel, {device, nullptr}, 1, 1, 0, out);
    if (*reason == 0) error = cudaMemcpy(&value, out, sizeof(int), cudaMemcpyDeviceToHost);
    cudaFree(out);
    if (*reason != 0) return reason;
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return value == 42 ? "" : "the probe kernel ran but wrote a wrong value";
}

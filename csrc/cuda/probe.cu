// One launch that tells whether this build runs on this card and driver.
#include <cuda_runtime.h>

#include "kernels.h"

namespace {
__global__ void probe_kernel(int* out) { *out = 42; }
}  // namespace

const char* cuda_probe(int device) {
  int before = 0, *out = nullptr, value = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaMalloc(&out, sizeof(int));
  if (error == cudaSuccess) {
    probe_kernel<<<1, 1>>>(out);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) error = cudaMemcpy(&value, out, sizeof(int), cudaMemcpyDeviceToHost);
  if (out != nullptr) cudaFree(out);
  cudaSetDevice(before);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return value == 42 ? "" : "the probe kernel ran but wrote a wrong value";
}

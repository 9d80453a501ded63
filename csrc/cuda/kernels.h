// What the CUDA library offers: launchers over pointers, sizes, a device ordinal and a stream.
#pragma once

// Empty when a kernel of this library runs on the device, else the driver's reason.
const char* cuda_probe(int device);

struct CudaKernels {
  decltype(&::cuda_probe) probe;
};

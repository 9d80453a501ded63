// Python bindings of the CUDA kernels: pointers, sizes, a device ordinal and a stream; no torch.
#include <pybind11/pybind11.h>

const char* medgpt_cuda_probe(int device);

PYBIND11_MODULE(_c_cuda, m) {
  m.doc() = "CUDA kernels of medgpt_kernels";
  m.def("probe", &medgpt_cuda_probe, pybind11::arg("device"));
}

// The Python module: opens the libraries of kernels and hands pointers and sizes to them. No torch.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace {
using Address = uintptr_t;  // 0 for an absent tensor

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The instruction sets of this machine that libraries are built for, best first.
py::list supported_isas() {
  py::list isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) isas.append("v4_bf16");
    isas.append("v4");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    isas.append("v3");
#endif
  isas.append("baseline");
  return isas;
}

// The table of a library; it stays open for the life of the process.
template <typename Kernels>
const Kernels* open_library(const std::string& path, const char* symbol) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  auto* table = reinterpret_cast<const Kernels* (*)()>(dlsym(library, symbol));
  if (table == nullptr) throw std::runtime_error(path + " has no " + symbol);
  return table();
}

PatchEmbedProblem make_problem(Address pixels, int pixel_dtype, Address sizes, int64_t images,
                               int64_t patches, int64_t prefix_rows, int64_t patch_size,
                               int64_t width, int64_t grid, int interpolation, bool conv_layout,
                               const py::sequence& mean, const py::sequence& std) {
  PatchEmbedProblem p{at<const void>(pixels),
                      static_cast<DType>(pixel_dtype),
                      at<const int32_t>(sizes),
                      images,
                      patches,
                      prefix_rows,
                      patch_size,
                      width,
                      grid,
                      interpolation,
                      conv_layout,
                      {},
                      {}};
  for (int c = 0; c < 3; c++) {
    p.mean[c] = mean[c].cast<float>();
    p.std[c] = std[c].cast<float>();
  }
  return p;
}

void bind_patch_embed(py::module_& m, py::class_<CpuKernels>& cpu) {
  py::class_<PatchEmbedProblem>(m, "PatchEmbedProblem")
      .def(py::init(&make_problem), py::kw_only(), py::arg("pixels"), py::arg("pixel_dtype"),
           py::arg("sizes"), py::arg("images"), py::arg("patches"), py::arg("prefix_rows"),
           py::arg("patch_size"), py::arg("width"), py::arg("grid"), py::arg("interpolation"),
           py::arg("conv_layout"), py::arg("mean"), py::arg("std"));
  cpu.def(
      "patch_embed_fwd",
      [](const CpuKernels& k, const PatchEmbedProblem& problem, int dtype, Address weight,
         Address bias, Address table, Address prefix, Address tokens, Address coords) {
        k.patch_embed_fwd(
            problem, {static_cast<DType>(dtype), at<void>(weight), at<void>(bias), at<float>(table),
                      at<void>(prefix), at<void>(tokens), at<int32_t>(coords)});
      },
      py::kw_only(), py::arg("problem"), py::arg("dtype"), py::arg("weight"), py::arg("bias"),
      py::arg("table"), py::arg("prefix"), py::arg("tokens"), py::arg("coords"),
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "patch_embed_bwd",
      [](const CpuKernels& k, const PatchEmbedProblem& problem, int dtype, Address d_tokens,
         Address weight, Address d_weight, Address d_bias, Address d_table, Address d_prefix,
         Address d_pixels) {
        k.patch_embed_bwd(problem, {static_cast<DType>(dtype), at<void>(d_tokens), at<void>(weight),
                                    at<void>(d_weight), at<void>(d_bias), at<float>(d_table),
                                    at<void>(d_prefix), at<float>(d_pixels)});
      },
      py::kw_only(), py::arg("problem"), py::arg("dtype"), py::arg("d_tokens"), py::arg("weight"),
      py::arg("d_weight"), py::arg("d_bias"), py::arg("d_table"), py::arg("d_prefix"),
      py::arg("d_pixels"), py::call_guard<py::gil_scoped_release>());
}
}  // namespace

PYBIND11_MODULE(_c, m) {
  m.doc() = "Opens the kernel libraries of medgpt_kernels";
  m.def("supported_isas", &supported_isas);

  py::class_<CpuKernels> cpu(m, "CpuKernels");
  cpu.def_readonly("isa", &CpuKernels::isa);
  cpu.def("narrow", [](const CpuKernels& k, Address in, Address out, int64_t n, int dtype) {
    k.narrow(at<const float>(in), at<void>(out), n, static_cast<DType>(dtype));
  });
  cpu.def("widen", [](const CpuKernels& k, Address in, Address out, int64_t n, int dtype) {
    k.widen(at<const void>(in), at<float>(out), n, static_cast<DType>(dtype));
  });
  bind_patch_embed(m, cpu);
  m.def(
      "open_cpu",
      [](const std::string& path) { return open_library<CpuKernels>(path, "medgpt_cpu_kernels"); },
      py::return_value_policy::reference);

  py::class_<CudaKernels> cuda(m, "CudaKernels");
  cuda.def("probe", [](const CudaKernels& k, int device) { return k.probe(device); });
  m.def(
      "open_cuda",
      [](const std::string& path) {
        return open_library<CudaKernels>(path, "medgpt_cuda_kernels");
      },
      py::return_value_policy::reference);
}

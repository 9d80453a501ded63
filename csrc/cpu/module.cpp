// Python module of one instruction set; every op adds its functions through bind_<op>.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_attention(py::module_& m);
void bind_numerics(py::module_& m);
void bind_patch_embed(py::module_& m);
void bind_rotary(py::module_& m);

namespace {
// The instruction sets of this machine that modules are built for, best first.
py::list supported_isas() {
  py::list isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    isas.append("v4");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2"))
    isas.append("v3");
#endif
  isas.append("baseline");
  return isas;
}
}  // namespace

PYBIND11_MODULE(MEDGPT_MODULE, m) {
  m.doc() = "CPU kernels of medgpt_kernels, compiled for " MEDGPT_ISA;
  m.attr("isa") = MEDGPT_ISA;
  m.def("supported_isas", &supported_isas);
  bind_attention(m);
  bind_numerics(m);
  bind_patch_embed(m);
  bind_rotary(m);
}

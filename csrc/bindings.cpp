// The Python module: opens the libraries of kernels and hands pointers and sizes to them. No torch.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings_cuda.h"
#include "bindings_direct.h"
#include "cpu/kernels.h"

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
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
      isas.append("v4_bf16");
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

void bind_rotary(py::class_<CpuKernels>& cpu) {
  cpu.def(
      "rotary",
      [](const CpuKernels& kernels, Address q, Address k, Address q_out, Address k_out,
         Strides q_strides, Strides k_strides, int64_t q_heads, int64_t k_heads, int dtype,
         int64_t batches, int64_t tokens, int64_t head_dim, int64_t half, Address cos, Address sin,
         int64_t table_length, Address position_ids, Address cu_seqlens, int64_t sequences,
         float direction) {
        kernels.rotary(
            {batches, tokens, head_dim, half, table_length, at<float>(cos), at<float>(sin),
             at<int32_t>(position_ids), at<int32_t>(cu_seqlens), sequences, direction},
            static_cast<DType>(dtype), {at<void>(q), at<void>(q_out), q_strides, q_heads},
            {at<void>(k), at<void>(k_out), k_strides, k_heads});
      },
      py::kw_only(), py::arg("q"), py::arg("k"), py::arg("q_out"), py::arg("k_out"),
      py::arg("q_strides"), py::arg("k_strides"), py::arg("q_heads"), py::arg("k_heads"),
      py::arg("dtype"), py::arg("batches"), py::arg("tokens"), py::arg("head_dim"), py::arg("half"),
      py::arg("cos"), py::arg("sin"), py::arg("table_length"), py::arg("position_ids"),
      py::arg("cu_seqlens"), py::arg("sequences"), py::arg("direction"),
      py::call_guard<py::gil_scoped_release>());
}

AttentionProblem make_attention_problem(int64_t sequences, int64_t heads, int64_t kv_heads,
                                        int64_t head_dim, int64_t tokens_q, int64_t tokens_k,
                                        Address cu_q, Address cu_k, Address cos, Address sin,
                                        int64_t half, int64_t table_length, Address position_ids,
                                        int64_t window_left, int64_t window_right, float scale) {
  return {sequences,
          heads,
          kv_heads,
          head_dim,
          tokens_q,
          tokens_k,
          at<int32_t>(cu_q),
          at<int32_t>(cu_k),
          at<float>(cos),
          at<float>(sin),
          half,
          table_length,
          at<int32_t>(position_ids),
          window_left,
          window_right,
          scale};
}

void bind_attention(py::module_& m, py::class_<CpuKernels>& cpu) {
  py::class_<AttentionProblem>(m, "AttentionProblem")
      .def(py::init(&make_attention_problem), py::kw_only(), py::arg("sequences"), py::arg("heads"),
           py::arg("kv_heads"), py::arg("head_dim"), py::arg("tokens_q"), py::arg("tokens_k"),
           py::arg("cu_q"), py::arg("cu_k"), py::arg("cos"), py::arg("sin"), py::arg("half"),
           py::arg("table_length"), py::arg("position_ids"), py::arg("window_left"),
           py::arg("window_right"), py::arg("scale"));
  cpu.def(
      "attention_fwd",
      [](const CpuKernels& kernels, const AttentionProblem& problem, int dtype, Address q,
         Address k, Address v, Strides q_strides, Strides k_strides, Strides v_strides,
         Strides out_strides, Address sinks, Address out, Address lse) {
        kernels.attention_fwd(
            problem, static_cast<DType>(dtype),
            {at<void>(q), at<void>(k), at<void>(v), q_strides, k_strides, v_strides, out_strides,
             at<float>(sinks), at<void>(out), at<float>(lse)});
      },
      py::kw_only(), py::arg("problem"), py::arg("dtype"), py::arg("q"), py::arg("k"), py::arg("v"),
      py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"), py::arg("out_strides"),
      py::arg("sinks"), py::arg("out"), py::arg("lse"), py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "attention_bwd",
      [](const CpuKernels& kernels, const AttentionProblem& problem, int dtype, Address d_out,
         Address q, Address k, Address v, Address out, Strides d_out_strides, Strides q_strides,
         Strides k_strides, Strides v_strides, Strides out_strides, Address d_lse, Address lse,
         Address sinks, Address d_q, Address d_k, Address d_v, Address d_sinks) {
        kernels.attention_bwd(
            problem, static_cast<DType>(dtype),
            {at<void>(d_out), at<void>(q), at<void>(k), at<void>(v), at<void>(out), d_out_strides,
             q_strides, k_strides, v_strides, out_strides, at<float>(d_lse), at<float>(lse),
             at<float>(sinks), at<void>(d_q), at<void>(d_k), at<void>(d_v), at<float>(d_sinks)});
      },
      py::kw_only(), py::arg("problem"), py::arg("dtype"), py::arg("d_out"), py::arg("q"),
      py::arg("k"), py::arg("v"), py::arg("out"), py::arg("d_out_strides"), py::arg("q_strides"),
      py::arg("k_strides"), py::arg("v_strides"), py::arg("out_strides"), py::arg("d_lse"),
      py::arg("lse"), py::arg("sinks"), py::arg("d_q"), py::arg("d_k"), py::arg("d_v"),
      py::arg("d_sinks"), py::call_guard<py::gil_scoped_release>());
}

// By position: looking up names takes long beside a short window.
void bind_decode_attention(py::class_<CpuKernels>& cpu) {
  cpu.def(
      "decode_attention",
      [](const CpuKernels& kernels, int dtype, bool fp8, int64_t batches, int64_t tokens,
         int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity, Address seqlens,
         Address block_table, int64_t table_stride, int64_t pages, int64_t page, Address cos,
         Address sin, int64_t half, int64_t table_length, Address k_scale, Address v_scale,
         Address sinks, int64_t window_left, float scale, Address q, Address k, Address v,
         Address k_cache, Address v_cache, Strides q_strides, Strides k_strides, Strides v_strides,
         Strides k_cache_strides, Strides v_cache_strides, Address out) {
        DecodeProblem problem{batches,
                              tokens,
                              heads,
                              kv_heads,
                              head_dim,
                              capacity,
                              at<int32_t>(seqlens),
                              at<int32_t>(block_table),
                              table_stride,
                              pages,
                              page,
                              at<float>(cos),
                              at<float>(sin),
                              half,
                              table_length,
                              at<float>(k_scale),
                              at<float>(v_scale),
                              at<float>(sinks),
                              window_left,
                              scale,
                              k != 0};
        kernels.decode_attention(
            problem, static_cast<DType>(dtype), fp8,
            {at<void>(q), at<void>(k), at<void>(v), at<void>(k_cache), at<void>(v_cache), q_strides,
             k_strides, v_strides, k_cache_strides, v_cache_strides, at<void>(out)});
      },
      py::call_guard<py::gil_scoped_release>());
}

// Everything of a call by name, so that one dict in Python describes it.
ExpertsProblem make_experts_problem(const py::kwargs& k) {
  auto size = [&](const char* name) { return k[name].cast<int64_t>(); };
  auto address = [&](const char* name) { return k[name].cast<Address>(); };
  return {size("tokens"),
          size("topk"),
          size("experts"),
          size("hidden"),
          size("intermediate"),
          at<const float>(address("topk_weights")),
          at<const int32_t>(address("expert_offs")),
          at<const int32_t>(address("gather")),
          at<const int32_t>(address("scatter")),
          static_cast<DType>(k["dtype"].cast<int>()),
          at<const void>(address("gate_up")),
          at<const void>(address("down")),
          at<const uint8_t>(address("gate_up_scales")),
          at<const uint8_t>(address("down_scales")),
          at<const void>(address("gate_up_bias")),
          at<const void>(address("down_bias")),
          at<const void>(address("gate_up_a")),
          at<const void>(address("gate_up_b")),
          at<const void>(address("down_a")),
          at<const void>(address("down_b")),
          size("gate_up_rank"),
          size("down_rank"),
          k["lora_scaling"].cast<float>(),
          k["in_out"].cast<bool>(),
          k["interleaved"].cast<bool>(),
          k["plain"].cast<bool>(),
          k["alpha"].cast<float>(),
          k["limit"].cast<float>()};
}

void bind_experts(py::module_& m, py::class_<CpuKernels>& cpu) {
  py::class_<ExpertsProblem>(m, "ExpertsProblem").def(py::init(&make_experts_problem));
  cpu.def(
      "experts_fwd",
      [](const CpuKernels& kernels, const ExpertsProblem& problem, Address x, Address y,
         Address pre_activation) {
        kernels.experts_fwd(problem, {at<void>(x), at<void>(y), at<void>(pre_activation)});
      },
      py::kw_only(), py::arg("problem"), py::arg("x"), py::arg("y"), py::arg("pre_activation"),
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "experts_bwd",
      [](const CpuKernels& kernels, const ExpertsProblem& problem, Address d_y,
         Address pre_activation, Address x, Address d_x, Address d_topk_weights, Address d_gate_up,
         Address d_gate_up_bias, Address d_down, Address d_down_bias, Address d_gate_up_a,
         Address d_gate_up_b, Address d_down_a, Address d_down_b) {
        kernels.experts_bwd(
            problem, {at<void>(d_y), at<void>(pre_activation), at<void>(x), at<void>(d_x),
                      at<float>(d_topk_weights), at<void>(d_gate_up), at<void>(d_gate_up_bias),
                      at<void>(d_down), at<void>(d_down_bias), at<void>(d_gate_up_a),
                      at<void>(d_gate_up_b), at<void>(d_down_a), at<void>(d_down_b)});
      },
      py::kw_only(), py::arg("problem"), py::arg("d_y"), py::arg("pre_activation"), py::arg("x"),
      py::arg("d_x"), py::arg("d_topk_weights"), py::arg("d_gate_up"), py::arg("d_gate_up_bias"),
      py::arg("d_down"), py::arg("d_down_bias"), py::arg("d_gate_up_a"), py::arg("d_gate_up_b"),
      py::arg("d_down_a"), py::arg("d_down_b"), py::call_guard<py::gil_scoped_release>());
}

RoutingProblem make_routing_problem(int64_t tokens, int64_t hidden, int64_t experts, int64_t topk,
                                    int scoring, bool renormalize) {
  return {tokens, hidden, experts, topk, scoring, renormalize};
}

RoutingOrder make_order(Address hist, Address offs, Address gather, Address scatter) {
  return {at<int32_t>(hist), at<int32_t>(offs), at<int32_t>(gather), at<int32_t>(scatter)};
}

void bind_routing(py::module_& m, py::class_<CpuKernels>& cpu) {
  py::class_<RoutingProblem>(m, "RoutingProblem")
      .def(py::init(&make_routing_problem), py::kw_only(), py::arg("tokens"), py::arg("hidden"),
           py::arg("experts"), py::arg("topk"), py::arg("scoring"), py::arg("renormalize"));
  cpu.def(
      "routing_fwd",
      [](const CpuKernels& kernels, const RoutingProblem& problem, int dtype, Address x,
         Address weight, int64_t x_stride, Address bias, Address correction_bias, Address given_ids,
         Address logits, Address topk_weights, Address topk_ids, Address hist, Address offs,
         Address gather, Address scatter) {
        kernels.routing_fwd(problem,
                            {static_cast<DType>(dtype), at<void>(x), at<void>(weight), x_stride,
                             at<float>(bias), at<float>(correction_bias), at<int32_t>(given_ids),
                             at<float>(logits), at<float>(topk_weights), at<int32_t>(topk_ids),
                             make_order(hist, offs, gather, scatter)});
      },
      py::kw_only(), py::arg("problem"), py::arg("dtype"), py::arg("x"), py::arg("weight"),
      py::arg("x_stride"), py::arg("bias"), py::arg("correction_bias"), py::arg("given_ids"),
      py::arg("logits"), py::arg("topk_weights"), py::arg("topk_ids"), py::arg("hist"),
      py::arg("offs"), py::arg("gather"), py::arg("scatter"),
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "routing_sort",
      [](const CpuKernels& kernels, Address ids, int64_t tokens, int64_t topk, int64_t experts,
         Address hist, Address offs, Address gather, Address scatter) {
        kernels.routing_sort(at<int32_t>(ids), tokens, topk, experts,
                             make_order(hist, offs, gather, scatter));
      },
      py::kw_only(), py::arg("ids"), py::arg("tokens"), py::arg("topk"), py::arg("experts"),
      py::arg("hist"), py::arg("offs"), py::arg("gather"), py::arg("scatter"),
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "routing_bwd",
      [](const CpuKernels& kernels, const RoutingProblem& problem, int dtype, Address x,
         Address weight, int64_t x_stride, Address d_topk_weights, Address d_logits,
         Address topk_weights, Address logits, Address topk_ids, Address d_x, Address d_weight,
         Address d_bias) {
        kernels.routing_bwd(
            problem, {static_cast<DType>(dtype), at<void>(x), at<void>(weight), x_stride,
                      at<float>(d_topk_weights), at<float>(d_logits), at<float>(topk_weights),
                      at<float>(logits), at<int32_t>(topk_ids), at<void>(d_x), at<void>(d_weight),
                      at<float>(d_bias)});
      },
      py::kw_only(), py::arg("problem"), py::arg("dtype"), py::arg("x"), py::arg("weight"),
      py::arg("x_stride"), py::arg("d_topk_weights"), py::arg("d_logits"), py::arg("topk_weights"),
      py::arg("logits"), py::arg("topk_ids"), py::arg("d_x"), py::arg("d_weight"),
      py::arg("d_bias"), py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "routing_logits_bwd",
      [](const CpuKernels& kernels, const RoutingProblem& problem, Address d_topk_weights,
         Address topk_weights, Address logits, Address topk_ids, Address d_logits) {
        RoutingBackward backward{};
        backward.d_topk_weights = at<float>(d_topk_weights);
        backward.topk_weights = at<float>(topk_weights);
        backward.logits = at<float>(logits);
        backward.topk_ids = at<int32_t>(topk_ids);
        kernels.routing_logits_bwd(problem, backward, at<float>(d_logits));
      },
      py::kw_only(), py::arg("problem"), py::arg("d_topk_weights"), py::arg("topk_weights"),
      py::arg("logits"), py::arg("topk_ids"), py::arg("d_logits"),
      py::call_guard<py::gil_scoped_release>());
}

void bind_linear(py::class_<CpuKernels>& cpu) {
  cpu.def(
      "linear",
      [](const CpuKernels& kernels, int dtype, int64_t tokens, int64_t in, int64_t out, Address x,
         Address weight, Address bias, Address y) {
        kernels.linear({static_cast<DType>(dtype), tokens, in, out, at<void>(x), at<void>(weight),
                        at<void>(bias), at<void>(y)});
      },
      py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "linear_int8",
      [](const CpuKernels& kernels, int dtype, int64_t tokens, int64_t in, int64_t out, Address x,
         Address values, Address scales, Address bias, Address y) {
        kernels.linear_int8({static_cast<DType>(dtype),
                             tokens,
                             in,
                             out,
                             at<void>(x),
                             {at<uint8_t>(values), at<void>(scales)},
                             at<void>(bias),
                             at<void>(y)});
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_mxfp4(py::class_<CpuKernels>& cpu) {
  cpu.def(
      "mxfp4_quantize",
      [](const CpuKernels& kernels, int dtype, Address w, int64_t count, Address blocks,
         Address scales) {
        kernels.mxfp4_quantize(static_cast<DType>(dtype), at<void>(w), count, at<uint8_t>(blocks),
                               at<uint8_t>(scales));
      },
      py::kw_only(), py::arg("dtype"), py::arg("w"), py::arg("count"), py::arg("blocks"),
      py::arg("scales"), py::call_guard<py::gil_scoped_release>());
  cpu.def(
      "mxfp4_dequantize",
      [](const CpuKernels& kernels, int dtype, Address blocks, Address scales, int64_t count,
         Address out) {
        kernels.mxfp4_dequantize(static_cast<DType>(dtype), at<uint8_t>(blocks),
                                 at<uint8_t>(scales), count, at<void>(out));
      },
      py::kw_only(), py::arg("dtype"), py::arg("blocks"), py::arg("scales"), py::arg("count"),
      py::arg("out"), py::call_guard<py::gil_scoped_release>());
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
  cpu.def("exp2", [](const CpuKernels& k, Address in, Address out, int64_t n) {
    k.exp2(at<const float>(in), at<float>(out), n);
  });
  bind_patch_embed(m, cpu);
  bind_rotary(cpu);
  bind_attention(m, cpu);
  bind_decode_attention(cpu);
  bind_experts(m, cpu);
  bind_routing(m, cpu);
  bind_linear(cpu);
  bind_mxfp4(cpu);
  bind_direct(m);
  m.def(
      "open_cpu",
      [](const std::string& path) { return open_library<CpuKernels>(path, "medgpt_cpu_kernels"); },
      py::return_value_policy::reference);

  py::class_<CudaKernels> cuda(m, "CudaKernels");
  bind_cuda(cuda);
  m.def(
      "open_cuda",
      [](const std::string& path) {
        return open_library<CudaKernels>(path, "medgpt_cuda_kernels");
      },
      py::return_value_policy::reference);
}

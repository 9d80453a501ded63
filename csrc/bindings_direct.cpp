// A decoding step's calls, some of which last 10 us: plain functions of Python's C interface that
// read the tensors' attributes themselves, make the outputs by torch's C interface and run the
// kernel.
//
// They take what needs no conversion, no gradient and no mode of PyTorch's. To any other call, and
// to one that is wrong, the answer is None: the caller goes the long way, which converts or
// explains.
#include "bindings_direct.h"

#include <dlfcn.h>

#include <cmath>
#include <string>

#include "direct.h"

namespace py = pybind11;

namespace direct {
Torch* torch = nullptr;

namespace {
// (x, weight, bias, topk, scoring, renormalize, correction_bias, topk_ids): as `routing`. Returns
// RoutingData's fields.
PyObject* routing(PyObject* const* a, Py_ssize_t count) {
  static const char* kScorings[] = {"topk_softmax", "softmax_topk", "sigmoid"};
  Tensor x, weight;
  Floats bias;
  int64_t topk = 0;
  int scoring = -1;
  if (torch == nullptr || count != 8 || a[6] != Py_None || a[7] != Py_None || !is_plain() ||
      !read_tensor(a[0], 2, &x) || !read_tensor(a[1], 2, &weight) || !PyUnicode_Check(a[4]) ||
      !PyBool_Check(a[5]) || !read_size(a[3], 1, &topk))
    return no_answer();
  for (int i = 0; i < 3; i++)
    if (PyUnicode_CompareWithASCIIString(a[4], kScorings[i]) == 0) scoring = i;
  int64_t tokens = x.size[0], hidden = x.size[1], experts = weight.size[0];
  bool renormalize = a[5] == Py_True;
  if (scoring < 0 || (scoring == 0 && !renormalize) || topk > experts || x.dtype == kInt32 ||
      x.dtype == static_cast<int>(DType::kU8) || !x.rows() ||
      !weight.is(x.dtype, experts, hidden) || !weight.contiguous() ||
      tokens * topk >= int64_t{1} << 31 || !bias.read(a[2], experts, x.dtype))
    return no_answer();
  Outputs outputs;
  auto* weights = outputs.add<float>(0, tokens, topk);
  auto* ids = outputs.add<int32_t>(kInt32, tokens, topk);
  RoutingOrder order{
      outputs.add<int32_t>(kInt32, experts), outputs.add<int32_t>(kInt32, experts + 1),
      outputs.add<int32_t>(kInt32, tokens * topk), outputs.add<int32_t>(kInt32, tokens * topk)};
  auto* logits = outputs.add<float>(0, tokens, experts);
  {
    py::gil_scoped_release unlocked;
    torch->kernels->routing_fwd({tokens, hidden, experts, topk, scoring, renormalize},
                                {static_cast<DType>(x.dtype), x.data, weight.data, x.stride[0],
                                 bias.data, nullptr, nullptr, logits, weights, ids, order});
  }
  return outputs.take();
}

// (q, k_cache, v_cache, cache_seqlens, block_table, k, v, k_scale, v_scale, window_size, sinks,
// softmax_scale, rotary): as `decode_attention`. Returns [out].
PyObject* decode_attention(PyObject* const* a, Py_ssize_t count) {
  Tensor q, k_cache, v_cache, lengths, table, k, v, cos, sin;
  Floats sinks;
  int64_t left = 0;
  if (torch == nullptr || count != 13 || a[7] != Py_None || a[8] != Py_None || !is_plain() ||
      !read_tensor(a[0], 4, &q) || !read_tensor(a[1], 4, &k_cache) ||
      !read_tensor(a[2], 4, &v_cache) || !read_tensor(a[3], 1, &lengths) ||
      !read_if_there(a[4], 2, &table) || !read_if_there(a[5], 4, &k) ||
      !read_if_there(a[6], 4, &v) || !read_window(a[9], &left))
    return no_answer();
  int64_t batches = q.size[0], tokens = q.size[1], heads = q.size[2], head_dim = q.size[3];
  int64_t page = k_cache.size[1], kv_heads = k_cache.size[2], capacity = page;
  if (q.dtype > static_cast<int>(DType::kF16) || head_dim > 256 || heads % kv_heads != 0 ||
      !q.rows() || !k_cache.is(q.dtype, k_cache.size[0], page, kv_heads, head_dim) ||
      !v_cache.is(q.dtype, k_cache.size[0], page, kv_heads, head_dim) || !k_cache.rows() ||
      !v_cache.rows() || !lengths.is(kInt32, batches) || !lengths.contiguous() ||
      !sinks.read(a[10], heads, q.dtype))
    return no_answer();
  if (table.data != nullptr) {
    if (!table.is(kInt32, batches, table.size[1]) || !table.rows()) return no_answer();
    capacity = table.size[1] * page;
  } else if (k_cache.size[0] != batches) {
    return no_answer();
  }
  bool append = k.data != nullptr;
  if (append != (v.data != nullptr)) return no_answer();
  if (append && (!k.is(q.dtype, batches, tokens, kv_heads, head_dim) || !k.rows() ||
                 !v.is(q.dtype, batches, tokens, kv_heads, head_dim) || !v.rows()))
    return no_answer();
  int64_t longest = capacity;
  if (a[12] != Py_None) {
    if (!append || !read_tables(a[12], head_dim, &cos, &sin)) return no_answer();
    longest = std::min(longest, cos.size[0]);
  }
  double scale = a[11] == Py_None ? std::pow(head_dim, -0.5) : PyFloat_AsDouble(a[11]);
  if (PyErr_Occurred() != nullptr || !lengths_fit(lengths, longest - (append ? tokens : 0)))
    return no_answer();
  Outputs outputs;
  void* out = outputs.add<void>(q.dtype, batches, tokens, heads, head_dim);
  auto at = [](const Tensor& t) { return static_cast<const float*>(t.data); };
  {
    py::gil_scoped_release unlocked;
    torch->kernels->decode_attention(
        {batches,
         tokens,
         heads,
         kv_heads,
         head_dim,
         capacity,
         static_cast<const int32_t*>(lengths.data),
         static_cast<const int32_t*>(table.data),
         table.stride[0],
         k_cache.size[0],
         page,
         at(cos),
         at(sin),
         cos.size[1],
         cos.size[0],
         nullptr,
         nullptr,
         sinks.data,
         left,
         static_cast<float>(scale),
         append},
        static_cast<DType>(q.dtype), false,
        {q.data, k.data, v.data, k_cache.data, v_cache.data, q.strides(), k.strides(), v.strides(),
         k_cache.strides(), v_cache.strides(), out});
  }
  return outputs.take();
}

// (x [B, S, K], weight [N, K], bias [N] or None), fp32 or bf16, at most kFewTokens rows:
// F.linear's [y].
PyObject* linear(PyObject* const* a, Py_ssize_t count) {
  Tensor x, weight, bias;
  if (torch == nullptr || count != 3 || !is_plain()) return no_answer();
  if (!read_tensor(a[0], 3, &x) || !read_tensor(a[1], 2, &weight) || !read_if_there(a[2], 1, &bias))
    return no_answer();
  int64_t tokens = x.size[0] * x.size[1], in = x.size[2], out = weight.size[0];
  auto dtype = static_cast<DType>(x.dtype);
  if (dtype != DType::kF32 && dtype != DType::kBF16) return no_answer();
  if (tokens > kFewTokens || !x.contiguous() || !weight.is(x.dtype, out, in) ||
      !weight.contiguous())
    return no_answer();
  if (bias.data != nullptr && (!bias.is(x.dtype, out) || !bias.contiguous())) return no_answer();
  Outputs outputs;
  void* y = outputs.add<void>(x.dtype, x.size[0], x.size[1], out);
  {
    py::gil_scoped_release unlocked;
    torch->kernels->linear({dtype, tokens, in, out, x.data, weight.data, bias.data, y});
  }
  return outputs.take();
}

// (x [B, S, K], values, scales, bias [N] or None, N) of an Int8Linear, at most kFewTokens rows:
// [y].
PyObject* linear_int8(PyObject* const* a, Py_ssize_t count) {
  Tensor x;
  if (torch == nullptr || count != 5 || !is_plain() || !read_tensor(a[0], 3, &x))
    return no_answer();
  int64_t tokens = x.size[0] * x.size[1];
  Projection p;
  int64_t out = 0;
  if (tokens > kFewTokens || !x.contiguous() || x.dtype > static_cast<int>(DType::kF16) ||
      !read_projection(a + 1, x.dtype, x.size[2], &out, &p) || p.scales == nullptr)
    return no_answer();
  Outputs outputs;
  void* y = outputs.add<void>(x.dtype, x.size[0], x.size[1], out);
  {
    py::gil_scoped_release unlocked;
    torch->kernels->linear_int8({static_cast<DType>(x.dtype),
                                 tokens,
                                 x.size[2],
                                 out,
                                 x.data,
                                 {static_cast<const uint8_t*>(p.weight), p.scales},
                                 p.bias,
                                 y});
  }
  return outputs.take();
}

template <typename F>
void find(void* library, const char* name, F* out) {
  *out = reinterpret_cast<F>(dlsym(library, name));
  if (*out == nullptr) throw std::runtime_error(std::string("torch has no ") + name);
}

// Learns what a plain call looks like. Raises RuntimeError where this torch lacks a function.
void open_direct(const CpuKernels& kernels, const std::string& path, const py::dict& given) {
  auto* t = new Torch{};
  auto held = [&](const char* name) { return py::object(given[name]).release().ptr(); };
  auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) throw std::runtime_error(path + " is not loaded");
  find(library, "aoti_torch_empty_strided", &t->empty);
  find(library, "aoti_torch_get_data_ptr", &t->address);
  find(library, "aoti_torch_delete_tensor_object", &t->release);
  const char* codes[kDtypes] = {"float32", "bfloat16", "float16", "uint8", "int32"};
  int32_t (*code)();
  for (int i = 0; i < kDtypes; i++) {
    find(library, (std::string("aoti_torch_dtype_") + codes[i]).c_str(), &code);
    t->codes[i] = code();
    t->dtypes[i] = held(codes[i]);
  }
  find(library, "aoti_torch_device_type_cpu", &code);
  t->cpu = code();
  t->kernels = &kernels;
  for (py::handle mode : given["modes"]) t->modes.push_back(mode.inc_ref().ptr());
  t->tensor = held("Tensor"), t->parameter = held("Parameter"), t->autocast = held("autocast");
  t->forward_ad = held("forward_ad"), t->chosen = held("chosen"), t->take = held("take");
  t->cpu_name = name("cpu"), t->level = name("_current_level"), t->dtype = name("dtype");
  t->shape = name("shape"), t->stride = name("stride"), t->data_ptr = name("data_ptr");
  t->is_cpu = name("is_cpu"), t->is_neg = name("is_neg");
  t->requires_grad = name("requires_grad");
  torch = t;
}

PyMethodDef functions[] = {
    {"routing_direct", fast<routing>(), METH_FASTCALL, "RoutingData's fields, or None"},
    {"decode_attention_direct", fast<decode_attention>(), METH_FASTCALL, "[out], or None"},
    {"linear_direct", fast<linear>(), METH_FASTCALL, "[y], or None"},
    {"linear_int8_direct", fast<linear_int8>(), METH_FASTCALL, "[y], or None"},
    {"decoder_layer_direct", fast<decoder_layer>(), METH_FASTCALL, "[y], or None"},
    {nullptr, nullptr, 0, nullptr}};
}  // namespace
}  // namespace direct

void bind_direct(py::module_& m) {
  m.def("open_direct", &direct::open_direct);
  if (PyModule_AddFunctions(m.ptr(), direct::functions) != 0) throw py::error_already_set();
}

// The direct call of a whole layer: what its modules hold, read in one go.
#include <cmath>

#include "direct.h"

namespace py = pybind11;

namespace direct {
namespace {
// Where a call's arguments are.
enum Argument : int {
  kX,
  kInputNorm,
  kPostNorm,
  kEpsilon,
  kQ,
  kK,
  kV,
  kO,
  kKPages,
  kVPages,
  kLengths,
  kTable,
  kCos,
  kSin,
  kWindow,
  kSinks,
  kScale,
  kRouter,
  kRouterBias,
  kTopk,
  kGateUp,
  kDown,
  kAlpha,
  kLimit,
  kCount
};

bool read_four(PyObject* tuple, int dtype, int64_t in, int64_t* out, Projection* p) {
  if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 4) return false;
  PyObject* parts[4];
  for (int i = 0; i < 4; i++) parts[i] = PyTuple_GET_ITEM(tuple, i);
  return read_projection(parts, dtype, in, out, p);
}

bool read_float(PyObject* object, float* out) {
  *out = static_cast<float>(PyFloat_AsDouble(object));
  return PyErr_Occurred() == nullptr;
}

// MXFP4 blocks [E, N, K / 32, 16], scales [E, N, K / 32] and bias [E, N].
struct Packed {
  Tensor blocks, scales, bias;

  bool read(PyObject* tuple, int dtype, int64_t in) {
    if (!PyTuple_CheckExact(tuple) || PyTuple_GET_SIZE(tuple) != 3 ||
        !read_tensor(PyTuple_GET_ITEM(tuple, 0), 4, &blocks) ||
        !read_tensor(PyTuple_GET_ITEM(tuple, 1), 3, &scales) ||
        !read_tensor(PyTuple_GET_ITEM(tuple, 2), 2, &bias))
      return false;
    constexpr int kBytes = static_cast<int>(DType::kU8);
    int64_t experts = blocks.size[0], out = blocks.size[1];
    return blocks.is(kBytes, experts, out, in / 32, 16) && in % 32 == 0 && blocks.contiguous() &&
           scales.is(kBytes, experts, out, in / 32) && scales.contiguous() &&
           bias.is(dtype, experts, out) && bias.contiguous();
  }
};

// The cache, its tables and what the new tokens see of it.
bool read_attention(PyObject* const* a, const Tensor& x, DecoderLayer* p) {
  Tensor k, v, lengths, table, cos, sin;
  DecodeProblem& d = p->attention;
  if (!read_tensor(a[kKPages], 4, &k) || !read_tensor(a[kVPages], 4, &v) ||
      !read_tensor(a[kLengths], 1, &lengths) || !read_tensor(a[kTable], 2, &table) ||
      !read_tensor(a[kCos], 2, &cos) || !read_tensor(a[kSin], 2, &sin) ||
      !read_size(a[kWindow], -1, &d.window_left) || !read_float(a[kScale], &d.scale))
    return false;
  d.batches = x.size[0], d.tokens = x.size[1], d.pages = k.size[0], d.page = k.size[1];
  d.kv_heads = k.size[2], d.head_dim = k.size[3], d.capacity = table.size[1] * d.page;
  if (!k.is(x.dtype, d.pages, d.page, d.kv_heads, d.head_dim) || !k.rows() ||
      !v.is(x.dtype, d.pages, d.page, d.kv_heads, d.head_dim) || !v.rows() || d.head_dim > 256 ||
      !lengths.is(kInt32, d.batches) || !lengths.contiguous() ||
      !table.is(kInt32, d.batches, table.size[1]) || !table.rows() || d.window_left >= INT32_MAX ||
      !cos.is(0, cos.size[0], cos.size[1]) || !sin.is(0, cos.size[0], cos.size[1]) ||
      !cos.contiguous() || !sin.contiguous() || 2 * cos.size[1] > d.head_dim)
    return false;
  d.seqlens = static_cast<const int32_t*>(lengths.data);
  d.block_table = static_cast<const int32_t*>(table.data), d.table_stride = table.stride[0];
  d.cos = static_cast<const float*>(cos.data), d.sin = static_cast<const float*>(sin.data);
  d.half = cos.size[1], d.table_length = cos.size[0], d.append = true;
  p->k_cache = k.data, p->v_cache = v.data;
  p->k_cache_strides = k.strides(), p->v_cache_strides = v.strides();
  return lengths_fit(lengths, std::min(d.capacity, d.table_length) - d.tokens);
}

bool read_projections(PyObject* const* a, const Tensor& x, Floats* sinks, DecoderLayer* p) {
  DecodeProblem& d = p->attention;
  int64_t hidden = x.size[2], wide = 0, narrow = 0, out = 0;
  if (!read_four(a[kQ], x.dtype, hidden, &wide, &p->q) ||
      !read_four(a[kK], x.dtype, hidden, &narrow, &p->k) || narrow != d.kv_heads * d.head_dim ||
      !read_four(a[kV], x.dtype, hidden, &out, &p->v) || out != narrow || wide % narrow != 0 ||
      !read_four(a[kO], x.dtype, wide, &out, &p->o) || out != hidden)
    return false;
  d.heads = wide / d.head_dim;
  if (!sinks->read(a[kSinks], d.heads, x.dtype)) return false;
  d.sinks = sinks->data;
  return true;
}

bool read_experts(PyObject* const* a, const Tensor& x, Floats* router_bias, DecoderLayer* p) {
  ExpertsProblem& e = p->experts;
  Tensor router;
  Packed gate_up, down;
  e.hidden = x.size[2], e.tokens = x.size[0] * x.size[1], e.dtype = static_cast<DType>(x.dtype);
  if (!read_tensor(a[kRouter], 2, &router) || !read_size(a[kTopk], 1, &e.topk) ||
      !gate_up.read(a[kGateUp], x.dtype, e.hidden) || !read_float(a[kAlpha], &e.alpha) ||
      !read_float(a[kLimit], &e.limit))
    return false;
  e.experts = router.size[0], e.intermediate = gate_up.bias.size[1] / 2;
  if (!router.is(x.dtype, e.experts, e.hidden) || !router.contiguous() || e.topk > e.experts ||
      gate_up.bias.size[0] != e.experts || gate_up.bias.size[1] % 2 != 0 ||
      !down.read(a[kDown], x.dtype, e.intermediate) || down.bias.size[0] != e.experts ||
      down.bias.size[1] != e.hidden || !router_bias->read(a[kRouterBias], e.experts, x.dtype))
    return false;
  p->router_weight = router.data, p->router_bias = router_bias->data;
  e.gate_up = gate_up.blocks.data, e.down = down.blocks.data;
  e.gate_up_scales = static_cast<const uint8_t*>(gate_up.scales.data);
  e.down_scales = static_cast<const uint8_t*>(down.scales.data);
  e.gate_up_bias = gate_up.bias.data, e.down_bias = down.bias.data;
  e.interleaved = true, e.lora_scaling = 1;
  return true;
}
}  // namespace

// (x [B, S, H], two norms' weights, epsilon, projections (weight, scales, bias, outputs), pages,
// lengths, table, cos, sin, window_left, sinks, softmax_scale, router, its bias, topk, experts
// (blocks, scales, bias), alpha, limit), as `Argument` counts them: [y].
PyObject* decoder_layer(PyObject* const* a, Py_ssize_t count) {
  Tensor x, input_norm, post_norm;
  Floats sinks, router_bias;
  DecoderLayer p{};
  if (torch == nullptr || count != kCount || !is_plain() || !read_tensor(a[kX], 3, &x) ||
      !read_tensor(a[kInputNorm], 1, &input_norm) || !read_tensor(a[kPostNorm], 1, &post_norm) ||
      !read_float(a[kEpsilon], &p.epsilon))
    return no_answer();
  if (x.dtype > static_cast<int>(DType::kBF16) || !x.contiguous() ||
      x.size[0] * x.size[1] > kFewTokens || !input_norm.is(x.dtype, x.size[2]) ||
      !post_norm.is(x.dtype, x.size[2]) || !input_norm.contiguous() || !post_norm.contiguous() ||
      !read_attention(a, x, &p) || !read_projections(a, x, &sinks, &p) ||
      !read_experts(a, x, &router_bias, &p))
    return no_answer();
  p.x = x.data, p.input_norm = input_norm.data, p.post_norm = post_norm.data;
  Outputs outputs;
  p.y = outputs.add<void>(x.dtype, x.size[0], x.size[1], x.size[2]);
  {
    py::gil_scoped_release unlocked;
    torch->kernels->decoder_layer(p);
  }
  return outputs.take();
}
}  // namespace direct

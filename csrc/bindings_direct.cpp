// A decoding step's calls, some of which last 10 us: plain functions of Python's C interface that
// read the tensors' attributes themselves, make the outputs by torch's C interface and run the
// kernel.
//
// They take what needs no conversion, no gradient and no mode of PyTorch's. To any other call, and
// to one that is wrong, the answer is None: the caller goes the long way, which converts or
// explains.
#include "bindings_direct.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {
constexpr int kInt32 = 4;  // beside DType's codes; both index Torch's tables
constexpr int kDtypes = 5;
constexpr int64_t kLinearTokens = 16;  // beyond them torch's product is as fast

// Python objects and C functions of torch, held for the life of the process.
struct Torch {
  PyObject *tensor, *parameter, *dtypes[kDtypes];
  std::vector<PyObject*> modes;  // functions that return something true while a mode is on
  PyObject *autocast, *cpu_name, *forward_ad, *chosen, *take;
  PyObject *dtype, *shape, *stride, *data_ptr, *is_cpu, *is_neg, *requires_grad, *level;  // names
  const CpuKernels* kernels;
  int32_t (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, void**);
  int32_t (*address)(void*, void**);
  int32_t (*release)(void*);
  int32_t cpu, codes[kDtypes];
};
Torch* torch = nullptr;

// A reference that is given back.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {}
  ~Ref() { Py_XDECREF(object_); }
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  PyObject* get() const { return object_; }
  bool is(PyObject* other) const { return object_ == other; }

 private:
  PyObject* object_;
};

bool environment_is(const char* name, const char* wanted) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == 0 || std::strcmp(value, wanted) == 0;
}

// No gradients, no tracing, no autocast, no modes or transforms, and this library is the one meant.
bool is_plain() {
  for (PyObject* mode : torch->modes) {
    Ref on(PyObject_CallNoArgs(mode));
    if (on.get() == nullptr || PyObject_IsTrue(on.get()) != 0) return false;
  }
  Ref cast(PyObject_CallOneArg(torch->autocast, torch->cpu_name));
  Ref level(PyObject_GetAttr(torch->forward_ad, torch->level));
  if (!cast.is(Py_False) || level.get() == nullptr || PyLong_AsLong(level.get()) >= 0) return false;
  PyObject* found = nullptr;
  if (PyContextVar_Get(torch->chosen, nullptr, &found) != 0) return false;
  Ref chosen(found);
  bool here = chosen.get() == nullptr || chosen.is(Py_None)
                  ? environment_is("MEDGPT_KERNELS_BACKEND", "cpu")
                  : PyUnicode_CompareWithASCIIString(chosen.get(), "cpu") == 0;
  return here && environment_is("MEDGPT_KERNELS_CPU_ISA", torch->kernels->isa);
}

struct Tensor {
  void* data = nullptr;  // null: absent
  int dtype = -1, dims = 0;
  int64_t size[4] = {}, stride[4] = {};

  bool rows() const { return stride[dims - 1] == 1 || size[dims - 1] == 1; }
  bool contiguous() const {
    int64_t wanted = 1;
    for (int i = dims - 1; i >= 0; wanted *= size[i--])
      if (size[i] != 1 && stride[i] != wanted) return false;
    return true;
  }
  template <typename... Sizes>
  bool is(int code, Sizes... sizes) const {
    int64_t wanted[] = {sizes...};
    return dtype == code && dims == sizeof...(sizes) && std::equal(wanted, wanted + dims, size);
  }
  Strides strides() const { return {stride[0], stride[1], stride[2]}; }
};

bool read_sizes(const Ref& tuple, int64_t* out, int dims) {
  if (tuple.get() == nullptr || !PyTuple_Check(tuple.get()) ||
      PyTuple_GET_SIZE(tuple.get()) != dims)
    return false;
  for (int i = 0; i < dims; i++) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.get(), i));
  return true;
}

// A plain tensor in memory with this many dimensions, none of them 0.
bool read_tensor(PyObject* object, int dims, Tensor* t) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch->tensor && type != torch->parameter) return false;
  Ref dtype(PyObject_GetAttr(object, torch->dtype)),
      is_cpu(PyObject_GetAttr(object, torch->is_cpu));
  Ref is_neg(PyObject_CallMethodNoArgs(object, torch->is_neg));
  if (!is_cpu.is(Py_True) || !is_neg.is(Py_False)) return false;
  for (int i = 0; i < kDtypes; i++)
    if (dtype.is(torch->dtypes[i])) t->dtype = i;
  t->dims = dims;
  if (t->dtype < 0 || !read_sizes(Ref(PyObject_GetAttr(object, torch->shape)), t->size, dims) ||
      !read_sizes(Ref(PyObject_CallMethodNoArgs(object, torch->stride)), t->stride, dims))
    return false;
  Ref data(PyObject_CallMethodNoArgs(object, torch->data_ptr));
  if (data.get() != nullptr) t->data = PyLong_AsVoidPtr(data.get());
  return t->data != nullptr;
}
bool read_if_there(PyObject* object, int dims, Tensor* t) {
  return object == Py_None || read_tensor(object, dims, t);
}

// A vector of n floats, there or widened into `copy`; null for an absent one.
struct Floats {
  const float* data = nullptr;
  std::vector<float> copy;

  bool read(PyObject* object, int64_t n, int narrow) {
    Tensor t;
    if (object == Py_None) return true;
    if (!read_tensor(object, 1, &t) || t.size[0] != n || !t.contiguous()) return false;
    if (t.dtype == 0) {
      data = static_cast<const float*>(t.data);
      return true;
    }
    if (t.dtype != narrow) return false;
    copy.resize(n);
    torch->kernels->widen(t.data, copy.data(), n, static_cast<DType>(t.dtype));
    data = copy.data();
    return true;
  }
};

bool read_size(PyObject* object, int64_t least, int64_t* out) {
  if (!PyLong_CheckExact(object)) return false;
  *out = PyLong_AsLongLong(object);
  return *out >= least && PyErr_Occurred() == nullptr;
}

// Fresh contiguous tensors, which `take` hands to Python.
class Outputs {
 public:
  ~Outputs() {
    for (int i = 0; i < count_; i++) torch->release(handles_[i]);
  }
  template <typename T, typename... Sizes>
  T* add(int code, Sizes... sizes) {
    int64_t size[] = {sizes...}, stride[sizeof...(sizes)], step = 1;
    for (int i = sizeof...(sizes) - 1; i >= 0; step *= size[i--]) stride[i] = step;
    void* data = nullptr;
    if (torch->empty(sizeof...(sizes), size, stride, torch->codes[code], torch->cpu, 0,
                     &handles_[count_]) != 0)
      throw std::bad_alloc();
    if (torch->address(handles_[count_++], &data) != 0) throw std::bad_alloc();
    return static_cast<T*>(data);
  }
  // A list of them.
  PyObject* take() {
    Ref capsules(PyList_New(count_));
    if (capsules.get() == nullptr) return nullptr;
    for (int i = 0; i < count_; i++) {
      PyObject* capsule = PyCapsule_New(handles_[i], nullptr, nullptr);
      if (capsule == nullptr) return nullptr;
      PyList_SET_ITEM(capsules.get(), i, capsule);
    }
    count_ = 0;
    return PyObject_CallOneArg(torch->take, capsules.get());
  }

 private:
  void* handles_[8];
  int count_ = 0;
};

PyObject* no_answer() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

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

// Keys that each sequence has, or may have; false where one has too many.
bool lengths_fit(const Tensor& lengths, int64_t most) {
  auto* length = static_cast<const int32_t*>(lengths.data);
  for (int64_t b = 0; b < lengths.size[0]; b++)
    if (length[b] < -1 || length[b] > most) return false;
  return true;
}

bool read_window(PyObject* window, int64_t* left) {
  int64_t right = 0;
  return PyTuple_CheckExact(window) && PyTuple_GET_SIZE(window) == 2 &&
         read_size(PyTuple_GET_ITEM(window, 0), -1, left) &&
         read_size(PyTuple_GET_ITEM(window, 1), -1, &right) && right <= 0 && *left < INT32_MAX;
}

bool read_tables(PyObject* rotary, int64_t head_dim, Tensor* cos, Tensor* sin) {
  if (!PyTuple_Check(rotary) || PyTuple_GET_SIZE(rotary) != 2) return false;
  for (int i = 0; i < 2; i++) {
    PyObject* table = PyTuple_GET_ITEM(rotary, i);
    Tensor* t = i == 0 ? cos : sin;
    if (!read_tensor(table, 2, t) || t->dtype != 0 || !t->contiguous()) return false;
    if (!Ref(PyObject_GetAttr(table, torch->requires_grad)).is(Py_False)) return false;
  }
  return sin->is(0, cos->size[0], cos->size[1]) && 2 * cos->size[1] <= head_dim;
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

// (x [B, S, K], weight [N, K], bias [N] or None), fp32 or bf16, at most kLinearTokens rows:
// F.linear's [y].
PyObject* linear(PyObject* const* a, Py_ssize_t count) {
  Tensor x, weight, bias;
  if (torch == nullptr || count != 3 || !is_plain()) return no_answer();
  if (!read_tensor(a[0], 3, &x) || !read_tensor(a[1], 2, &weight) || !read_if_there(a[2], 1, &bias))
    return no_answer();
  int64_t tokens = x.size[0] * x.size[1], in = x.size[2], out = weight.size[0];
  auto dtype = static_cast<DType>(x.dtype);
  if (dtype != DType::kF32 && dtype != DType::kBF16) return no_answer();
  if (tokens > kLinearTokens || !x.contiguous() || !weight.is(x.dtype, out, in) ||
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

// What the kernels throw, as Python's errors.
template <PyObject* (*F)(PyObject* const*, Py_ssize_t)>
PyObject* guarded(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    return F(arguments, count);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}
template <PyObject* (*F)(PyObject* const*, Py_ssize_t)>
PyCFunction fast() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(guarded<F>));
}

PyMethodDef functions[] = {
    {"routing_direct", fast<routing>(), METH_FASTCALL, "RoutingData's fields, or None"},
    {"decode_attention_direct", fast<decode_attention>(), METH_FASTCALL, "[out], or None"},
    {"linear_direct", fast<linear>(), METH_FASTCALL, "[y], or None"},
    {nullptr, nullptr, 0, nullptr}};
}  // namespace

void bind_direct(py::module_& m) {
  m.def("open_direct", &open_direct);
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}

// How the direct calls read Python's objects: tensors by their attributes, through Python's C
// interface, and outputs made by torch's.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu/kernels.h"

namespace direct {
constexpr int kInt32 = 4;  // beside DType's codes; it indexes Torch's tables
constexpr int kDtypes = 5;
constexpr int64_t kFewTokens = 16;  // beyond them torch's product is as fast

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
extern Torch* torch;

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

inline bool environment_is(const char* name, const char* wanted) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == 0 || std::strcmp(value, wanted) == 0;
}

// No gradients, no tracing, no autocast, no modes or transforms, and this library is the one meant.
inline bool is_plain() {
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

inline bool read_sizes(const Ref& tuple, int64_t* out, int dims) {
  if (tuple.get() == nullptr || !PyTuple_Check(tuple.get()) ||
      PyTuple_GET_SIZE(tuple.get()) != dims)
    return false;
  for (int i = 0; i < dims; i++) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.get(), i));
  return true;
}

// A plain tensor in memory with this many dimensions, none of them 0.
inline bool read_tensor(PyObject* object, int dims, Tensor* t) {
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
inline bool read_if_there(PyObject* object, int dims, Tensor* t) {
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

inline bool read_size(PyObject* object, int64_t least, int64_t* out) {
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

inline PyObject* no_answer() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

// Keys that each sequence has, or may have; false where one has too many.
inline bool lengths_fit(const Tensor& lengths, int64_t most) {
  auto* length = static_cast<const int32_t*>(lengths.data);
  for (int64_t b = 0; b < lengths.size[0]; b++)
    if (length[b] < -1 || length[b] > most) return false;
  return true;
}

inline bool read_window(PyObject* window, int64_t* left) {
  int64_t right = 0;
  return PyTuple_CheckExact(window) && PyTuple_GET_SIZE(window) == 2 &&
         read_size(PyTuple_GET_ITEM(window, 0), -1, left) &&
         read_size(PyTuple_GET_ITEM(window, 1), -1, &right) && right <= 0 && *left < INT32_MAX;
}

inline bool read_tables(PyObject* rotary, int64_t head_dim, Tensor* cos, Tensor* sin) {
  if (!PyTuple_Check(rotary) || PyTuple_GET_SIZE(rotary) != 2) return false;
  for (int i = 0; i < 2; i++) {
    PyObject* table = PyTuple_GET_ITEM(rotary, i);
    Tensor* t = i == 0 ? cos : sin;
    if (!read_tensor(table, 2, t) || t->dtype != 0 || !t->contiguous()) return false;
    if (!Ref(PyObject_GetAttr(table, torch->requires_grad)).is(Py_False)) return false;
  }
  return sin->is(0, cos->size[0], cos->size[1]) && 2 * cos->size[1] <= head_dim;
}

// (weight, scales, bias [N] or None, N): scales None with a dense weight [N, K] in x's dtype, or an
// Int8Linear's values and scales.
inline bool read_projection(PyObject* const* a, int dtype, int64_t in, int64_t* out,
                            Projection* p) {
  constexpr int64_t kBlock = 32, kOutputs = 16, kFour = 4;
  Tensor weight, scales, bias;
  if (!read_if_there(a[1], 3, &scales) || !read_if_there(a[2], 1, &bias) ||
      !read_size(a[3], 1, out))
    return false;
  bool packed = scales.data != nullptr;
  if (!read_tensor(a[0], packed ? 4 : 2, &weight) || !weight.contiguous()) return false;
  int64_t units = (*out + kOutputs - 1) / kOutputs;
  if (packed ? !weight.is(static_cast<int>(DType::kU8), units, in / kFour, kOutputs, kFour)
             : !weight.is(dtype, *out, in))
    return false;
  if (packed && (in % kBlock != 0 || !scales.contiguous() ||
                 !scales.is(static_cast<int>(DType::kF16), units, in / kBlock, kOutputs)))
    return false;
  if (bias.data != nullptr && (!bias.is(dtype, *out) || !bias.contiguous())) return false;
  *p = {weight.data, scales.data, bias.data};
  return true;
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

PyObject* decoder_layer(PyObject* const* arguments, Py_ssize_t count);
}  // namespace direct

// The CUDA library's launchers in Python; a reason why nothing was launched becomes an exception.
#include "bindings_cuda.h"

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

namespace py = pybind11;

namespace {
// Everything of a call by name, so that one dict in Python describes it.
class Fields {
 public:
  explicit Fields(const py::kwargs& values) : values_(values) {}
  int64_t size(const char* name) const { return values_[name].cast<int64_t>(); }
  int whole(const char* name) const { return values_[name].cast<int>(); }
  bool flag(const char* name) const { return values_[name].cast<bool>(); }
  float real(const char* name) const { return values_[name].cast<float>(); }
  DType dtype(const char* name = "dtype") const { return static_cast<DType>(whole(name)); }
  Place place() const {
    return {whole("device"), reinterpret_cast<void*>(values_["stream"].cast<uintptr_t>())};
  }
  template <typename T>
  T* at(const char* name) const {
    return reinterpret_cast<T*>(values_[name].cast<uintptr_t>());
  }

 private:
  const py::kwargs& values_;
};

template <typename Call>
void start(const char* op, const char* (*launcher)(const Place&, const Call&), const Place& place,
           const Call& call) {
  std::string reason;
  {
    py::gil_scoped_release release;
    reason = launcher(place, call);
  }
  if (!reason.empty()) throw std::runtime_error(std::string(op) + ": " + reason);
}

cuda::RotaryTensor rotary_tensor(const Fields& f, const char* name, const py::kwargs& k) {
  std::string n(name);
  auto strides = k[(n + "_strides").c_str()].cast<Strides>();
  return {f.at<const void>(name),
          f.at<void>((n + "_out").c_str()),
          strides[0],
          strides[1],
          strides[2],
          f.size((n + "_heads").c_str())};
}

void rotary(const CudaKernels& kernels, const py::kwargs& k) {
  Fields f(k);
  cuda::RotaryCall call = {rotary_tensor(f, "q", k),
                           rotary_tensor(f, "k", k),
                           f.dtype(),
                           f.size("batches"),
                           f.size("tokens"),
                           f.size("head_dim"),
                           f.size("half"),
                           f.size("table_length"),
                           f.at<const float>("cos"),
                           f.at<const float>("sin"),
                           f.at<const void>("position_ids"),
                           f.flag("wide_positions"),
                           f.size("position_b"),
                           f.size("position_t"),
                           f.at<const int32_t>("cu_seqlens"),
                           f.size("sequences"),
                           f.real("direction")};
  start("apply_rotary", kernels.rotary, f.place(), call);
}

void routing(const CudaKernels& kernels, const py::kwargs& k) {
  Fields f(k);
  cuda::RoutingCall call = {f.size("tokens"),
                            f.size("hidden"),
                            f.size("experts"),
                            f.size("topk"),
                            f.whole("scoring"),
                            f.flag("renormalize"),
                            f.dtype(),
                            f.at<const void>("x"),
                            f.at<const void>("weight"),
                            f.size("x_stride"),
                            f.at<const float>("bias"),
                            f.at<const float>("correction_bias"),
                            f.at<const int32_t>("given_ids"),
                            f.at<float>("logits"),
                            f.at<float>("topk_weights"),
                            f.at<int32_t>("topk_ids"),
                            f.at<int32_t>("hist"),
                            f.at<int32_t>("offs"),
                            f.at<int32_t>("gather"),
                            f.at<int32_t>("scatter"),
                            f.at<int32_t>("scratch")};
  start("routing", kernels.routing, f.place(), call);
}

void experts(const CudaKernels& kernels, const py::kwargs& k) {
  Fields f(k);
  cuda::ExpertsCall call = {f.size("tokens"),
                            f.size("topk"),
                            f.size("experts"),
                            f.size("hidden"),
                            f.size("intermediate"),
                            f.dtype(),
                            f.at<const void>("x"),
                            f.at<const float>("topk_weights"),
                            f.at<const int32_t>("expert_offs"),
                            f.at<const int32_t>("gather"),
                            f.at<const int32_t>("scatter"),
                            f.at<const void>("gate_up"),
                            f.at<const void>("down"),
                            f.at<const uint8_t>("gate_up_scales"),
                            f.at<const uint8_t>("down_scales"),
                            f.at<const void>("gate_up_bias"),
                            f.at<const void>("down_bias"),
                            f.flag("in_out"),
                            f.flag("interleaved"),
                            f.flag("plain"),
                            f.real("alpha"),
                            f.real("limit"),
                            f.at<void>("rows"),
                            f.at<void>("y")};
  start("experts", kernels.experts, f.place(), call);
}

cuda::DecodeTensor decode_tensor(const Fields& f, const char* name, const py::kwargs& k) {
  return {f.at<void>(name), k[(std::string(name) + "_strides").c_str()].cast<Strides>()};
}

void decode_attention(const CudaKernels& kernels, const py::kwargs& k) {
  Fields f(k);
  cuda::DecodeCall call = {f.dtype(),
                           f.flag("fp8"),
                           f.size("batches"),
                           f.size("tokens"),
                           f.size("heads"),
                           f.size("kv_heads"),
                           f.size("head_dim"),
                           f.size("capacity"),
                           f.size("pages"),
                           f.size("page"),
                           f.at<const int32_t>("seqlens"),
                           f.at<const int32_t>("block_table"),
                           f.size("table_stride"),
                           f.at<const float>("cos"),
                           f.at<const float>("sin"),
                           f.size("half"),
                           f.size("table_length"),
                           f.at<const float>("k_scale"),
                           f.at<const float>("v_scale"),
                           f.at<const float>("sinks"),
                           f.size("window_left"),
                           f.real("scale"),
                           decode_tensor(f, "q", k),
                           decode_tensor(f, "k", k),
                           decode_tensor(f, "v", k),
                           decode_tensor(f, "k_cache", k),
                           decode_tensor(f, "v_cache", k),
                           f.size("splits"),
                           f.at<float>("parts"),
                           f.at<void>("out")};
  start("decode_attention", kernels.decode_attention, f.place(), call);
}
}  // namespace

void bind_cuda(py::class_<CudaKernels>& cuda) {
  cuda.def("probe", [](const CudaKernels& k, int device) { return k.probe(device); });
  cuda.def("rotary", &rotary);
  cuda.def("routing", &routing);
  cuda.def("experts", &experts);
  cuda.def("decode_attention", &decode_attention);
}

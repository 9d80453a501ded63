// What kernels use of a card beyond C++: memory, 16-byte loads, conversions, warp sums, launches.
//
// nvcc compiles the kernels for cards. g++ compiles the same sources against tests/cuda_host, whose
// cuda_runtime.h gives Global, Shared and the warp's functions bodies that check every access.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

#ifdef __CUDACC__
template <typename T>
using Global = T*;  // memory of the card
template <typename T>
using Shared = T*;  // memory of the block
#define SHARED_ARRAY(T, name, count) __shared__ __align__(16) T name[count]
#define DYNAMIC_SHARED(T, name)                \
  extern __shared__ uint4 dynamic_shared_of[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared_of)

template <typename T>
__device__ inline T atomic_add(Global<T> p, T value) {
  return atomicAdd(p, value);
}
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// 16 bytes that one instruction moves.
struct alignas(16) Bits16 {
  uint32_t word[4];
};
struct alignas(8) Bits8 {
  uint32_t word[2];
};

#ifdef __CUDACC__
// Read past the coherent caches: for what no thread of this launch writes.
template <typename T>
__device__ inline T load(Global<const T> p) {
  return *p;
}
template <typename T>
__device__ inline Bits16 load16(Global<const T> p) {
  uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
// As other threads of the block may have written it before the last barrier.
template <typename T>
__device__ inline Bits16 fetch16(Global<T> p) {
  uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
template <typename T>
__device__ inline Bits8 fetch8(Global<T> p) {
  uint2 v = *reinterpret_cast<const uint2*>(p);
  return {{v.x, v.y}};
}
template <typename T>
__device__ inline void store16(Global<T> p, Bits16 v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
__device__ inline float widen(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
__device__ inline uint16_t bf16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ inline uint16_t f16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

template <typename T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 narrow<bf16>(float x) {
  return {bf16_bits(x)};
}
template <>
__device__ inline f16 narrow<f16>(float x) {
  return {f16_bits(x)};
}

template <typename T>
constexpr int kElements = 16 / sizeof(T);  // of a Bits16

template <typename T>
__device__ inline void widen16(const Bits16& packed, float (&out)[kElements<T>]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t word = packed.word[i];
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(word);
    } else {
      out[2 * i] = widen(T{static_cast<uint16_t>(word)});
      out[2 * i + 1] = widen(T{static_cast<uint16_t>(word >> 16)});
    }
  }
}

template <typename T>
__device__ inline Bits16 narrow16(const float (&in)[kElements<T>]) {
  Bits16 packed;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 4) {
      packed.word[i] = __float_as_uint(in[i]);
    } else {
      uint32_t low = narrow<T>(in[2 * i]).bits, high = narrow<T>(in[2 * i + 1]).bits;
      packed.word[i] = low | high << 16;
    }
  }
  return packed;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

template <typename A, typename B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Makes a device current for the life of this object.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
  }
  ~OnDevice() {
    int now;
    if (cudaGetDevice(&now) == cudaSuccess && now != before_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
};

// The one way a kernel starts. Empty when it was launched, else the driver's reason.
template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), const Place& place, dim3 grid, int threads,
                   int shared_bytes, Parameters... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "";
  OnDevice current(place.device);
  cudaError_t error = current.error();
  if (error == cudaSuccess && shared_bytes > 48 << 10)
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(place.stream);
    error = cudaLaunchKernelEx(&config, kernel, arguments...);
  }
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// Zeroes `bytes` in the stream's order.
inline const char* clear(const Place& place, void* p, size_t bytes) {
  OnDevice current(place.device);
  cudaError_t error = current.error();
  if (error == cudaSuccess)
    error = cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(place.stream));
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// From a dtype code of Python to a type; false where it is none of these three.
template <typename F>
const char* with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kBF16:
      return f(bf16{});
    case DType::kF16:
      return f(f16{});
    default:
      return "expected float32, bfloat16 or float16";
  }
}

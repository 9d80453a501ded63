// A test-only stand-in for CUDA's header: kernels compiled by g++ run on the CPU and are checked.
//
// Blocks run in turn, threads are fibres that run from one synchronisation to the next in a seeded
// order. docs/cuda.md says what is caught and what is not.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_host {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void fault(const std::string& text);

// The tensor that holds an address, as the test registered it; throws where none does.
struct Extent {
  const char *begin, *end;
};
Extent extent_of(const void* address);

[[noreturn]] void out_of_bounds(const char* what, const char* at, size_t bytes, Extent);

// One element of memory that a thread may write.
template <typename Memory>
class Ref {
 public:
  using T = typename Memory::Value;
  Ref(Memory memory) : memory_(memory) {}
  Ref(const Ref&) = default;
  operator T() const { return memory_.read(); }
  Ref& operator=(T value) {
    memory_.write(value);
    return *this;
  }
  Ref& operator=(const Ref& other) { return *this = static_cast<T>(other); }
  template <typename V>
  Ref& operator+=(V value) {
    return *this = static_cast<T>(memory_.read() + value);
  }

 private:
  Memory memory_;
};

template <typename Self, typename T>
struct Indexed {
  Self operator+(int64_t n) const { return static_cast<const Self&>(*this).moved(n); }
  auto operator[](int64_t n) const {
    if constexpr (std::is_const_v<T>)
      return (*this + n).read();
    else
      return Ref<Self>(*this + n);
  }
  auto operator*() const { return (*this)[0]; }
};

// Memory of the card: every access lies inside one registered tensor.
template <typename T>
class Global : public Indexed<Global<T>, T> {
 public:
  using Value = std::remove_const_t<T>;
  Global(T* p = nullptr) : p_(p), extent_(p == nullptr ? Extent{} : extent_of(p)) {}
  Global(std::nullptr_t) : Global() {}
  Global moved(int64_t n) const {
    Global other = *this;
    other.p_ += n;
    return other;
  }
  bool operator==(std::nullptr_t) const { return p_ == nullptr; }
  bool operator!=(std::nullptr_t) const { return p_ != nullptr; }
  Value read() const { return *at<Value>("read"); }
  void write(Value value) const { *const_cast<Value*>(at<Value>("write")) = value; }

  template <typename V>
  const V* at(const char* what) const {
    const char* p = reinterpret_cast<const char*>(p_);
    if (p < extent_.begin || p + sizeof(V) > extent_.end)
      out_of_bounds(what, p, sizeof(V), extent_);
    if (reinterpret_cast<uintptr_t>(p) % alignof(V) != 0)
      fault(std::string("misaligned ") + what + " of " + std::to_string(sizeof(V)) + " bytes");
    return reinterpret_cast<const V*>(p);
  }

 private:
  T* p_;
  Extent extent_;
};

struct SharedArray {
  const char* name;
  size_t begin, end;  // bytes in the block's memory
};
SharedArray shared_array(const void* identity, const char* name, size_t bytes);
SharedArray dynamic_shared(const char* name);
enum class Access { kRead, kWrite, kAtomic };
char* shared_access(const SharedArray&, int64_t at, size_t bytes, Access);

// Memory of the block: poisoned when the block starts; an access must lie inside its array, read
// what was written, and not meet another thread's without a barrier between.
template <typename T>
class Shared : public Indexed<Shared<T>, T> {
 public:
  using Value = std::remove_const_t<T>;
  Shared(const SharedArray& array) : array_(array), at_(static_cast<int64_t>(array.begin)) {}
  Shared(const SharedArray& array, int64_t at) : array_(array), at_(at) {}
  operator Shared<const T>() const { return {array_, at_}; }
  Shared moved(int64_t n) const { return {array_, at_ + n * static_cast<int64_t>(sizeof(T))}; }
  template <typename V>
  Shared<V> cast() const {
    return {array_, at_};
  }
  Value read() const { return access<Value>(Access::kRead); }
  void write(Value value) const { access<Value>(Access::kWrite) = value; }
  template <typename V>
  V& access(Access how) const {
    return *reinterpret_cast<V*>(shared_access(array_, at_, sizeof(V), how));
  }

 private:
  SharedArray array_;
  int64_t at_;
};

// Synchronisation
void barrier(const char* site);
void warp_barrier(unsigned mask, const char* site);
// Every lane of mask gives a value; the values of all 32 lanes, and which lanes gave one.
struct Gathered {
  uint64_t value[32];
  unsigned mask;
};
const Gathered& gather(unsigned mask, uint64_t value, const char* site);
int lane();

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from(const Gathered& all, int source) {
  if (source < 0 || source > 31 || !(all.mask >> source & 1))
    fault("shuffle from lane " + std::to_string(source) + ", which takes no part");
  T value;
  std::memcpy(&value, &all.value[source], sizeof(T));
  return value;
}
template <typename T, typename F>
T reduced(const Gathered& all, F&& f) {
  T sum{};
  bool first = true;
  for (int i = 0; i < 32; i++) {
    if (!(all.mask >> i & 1)) continue;
    sum = first ? from<T>(all, i) : f(sum, from<T>(all, i));
    first = false;
  }
  return sum;
}
template <typename T, typename F>
T shuffle(unsigned mask, T value, const char* site, F&& source) {
  const Gathered& all = gather(mask, to_bits(value), site);
  int other = source(lane());
  return other < 0 || other > 31 ? value : from<T>(all, other);
}
inline unsigned ballot(unsigned mask, bool vote, const char* site) {
  const Gathered& all = gather(mask, vote, site);
  unsigned votes = 0;
  for (int i = 0; i < 32; i++)
    if (all.mask >> i & 1 && all.value[i]) votes |= 1u << i;
  return votes;
}
template <typename T>
unsigned match(unsigned mask, T value, const char* site) {
  const Gathered& all = gather(mask, to_bits(value), site);
  unsigned same = 0;
  for (int i = 0; i < 32; i++)
    if (all.mask >> i & 1 && all.value[i] == to_bits(value)) same |= 1u << i;
  return same;
}

// Launches
int launch(dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& thread);
}  // namespace cuda_host

using cuda_host::Global;
using cuda_host::Shared;
using std::max;
using std::min;

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs now

#define CUDA_HOST_TEXT_(x) #x
#define CUDA_HOST_TEXT(x) CUDA_HOST_TEXT_(x)
#define CUDA_HOST_SITE __FILE__ ":" CUDA_HOST_TEXT(__LINE__)

#define SHARED_ARRAY(T, name, count)     \
  static const char name##_identity = 0; \
  ::cuda_host::Shared<T> name(           \
      ::cuda_host::shared_array(&name##_identity, #name, sizeof(T) * (count)))
#define DYNAMIC_SHARED(T, name) ::cuda_host::Shared<T> name(::cuda_host::dynamic_shared(#name))

#define __syncthreads() ::cuda_host::barrier(CUDA_HOST_SITE)
#define __syncwarp(...) ::cuda_host::warp_barrier(0u __VA_OPT__(+) __VA_ARGS__, CUDA_HOST_SITE)
#define __shfl_sync(mask, value, from) \
  ::cuda_host::shuffle(mask, value, CUDA_HOST_SITE, [&](int) { return (from) & 31; })
#define __shfl_xor_sync(mask, value, lanes) \
  ::cuda_host::shuffle(mask, value, CUDA_HOST_SITE, [&](int me) { return me ^ (lanes); })
#define __shfl_up_sync(mask, value, lanes) \
  ::cuda_host::shuffle(mask, value, CUDA_HOST_SITE, [&](int me) { return me - (lanes); })
#define __shfl_down_sync(mask, value, lanes) \
  ::cuda_host::shuffle(mask, value, CUDA_HOST_SITE, [&](int me) { return me + (lanes); })
#define __ballot_sync(mask, vote) ::cuda_host::ballot(mask, vote, CUDA_HOST_SITE)
#define __any_sync(mask, vote) (::cuda_host::ballot(mask, vote, CUDA_HOST_SITE) != 0)
#define __all_sync(mask, vote) (::cuda_host::ballot(mask, !(vote), CUDA_HOST_SITE) == 0)
#define __match_any_sync(mask, value) ::cuda_host::match(mask, value, CUDA_HOST_SITE)
#define CUDA_HOST_REDUCE(mask, value, f)                                      \
  ::cuda_host::reduced<decltype(value)>(                                      \
      ::cuda_host::gather(mask, ::cuda_host::to_bits(value), CUDA_HOST_SITE), \
      [](auto a, auto b) { return f; })
#define __reduce_add_sync(mask, value) CUDA_HOST_REDUCE(mask, value, a + b)
#define __reduce_max_sync(mask, value) CUDA_HOST_REDUCE(mask, value, std::max(a, b))
#define __reduce_min_sync(mask, value) CUDA_HOST_REDUCE(mask, value, std::min(a, b))

inline void __threadfence() {}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }

// Twins of csrc/cuda/intrinsics.h
struct Bits16;
struct Bits8;
struct f16;
template <typename T>
T load(Global<const T> p) {
  return p.read();
}
template <typename T>
T atomic_add(Global<T> p, T value) {
  T before = p.read();
  p.write(before + value);
  return before;
}
template <typename T>
T atomic_add(Shared<T> p, T value) {
  T& at = p.template access<T>(cuda_host::Access::kAtomic);
  T before = at;
  at += value;
  return before;
}
template <typename T, typename B = Bits16>
B load16(Global<const T> p) {
  return *p.template at<B>("read");
}
template <typename T, typename B = Bits16>
B fetch16(Global<T> p) {
  return *p.template at<B>("read");
}
template <typename T, typename B = Bits8>
B fetch8(Global<T> p) {
  return *p.template at<B>("read");
}
template <typename T, typename B = Bits16>
void store16(Global<T> p, B value) {
  *const_cast<B*>(p.template at<B>("write")) = value;
}
template <typename H, typename = std::enable_if_t<std::is_same_v<H, f16>>>
float widen(H x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return half;
}
inline uint16_t f16_bits(float x) {
  _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint16_t bf16_bits(float x) {
  uint32_t bits = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The part of the runtime's interface that launchers use.
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
const char* cudaGetErrorString(cudaError_t);
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : 101; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 99 << 10 ? cudaSuccess : 1;
}
template <typename T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  *p = static_cast<T*>(::operator new(bytes));
  return cudaSuccess;
}
inline void cudaFree(void* p) { ::operator delete(p); }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  cuda_host::extent_of(p);
  std::memset(p, value, bytes);
  return cudaSuccess;
}
template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A... args) {
  return cuda_host::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                           [=] { kernel(args...); });
}

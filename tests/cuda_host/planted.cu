// Kernels with one fault each, and the same without it: what the host runtime must tell apart.
//
// Every kernel reverses or sums blocks of 64 elements.
#include <cstring>
#include <map>
#include <string>

#include "intrinsics.h"

namespace {
constexpr int kThreads = 64;

enum Fault { kNone, kNoBarrier, kWriteOut, kReadOut, kUnaligned };

// out = each block of 64 of in, reversed
template <Fault fault>
__global__ void reverse_kernel(Global<float> out, Global<const float> in, int n) {
  SHARED_ARRAY(float, tile, kThreads);
  int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  if (i < n) tile[t] = load(in + i + (fault == kReadOut ? 1 : 0));
  if (fault != kNoBarrier) __syncthreads();
  int count = min(kThreads, n - static_cast<int>(blockIdx.x) * kThreads);
  if (fault == kWriteOut && i == n) out[i] = 0;
  if (i < n) out[i] = tile[count - 1 - t];
}

// A tile that is written again while others still read it.
template <bool barrier>
__global__ void twice_kernel(Global<float> out, Global<const float> in, int n) {
  SHARED_ARRAY(float, tile, kThreads);
  int t = threadIdx.x;
  float sum = 0;
  for (int base = 0; base + kThreads <= n; base += kThreads) {
    if (barrier) __syncthreads();
    tile[t] = load(in + base + t);
    __syncthreads();
    sum += tile[kThreads - 1 - t];
  }
  out[t] = sum;
}

// Half of the threads wait at a barrier, or at another one, or have returned.
template <int divergence>
__global__ void divergent_kernel(Global<float> out, Global<const float> in, int n) {
  int t = threadIdx.x;
  if (divergence == 1 && t < 16) return;
  if (divergence == 2 && t < 16)
    __syncthreads();
  else
    __syncthreads();
  if (divergence == 3 && t < 16) __syncthreads();
  if (t < n) out[t] = load(in + t);
}

template <bool fault>
__global__ void unwritten_kernel(Global<float> out, Global<const float> in, int n) {
  SHARED_ARRAY(float, tile, kThreads);
  int t = threadIdx.x;
  if (!fault || t != 17) tile[t] = load(in + t);
  __syncthreads();
  out[t] = tile[kThreads - 1 - t];
}

// A sum within a warp that once worked without __syncwarp, when warps ran in step.
template <bool barrier>
__global__ void warp_sum_kernel(Global<float> out, Global<const float> in, int n) {
  SHARED_ARRAY(float, part, kThreads);
  int t = threadIdx.x, lane = t % kWarp;
  part[t] = load(in + t);
  for (int step = kWarp / 2; step > 0; step /= 2) {
    if (barrier) __syncwarp();
    float other = lane < step ? part[t + step] : 0.0f;
    if (barrier) __syncwarp();
    if (lane < step) part[t] += other;
  }
  if (lane == 0) out[t / kWarp] = part[t];
}

// A shuffle that names lanes which take no part.
template <bool fault>
__global__ void shuffle_kernel(Global<float> out, Global<const float> in, int n) {
  int t = threadIdx.x;
  float x = load(in + t);
  if (!fault || t % kWarp < 16) x = __shfl_xor_sync(kAllLanes, x, 1);
  out[t] = x;
}

template <bool fault>
__global__ void lane_kernel(Global<float> out, Global<const float> in, int n) {
  int t = threadIdx.x;
  float x = load(in + t);
  if (t % kWarp < 16) x = __shfl_sync(0xffffu, x, fault ? 20 : 3);
  out[t] = x;
}

template <bool fault>
__global__ void dynamic_kernel(Global<float> out, Global<const float> in, int n) {
  DYNAMIC_SHARED(float, tile);
  int t = threadIdx.x;
  tile[t + (fault ? 1 : 0)] = load(in + t);
  __syncthreads();
  out[t] = tile[(t + 1) % kThreads + (fault ? 1 : 0)];
}

template <bool fault>
__global__ void vector_kernel(Global<float> out, Global<const float> in, int n) {
  int t = threadIdx.x;
  if (t < n / 4 - 1) store16(out + 4 * t, load16(in + 4 * t + (fault ? 1 : 0)));
}

// Counts into one place with and without an atomic addition.
template <bool atomic>
__global__ void count_kernel(Global<float> out, Global<const float> in, int n) {
  SHARED_ARRAY(float, sum, 1);
  int t = threadIdx.x;
  if (t == 0) sum[0] = 0;
  __syncthreads();
  if (atomic)
    atomic_add(sum, 1.0f);
  else
    sum[0] += 1.0f;
  __syncthreads();
  if (t == 0) out[0] = sum[0];
}
// 52,000 bytes where cards have 49,152.
template <bool fault>
__global__ void greedy_kernel(Global<float> out, Global<const float> in, int n) {
  SHARED_ARRAY(float, tile, fault ? 13000 : 12000);
  int t = threadIdx.x;
  tile[t] = load(in + t);
  out[t] = tile[t];
}
}  // namespace

extern "C" __attribute__((visibility("default"))) const char* planted(const char* name, float* out,
                                                                      const float* in, int n) {
  using Kernel = void (*)(Global<float>, Global<const float>, int);
  static const std::map<std::string, Kernel> kernels = {
      {"reverse", reverse_kernel<kNone>},
      {"reverse without its barrier", reverse_kernel<kNoBarrier>},
      {"reverse that writes past the end", reverse_kernel<kWriteOut>},
      {"reverse that reads past the end", reverse_kernel<kReadOut>},
      {"twice", twice_kernel<true>},
      {"twice without the barrier between", twice_kernel<false>},
      {"barrier", divergent_kernel<0>},
      {"barrier after some have returned", divergent_kernel<1>},
      {"barrier in both branches", divergent_kernel<2>},
      {"barrier in one branch", divergent_kernel<3>},
      {"unwritten", unwritten_kernel<false>},
      {"unwritten element", unwritten_kernel<true>},
      {"warp sum", warp_sum_kernel<true>},
      {"warp sum without barriers", warp_sum_kernel<false>},
      {"shuffle", shuffle_kernel<false>},
      {"shuffle of half a warp", shuffle_kernel<true>},
      {"lane", lane_kernel<false>},
      {"lane outside the mask", lane_kernel<true>},
      {"dynamic", dynamic_kernel<false>},
      {"dynamic past its size", dynamic_kernel<true>},
      {"vector", vector_kernel<false>},
      {"vector that is not aligned", vector_kernel<true>},
      {"greedy", greedy_kernel<false>},
      {"greedy beyond a block's memory", greedy_kernel<true>},
      {"count", count_kernel<true>},
      {"count without atomics", count_kernel<false>},
  };
  dim3 grid(ceil_div(n + 1, kThreads));
  if (std::strncmp(name, "reverse", 7) != 0) grid.x = 1;
  return launch<Global<float>, Global<const float>, int>(
      kernels.at(name), {0, nullptr}, grid, kThreads, kThreads * sizeof(float), out, in, n);
}

// Attention of a few new tokens over a dense or paged KV cache, split over the keys.
//
// B sequences of S new tokens, H query heads, G key heads, D head_dim. A row is one query of one of
// the H / G heads that share a key head: token * (H / G) + head. A block owns one key head of one
// sequence against kSplit keys: it appends the new keys among them, then reads each key once for
// kRows rows. Splits start at multiples of kSplit, so a sequence's result does not depend on what
// else is in the batch; the grid depends on maxima only. A second launch joins the splits and
// counts the sink once.
#include "intrinsics.h"

namespace {
constexpr int kSplit = cuda::kDecodeSplit;
constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kDims = 8;  // of a lane: D / 8 lanes, or a power of two above, share a key
template <int Rows>
constexpr int kKeys = Rows > 2 ? 2 : 4;  // of those lanes at a time, whose loads come first
constexpr int kJoinWarps = 4;
constexpr int kMaxDim = 256;
constexpr float kLowest = -1e30f;  // a running maximum that has seen nothing
constexpr float kLog2e = 1.4426950408889634f;

struct fp8 {
  uint8_t bits;  // e4m3
};

template <typename C>
struct Cache {
  Global<C> at;
  int64_t page, token, head;  // strides; a page is a sequence where there is no block table
  Global<const float> scale;  // [G] or null
};

template <typename T>
struct New {
  Global<const T> at;  // [B, S, heads, D]
  int64_t b, t, h;
};

template <typename T, typename C>
struct Arguments {
  New<T> q, k, v;
  Cache<C> k_cache, v_cache;
  Global<const int32_t> seqlens, block_table;
  int64_t table_stride;
  Global<const float> cos, sin, sinks;
  Global<float> parts;  // [B, S, H, splits, D + 2]: sums, then maximum and denominator
  Global<T> out;
  int batches, tokens, heads, kv_heads, head_dim, capacity, pages, page, page_shift;
  int half, table_length, splits, window_left, lanes;
  bool append;
  float scale;
};

// Eight values of a cache as they lie there.
template <typename C>
struct Raw {
  Bits16 word[sizeof(C) == 4 ? 2 : 1];
};
template <>
struct Raw<fp8> {
  Bits8 word[1];
};

template <typename C>
__device__ inline Raw<C> fetch(Global<C> p) {
  Raw<C> raw;
  if constexpr (sizeof(C) == 1) {
    raw.word[0] = fetch8(p);
  } else {
    raw.word[0] = fetch16(p);
    if constexpr (sizeof(C) == 4) raw.word[1] = fetch16(p + 4);
  }
  return raw;
}

__device__ inline float from_fp8(fp8 x) {
  uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7f) return __uint_as_float(0x7fc00000u);
  return widen(f16{static_cast<uint16_t>((x.bits & 0x80u) << 8 | magnitude << 7)}) * 256.0f;
}

template <typename C>
__device__ inline void widen_raw(const Raw<C>& raw, float (&x)[kDims]) {
  if constexpr (sizeof(C) == 1) {
#pragma unroll
    for (int i = 0; i < kDims; i++)
      x[i] = from_fp8(fp8{static_cast<uint8_t>(raw.word[0].word[i / 4] >> i % 4 * 8)});
  } else if constexpr (sizeof(C) == 2) {
    widen16<C>(raw.word[0], x);
  } else {
#pragma unroll
    for (int i = 0; i < kDims; i++) x[i] = __uint_as_float(raw.word[i / 4].word[i % 4]);
  }
}

// To the nearest, ties to even, saturated; NaN stays.
__device__ inline fp8 to_fp8(float x) {
  if (x != x) return {0x7f};
  uint32_t bits = __float_as_uint(x), sign = bits >> 31 << 7;
  float magnitude = fminf(fabsf(x), 448.0f);
  if (magnitude < 0x1p-6f) {
    uint32_t steps = static_cast<uint32_t>(rintf(magnitude * 0x1p9f));
    return {static_cast<uint8_t>(sign | steps)};
  }
  bits = __float_as_uint(magnitude);
  bits += 0x7ffffu + (bits >> 20 & 1);
  return {static_cast<uint8_t>(sign | ((bits >> 20) - (120u << 3)))};
}

template <typename T, typename C>
struct Sequence {
  int64_t base;  // position of the first query
  int total;     // keys after the append
  int first;     // key that any query sees

  __device__ Sequence(const Arguments<T, C>& a, int length) {
    base = a.append ? length : length - a.tokens;
    total = min(a.append ? length + a.tokens : length, a.capacity);
    first = a.window_left < 0 ? 0 : static_cast<int>(max(int64_t{0}, base - a.window_left));
  }
};

// Elements from a cache's start to a key's row, -1 where its page is none.
template <typename T, typename C>
__device__ inline int64_t row_of(const Arguments<T, C>& a, const Cache<C>& cache, int b, int key,
                                 int head) {
  if (a.block_table == nullptr) return b * cache.page + key * cache.token + head * cache.head;
  int page = a.page_shift >= 0 ? key >> a.page_shift : key / a.page;
  int at = load(a.block_table + (b * a.table_stride + page));
  if (at < 0 || at >= a.pages) return -1;
  return at * cache.page + (key - page * a.page) * cache.token + head * cache.head;
}

// Element d of a row at a position, rotated.
template <typename T, typename C>
__device__ inline float rotated(const Arguments<T, C>& a, Global<const T> row, int64_t position,
                                int d) {
  float x = widen(load(row + d));
  if (a.cos == nullptr || d >= 2 * a.half) return x;
  int i = d < a.half ? d : d - a.half;
  float other = widen(load(row + (d < a.half ? d + a.half : i)));
  bool known = position >= 0 && position < a.table_length;
  float c = known ? load(a.cos + (position * a.half + i)) : __uint_as_float(0x7fc00000u);
  float s = known ? load(a.sin + (position * a.half + i)) : c;
  return d < a.half ? x * c - other * s : x * c + other * s;
}

template <typename T, typename C>
__device__ inline C stored(float x, Global<const float> scale, int head) {
  T rounded = narrow<T>(x);
  if constexpr (sizeof(C) == 1) {
    float wide = widen(rounded);
    return to_fp8(scale == nullptr ? wide : wide / load(scale + head));
  } else {
    return rounded;
  }
}

// New keys and values of head g in [lo, hi) into the caches.
template <typename T, typename C>
__device__ void append(const Arguments<T, C>& a, const Sequence<T, C>& sequence, int b, int g,
                       int lo, int hi) {
  int from = static_cast<int>(max(int64_t{lo}, sequence.base));
  for (int i = threadIdx.x; i < (hi - from) * a.head_dim; i += kThreads) {
    int key = from + i / a.head_dim, d = i % a.head_dim;
    int64_t t = key - sequence.base;
    int64_t k_row = row_of(a, a.k_cache, b, key, g), v_row = row_of(a, a.v_cache, b, key, g);
    if (k_row < 0) continue;
    float k = rotated(a, a.k.at + (b * a.k.b + t * a.k.t + g * a.k.h), key, d);
    float v = widen(load(a.v.at + (b * a.v.b + t * a.v.t + g * a.v.h + d)));
    a.k_cache.at[k_row + d] = stored<T, C>(k, a.k_cache.scale, g);
    a.v_cache.at[v_row + d] = stored<T, C>(v, a.v_cache.scale, g);
  }
}

// Sums of Rows rows over the keys that a lane has seen, of its dimensions.
template <int Rows>
struct Sums {
  float most[Rows], denominator[Rows], at[Rows][kDims];
};

// Adds what another has seen, after both are brought to the larger maximum.
template <int Rows>
__device__ __forceinline__ void join_lanes(Sums<Rows>& sums, int lanes) {
#pragma unroll
  for (int r = 0; r < Rows; r++) {
    float other = __shfl_xor_sync(kAllLanes, sums.most[r], lanes);
    float most = fmaxf(sums.most[r], other), factor = exp2f(sums.most[r] - most);
    float denominator = sums.denominator[r] * factor;
    sums.most[r] = most;
    sums.denominator[r] = denominator + __shfl_xor_sync(kAllLanes, denominator, lanes);
#pragma unroll
    for (int i = 0; i < kDims; i++) {
      float part = sums.at[r][i] * factor;
      sums.at[r][i] = part + __shfl_xor_sync(kAllLanes, part, lanes);
    }
  }
}

// kKeys keys from `key` on, `step` apart. q: [Rows, D] in the block's memory, scaled.
template <int Rows, typename T, typename C>
__device__ __forceinline__ void add_keys(const Arguments<T, C>& a, const Sequence<T, C>& sequence,
                                         Shared<float> q, int b, int g, int first_row, int key,
                                         int step, int lo, int hi, Sums<Rows>& sums) {
  int d = static_cast<int>(threadIdx.x) % a.lanes * kDims, group = a.heads / a.kv_heads;
  bool mine = d < a.head_dim;
  Raw<C> k[kKeys<Rows>], v[kKeys<Rows>];
  bool sound[kKeys<Rows>];
#pragma unroll
  for (int n = 0; n < kKeys<Rows>; n++) {
    int at = min(max(key + n * step, lo), hi - 1);
    int64_t k_row = row_of(a, a.k_cache, b, at, g), v_row = row_of(a, a.v_cache, b, at, g);
    sound[n] = k_row >= 0;
    k[n] = {};
    v[n] = {};
    if (mine && sound[n]) {
      k[n] = fetch(a.k_cache.at + (k_row + d));
      v[n] = fetch(a.v_cache.at + (v_row + d));
    }
  }
  float score[Rows][kKeys<Rows>];
#pragma unroll
  for (int r = 0; r < Rows; r++) {
    float query[kDims];
#pragma unroll
    for (int i = 0; i < kDims; i++) query[i] = mine ? q[r * a.head_dim + d + i] : 0.0f;
#pragma unroll
    for (int n = 0; n < kKeys<Rows>; n++) {
      float wide[kDims];
      widen_raw(k[n], wide);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kDims; i++) sum += query[i] * wide[i];
      score[r][n] = sum;
    }
  }
  for (int lanes = a.lanes / 2; lanes > 0; lanes /= 2)
#pragma unroll
    for (int r = 0; r < Rows; r++)
#pragma unroll
      for (int n = 0; n < kKeys<Rows>; n++)
        score[r][n] += __shfl_xor_sync(kAllLanes, score[r][n], lanes);
#pragma unroll
  for (int r = 0; r < Rows; r++) {
    int64_t position = sequence.base + (first_row + r) / group;
    bool seen[kKeys<Rows>];
    float most = sums.most[r];
#pragma unroll
    for (int n = 0; n < kKeys<Rows>; n++) {
      int at = key + n * step;
      seen[n] = at >= lo && at < hi && at <= position &&
                (a.window_left < 0 || at >= position - a.window_left);
      if (!sound[n]) score[r][n] = __uint_as_float(0x7fc00000u);
      if (seen[n]) most = fmaxf(most, score[r][n]);
    }
    float factor = exp2f(sums.most[r] - most);
    sums.most[r] = most;
    sums.denominator[r] *= factor;
#pragma unroll
    for (int i = 0; i < kDims; i++) sums.at[r][i] *= factor;
#pragma unroll
    for (int n = 0; n < kKeys<Rows>; n++) {
      score[r][n] = seen[n] ? exp2f(score[r][n] - most) : 0.0f;
      sums.denominator[r] += score[r][n];
    }
  }
#pragma unroll
  for (int n = 0; n < kKeys<Rows>; n++) {
    float wide[kDims];
    widen_raw(v[n], wide);
#pragma unroll
    for (int r = 0; r < Rows; r++)
#pragma unroll
      for (int i = 0; i < kDims; i++)
        if (score[r][n] != 0) sums.at[r][i] += score[r][n] * wide[i];  // unseen rows may hold NaN
  }
}

// Joins the block's warps through its memory and writes the split's part of each row.
template <int Rows, typename T, typename C>
__device__ __forceinline__ void write_parts(const Arguments<T, C>& a, const Sums<Rows>& sums,
                                            Shared<float> memory, int b, int g, int first_row,
                                            int rows) {
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, wide = a.head_dim + 2;
  int d = lane * kDims, group = a.heads / a.kv_heads;
  if (d < a.head_dim && lane < a.lanes) {
#pragma unroll
    for (int r = 0; r < Rows; r++) {
      Shared<float> row = memory + (warp * Rows + r) * wide;
#pragma unroll
      for (int i = 0; i < kDims; i++) row[d + i] = sums.at[r][i];
      if (lane == 0) {
        row[a.head_dim] = sums.most[r];
        row[a.head_dim + 1] = sums.denominator[r];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * wide; i += kThreads) {
    int r = i / wide, at = i % wide, row = first_row + r;
    float most = kLowest, sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) most = fmaxf(most, memory[(w * Rows + r) * wide + a.head_dim]);
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      Shared<float> from = memory + (w * Rows + r) * wide;
      float factor = exp2f(from[a.head_dim] - most);
      sum += from[at] * factor;
    }
    int64_t query = (int64_t{b} * a.tokens + row / group) * a.heads + g * group + row % group;
    a.parts[(query * a.splits + blockIdx.x) * wide + at] = at == a.head_dim ? most : sum;
  }
}

template <typename T, typename C, int Rows>
__global__ void __launch_bounds__(kThreads) decode_split_kernel(Arguments<T, C> a) {
  DYNAMIC_SHARED(float, memory);  // q [Rows, D], then [kWarps, Rows, D + 2]
  int b = blockIdx.z, g = blockIdx.y, length = load(a.seqlens + b);
  if (length < 0) return;
  Sequence<T, C> sequence(a, length);
  int lo = (sequence.first / kSplit + static_cast<int>(blockIdx.x)) * kSplit;
  int hi = min(lo + kSplit, sequence.total);
  if (lo >= hi) return;
  if (a.append) append(a, sequence, b, g, lo, hi);  // read after the barrier below
  lo = max(lo, sequence.first);
  int group = a.heads / a.kv_heads, all_rows = a.tokens * group;
  float scale = a.scale * kLog2e;
  if (a.k_cache.scale != nullptr) scale *= load(a.k_cache.scale + g);
  int streams = kThreads / a.lanes, stream = static_cast<int>(threadIdx.x) / a.lanes;
  for (int first_row = 0; first_row < all_rows; first_row += Rows) {
    for (int i = threadIdx.x; i < Rows * a.head_dim; i += kThreads) {
      int row = min(first_row + i / a.head_dim, all_rows - 1), d = i % a.head_dim;
      int64_t t = row / group, h = g * group + row % group;
      float x = rotated(a, a.q.at + (b * a.q.b + t * a.q.t + h * a.q.h), sequence.base + t, d);
      memory[i] = x * scale;
    }
    __syncthreads();
    Sums<Rows> sums = {};
#pragma unroll
    for (int r = 0; r < Rows; r++) sums.most[r] = kLowest;
#pragma unroll 1
    for (int key = lo; key < hi; key += streams * kKeys<Rows>)
      add_keys<Rows>(a, sequence, memory, b, g, first_row, key + stream, streams, lo, hi, sums);
    for (int lanes = a.lanes; lanes < kWarp; lanes *= 2) join_lanes(sums, lanes);
    write_parts<Rows>(a, sums, memory + Rows * a.head_dim, b, g, first_row,
                      min(Rows, all_rows - first_row));
  }
}

// One warp a query and head.
template <typename T, typename C>
__global__ void __launch_bounds__(kJoinWarps* kWarp) decode_join_kernel(Arguments<T, C> a) {
  int64_t query = int64_t{blockIdx.x} * kJoinWarps + threadIdx.x / kWarp;
  if (query >= int64_t{a.batches} * a.tokens * a.heads) return;
  int lane = threadIdx.x % kWarp, wide = a.head_dim + 2, h = static_cast<int>(query % a.heads);
  int length = load(a.seqlens + query / a.heads / a.tokens), splits = 0;
  if (length >= 0) {
    Sequence<T, C> sequence(a, length);
    if (sequence.total > sequence.first)
      splits = (sequence.total - 1) / kSplit - sequence.first / kSplit + 1;
  }
  Global<float> parts = a.parts + query * a.splits * wide;
  float most = kLowest, denominator = 0, sums[kMaxDim / kWarp] = {};
  for (int s = lane; s < splits; s += kWarp) most = fmaxf(most, parts[s * wide + a.head_dim]);
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
  float sink = a.sinks == nullptr ? kLowest : load(a.sinks + h) * kLog2e;
  if (a.sinks != nullptr) most = fmaxf(most, sink);
#pragma unroll 4
  for (int s = 0; s < splits; s++) {
    float factor = exp2f(parts[s * wide + a.head_dim] - most);
    denominator += parts[s * wide + a.head_dim + 1] * factor;
#pragma unroll
    for (int j = 0; j < kMaxDim / kWarp; j++) {
      int d = lane + j * kWarp;
      if (d < a.head_dim) sums[j] += parts[s * wide + d] * factor;
    }
  }
  if (a.sinks != nullptr) denominator += exp2f(sink - most);
  float factor = denominator == 0 ? 0.0f : 1 / denominator;
  if (a.v_cache.scale != nullptr) factor *= load(a.v_cache.scale + h / (a.heads / a.kv_heads));
#pragma unroll
  for (int j = 0; j < kMaxDim / kWarp; j++) {
    int d = lane + j * kWarp;
    if (d < a.head_dim) a.out[query * a.head_dim + d] = narrow<T>(sums[j] * factor);
  }
}

template <typename T, typename C>
const char* run(const Place& place, const cuda::DecodeCall& c) {
  auto fresh = [](const cuda::DecodeTensor& t) {
    return New<T>{static_cast<const T*>(t.at), t.strides[0], t.strides[1], t.strides[2]};
  };
  auto cache = [](const cuda::DecodeTensor& t, const float* scale) {
    return Cache<C>{static_cast<C*>(t.at), t.strides[0], t.strides[1], t.strides[2], scale};
  };
  Arguments<T, C> a = {};
  a.q = fresh(c.q);
  a.k = fresh(c.k);
  a.v = fresh(c.v);
  a.k_cache = cache(c.k_cache, c.k_scale);
  a.v_cache = cache(c.v_cache, c.v_scale);
  a.seqlens = c.seqlens;
  a.block_table = c.block_table;
  a.table_stride = c.table_stride;
  a.cos = c.cos;
  a.sin = c.sin;
  a.sinks = c.sinks;
  a.parts = c.parts;
  a.out = static_cast<T*>(c.out);
  a.batches = static_cast<int>(c.batches);
  a.tokens = static_cast<int>(c.tokens);
  a.heads = static_cast<int>(c.heads);
  a.kv_heads = static_cast<int>(c.kv_heads);
  a.head_dim = static_cast<int>(c.head_dim);
  a.capacity = static_cast<int>(c.capacity);
  a.pages = static_cast<int>(c.pages);
  a.page = static_cast<int>(c.page);
  a.page_shift = -1;
  for (int shift = 0; shift < 31; shift++)
    if (a.page == 1 << shift) a.page_shift = shift;
  a.half = static_cast<int>(c.half);
  a.table_length = static_cast<int>(c.table_length);
  a.splits = static_cast<int>(c.splits);
  a.window_left = static_cast<int>(c.window_left);
  for (a.lanes = 8; a.lanes * kDims < a.head_dim;) a.lanes *= 2;
  a.append = c.k.at != nullptr;
  a.scale = c.scale;
  dim3 grid(a.splits, a.kv_heads, a.batches);
  auto split = [&](auto kernel, int rows) {
    int floats = rows * a.head_dim + kWarps * rows * (a.head_dim + 2);
    return launch(kernel, place, grid, kThreads, floats * static_cast<int>(sizeof(float)), a);
  };
  int rows = a.tokens * (a.heads / a.kv_heads);
  const char* reason =
      rows <= 2 ? split(decode_split_kernel<T, C, 2>, 2) : split(decode_split_kernel<T, C, 8>, 8);
  if (*reason != 0) return reason;
  dim3 joins(static_cast<unsigned>(ceil_div(c.batches * c.tokens * c.heads, kJoinWarps)));
  return launch(decode_join_kernel<T, C>, place, joins, kJoinWarps * kWarp, 0, a);
}
}  // namespace

const char* cuda::decode_attention(const Place& place, const DecodeCall& c) {
  return with_dtype(c.dtype, [&](auto tag) {
    using T = decltype(tag);
    return c.fp8 ? run<T, fp8>(place, c) : run<T, T>(place, c);
  });
}

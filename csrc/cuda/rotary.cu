// Rotary position embedding of q and k in one launch.
//
// T tokens of B batches, H heads, D head_dim, half = R / 2. Reads any strides, writes contiguous
// rows.
#include "intrinsics.h"

namespace {
constexpr int kTokens = 4;  // of a block
constexpr int kThreads = 256;
constexpr int kInFlight = 2;  // items of a thread: two loads each before the first store

template <typename T>
struct Tensor {
  Global<const T> in;
  Global<T> out;
  int64_t b, t, h;
  int heads;
};

template <typename T>
struct Arguments {
  Tensor<T> q, k;
  Global<const float> cos, sin;
  Global<const int32_t> positions;
  Global<const int64_t> wide_positions;
  Global<const int32_t> cu_seqlens;
  int64_t position_b, position_t, rows, tokens, table_length;
  int head_dim, half, sequences;
  float direction;
};

// The last sequence that starts by token t; empty ones before it share its start.
__device__ inline int64_t sequence_start(Global<const int32_t> cu_seqlens, int sequences,
                                         int64_t t) {
  int low = 0, high = sequences;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (load(cu_seqlens + middle) > t)
      high = middle;
    else
      low = middle;
  }
  return load(cu_seqlens + low);
}

template <typename T>
__device__ int64_t position_of(const Arguments<T>& a, int64_t b, int64_t t) {
  int64_t at = b * a.position_b + t * a.position_t;
  if (a.wide_positions != nullptr) return load(a.wide_positions + at);
  if (a.positions != nullptr) return load(a.positions + at);
  if (a.cu_seqlens != nullptr) return t - sequence_start(a.cu_seqlens, a.sequences, t);
  return t;
}

// One thread's share of a row: V elements of both halves, or V of the dimensions past them.
template <typename T, int V>
struct Item {
  Global<const T> in;
  Global<T> out;
  int64_t table;  // of its cos and sin, -1: past the tables, -2: copied
  float first[V], second[V];
};

template <typename T, int V>
__device__ inline void read(Global<const T> p, float (&x)[V]) {
  if constexpr (V == 1)
    x[0] = widen(load(p));
  else
    widen16<T>(load16(p), x);
}
template <typename T, int V>
__device__ inline void write(Global<T> p, const float (&x)[V]) {
  if constexpr (V == 1)
    *p = narrow<T>(x[0]);
  else
    store16(p, narrow16<T>(x));
}
template <int V>
__device__ inline void read_table(Global<const float> table, int64_t at, float (&x)[V]) {
#pragma unroll
  for (int i = 0; i < V; i += V == 1 ? 1 : 4) {
    if (at < 0) {  // beyond the tables: loud, not wrong
      for (int j = i; j < i + (V == 1 ? 1 : 4); j++) x[j] = __uint_as_float(0x7fc00000u);
    } else if constexpr (V == 1) {
      x[0] = load(table + at);
    } else {
      float four[4];
      widen16<float>(load16(table + at + i), four);
#pragma unroll
      for (int j = 0; j < 4; j++) x[i + j] = four[j];
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) rotary_kernel(Arguments<T> a) {
  SHARED_ARRAY(int64_t, position, kTokens);
  int64_t first_row = int64_t{blockIdx.x} * kTokens;
  int thread = static_cast<int>(threadIdx.x);
  if (thread < kTokens && first_row + thread < a.rows) {
    int64_t row = first_row + thread;
    position[thread] = position_of(a, row / a.tokens, row % a.tokens);
  }
  __syncthreads();
  int turned = a.half / V, per_head = turned + (a.head_dim - 2 * a.half) / V;
  int per_token = (a.q.heads + a.k.heads) * per_head;
  int rows = static_cast<int>(min(int64_t{kTokens}, a.rows - first_row));
  for (int base = thread; base < rows * per_token; base += kThreads * kInFlight) {
    Item<T, V> items[kInFlight];
#pragma unroll
    for (int n = 0; n < kInFlight; n++) {
      int i = base + n * kThreads;
      if (i >= rows * per_token) break;
      Item<T, V>& item = items[n];
      int token = i / per_token, head = i % per_token / per_head, part = i % per_head;
      int64_t row = first_row + token, at = position[token];
      const Tensor<T>& x = head < a.q.heads ? a.q : a.k;
      if (head >= a.q.heads) head -= a.q.heads;
      int d = part < turned ? part * V : 2 * a.half + (part - turned) * V;
      item.in = x.in + (row / a.tokens * x.b + row % a.tokens * x.t + head * x.h + d);
      item.out = x.out + ((row * x.heads + head) * a.head_dim + d);
      item.table = at < 0 || at >= a.table_length ? -1 : at * a.half + d;
      read<T, V>(item.in, item.first);
      if (part < turned)
        read<T, V>(item.in + a.half, item.second);
      else
        item.table = -2;
    }
#pragma unroll
    for (int n = 0; n < kInFlight; n++) {
      if (base + n * kThreads >= rows * per_token) break;
      Item<T, V>& item = items[n];
      if (item.table == -2) {
        write<T, V>(item.out, item.first);
        continue;
      }
      float c[V], s[V], first[V], second[V];
      read_table<V>(a.cos, item.table, c);
      read_table<V>(a.sin, item.table, s);
#pragma unroll
      for (int j = 0; j < V; j++) {
        float sine = s[j] * a.direction;
        first[j] = item.first[j] * c[j] - item.second[j] * sine;
        second[j] = item.second[j] * c[j] + item.first[j] * sine;
      }
      write<T, V>(item.out, first);
      write<T, V>(item.out + a.half, second);
    }
  }
}

// Can every row be read and written 16 bytes at a time?
template <typename T>
bool in_vectors(const cuda::RotaryCall& c) {
  constexpr int V = kElements<T>;
  bool whole = c.half % V == 0 && c.head_dim % V == 0;
  uintptr_t addresses = reinterpret_cast<uintptr_t>(c.cos) | reinterpret_cast<uintptr_t>(c.sin);
  for (const cuda::RotaryTensor* t : {&c.q, &c.k}) {
    whole = whole && t->b % V == 0 && t->t % V == 0 && t->h % V == 0;
    addresses |= reinterpret_cast<uintptr_t>(t->in) | reinterpret_cast<uintptr_t>(t->out);
  }
  return whole && addresses % 16 == 0;
}

template <typename T>
Tensor<T> tensor(const cuda::RotaryTensor& t) {
  return {static_cast<const T*>(t.in), static_cast<T*>(t.out), t.b, t.t, t.h,
          static_cast<int>(t.heads)};
}
}  // namespace

const char* cuda::rotary(const Place& place, const RotaryCall& c) {
  return with_dtype(c.dtype, [&](auto tag) {
    using T = decltype(tag);
    Arguments<T> a = {};
    a.q = tensor<T>(c.q);
    a.k = tensor<T>(c.k);
    a.cos = c.cos;
    a.sin = c.sin;
    if (c.wide_positions)
      a.wide_positions = static_cast<const int64_t*>(c.position_ids);
    else
      a.positions = static_cast<const int32_t*>(c.position_ids);
    a.cu_seqlens = c.cu_seqlens;
    a.position_b = c.position_b;
    a.position_t = c.position_t;
    a.rows = c.batches * c.tokens;
    a.tokens = c.tokens;
    a.table_length = c.table_length;
    a.head_dim = static_cast<int>(c.head_dim);
    a.half = static_cast<int>(c.half);
    a.sequences = static_cast<int>(c.sequences);
    a.direction = c.direction;
    dim3 grid(static_cast<unsigned>(ceil_div(a.rows, kTokens)));
    if (in_vectors<T>(c))
      return launch(rotary_kernel<T, kElements<T>>, place, grid, kThreads, 0, a);
    return launch(rotary_kernel<T, 1>, place, grid, kThreads, 0, a);
  });
}

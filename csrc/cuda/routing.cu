// Router product of few tokens, top-k, weights and the stable sort of token slots, in one launch.
//
// T tokens, H hidden, E experts, K topk, slot t K + k. A tile is 32 tokens. Each block chooses for
// one tile and ranks its slots within each expert; the last block to finish adds what came before.
// No result depends on which block that is.
#include <algorithm>

#include "intrinsics.h"

namespace {
constexpr int kTile = 32;  // tokens
constexpr int kMaxExperts = 256, kMaxTopk = 32, kMaxTiles = 128;
constexpr int kThreads = 256, kProductThreads = 512;
constexpr int kProductTokens = 16;
constexpr int64_t kOneBlockBytes = 256 << 10;  // of a router that one block reads as soon as many
constexpr int kLowest = INT32_MIN;

struct Arguments {
  int64_t x_stride;
  int tokens, hidden, experts, topk, tiles, scoring;
  bool renormalize;
  Global<const float> correction_bias;
  Global<const int32_t> given_ids;
  Global<float> logits, topk_weights;
  Global<int32_t> topk_ids, hist, offs, gather, scatter;
  Global<int32_t> tile_hist;  // [tiles, E], then exclusive sums over the tiles
  Global<uint32_t> finished;  // blocks; 0 at the launch
};

template <typename T>
struct Router {
  Global<const T> x, weight;
  Global<const float> bias;
};

// Integers in the order of the floats: one zero, NaN after minus infinity.
__device__ inline int key_of(float value) {
  if (value != value) return kLowest + 1;
  int bits = value == 0 ? 0 : static_cast<int>(__float_as_uint(value));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  return x;
}

// A warp routes a token. Lane l holds experts l, l + 32 ...; lane k gives the id of slot k.
template <int PerLane>
__device__ __forceinline__ int route(const Arguments& a, int t) {
  int lane = threadIdx.x % kWarp;
  int64_t row = int64_t{t} * a.experts;
  float logit[PerLane];
  int key[PerLane];
  bool unsound = false;
#pragma unroll
  for (int j = 0; j < PerLane; j++) {
    int e = lane + j * kWarp;
    logit[j] = -INFINITY;
    key[j] = kLowest;
    if (e < a.experts) {
      logit[j] = a.logits[row + e];
      unsound = unsound || logit[j] != logit[j];
      float choice = logit[j];
      if (a.correction_bias != nullptr) choice = sigmoid(choice) + load(a.correction_bias + e);
      key[j] = key_of(choice);
    }
  }
  int mine = 0;
  if (a.given_ids != nullptr) {
    if (lane < a.topk) {
      int given = load(a.given_ids + (int64_t{t} * a.topk + lane));
      mine = max(0, min(given, a.experts - 1));
      unsound = unsound || given != mine;
    }
  } else {
    for (int k = 0; k < a.topk; k++) {
      int best = key[0], at = 0;
#pragma unroll
      for (int j = 1; j < PerLane; j++) {
        if (key[j] > best) {
          best = key[j];
          at = j;
        }
      }
      int most = __reduce_max_sync(kAllLanes, best);
      int candidate = best == most ? lane + at * kWarp : INT32_MAX;
      int pick = __reduce_min_sync(kAllLanes, candidate);
      if (lane == k) mine = pick;
#pragma unroll
      for (int j = 0; j < PerLane; j++)
        if (pick == lane + j * kWarp) key[j] = kLowest;
    }
  }
  unsound = __any_sync(kAllLanes, unsound);
  bool slot = lane < a.topk;
  float chosen = slot ? a.logits[row + mine] : -INFINITY, weight;
  if (a.scoring == 2) {
    weight = slot ? sigmoid(chosen) : 0.0f;
    float sum = warp_sum(weight);
    if (a.renormalize) weight /= sum + 1e-20f;   // as DeepSeek's
  } else if (a.scoring == 0 || a.renormalize) {  // over all, then over the chosen: over the chosen
    float most = warp_max(chosen), part = slot ? expf(chosen - most) : 0.0f;
    weight = part / warp_sum(part);
  } else {
    float most = logit[0], part = 0;
#pragma unroll
    for (int j = 1; j < PerLane; j++) most = fmaxf(most, logit[j]);
    most = warp_max(most);
#pragma unroll
    for (int j = 0; j < PerLane; j++)
      if (lane + j * kWarp < a.experts) part += expf(logit[j] - most);
    weight = expf(chosen - most) / warp_sum(part);
  }
  if (slot) {
    a.topk_weights[int64_t{t} * a.topk + lane] = unsound ? __uint_as_float(0x7fc00000u) : weight;
    a.topk_ids[int64_t{t} * a.topk + lane] = mine;
  }
  return mine;
}

// Inclusive sum over the lanes.
__device__ inline int warp_scan(int x) {
  int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    int before = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += before;
  }
  return x;
}

// Chooses for one tile; leaves each slot's rank among its expert's slots of the tile in scatter.
template <int PerLane, int Threads>
__device__ __forceinline__ void route_tile(const Arguments& a, int tile) {
  constexpr int kWarps = Threads / kWarp, kTokens = kTile / kWarps;
  SHARED_ARRAY(int, ids, kTile* kMaxTopk);
  SHARED_ARRAY(int, counts, kWarps * PerLane * kWarp);  // of each warp's slots
  int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int first = tile * kTile + warp * kTokens;
  int tokens = max(0, min(kTokens, a.tokens - first)), slots = tokens * a.topk;
  Shared<int> my_ids = ids + warp * kTokens * kMaxTopk;
  Shared<int> my_counts = counts + warp * PerLane * kWarp;
  for (int t = 0; t < tokens; t++) {
    int id = 0;
    if (a.logits != nullptr)
      id = route<PerLane>(a, first + t);
    else if (lane < a.topk)
      id = max(0, min(load(a.given_ids + (int64_t{first} + t) * a.topk + lane), a.experts - 1));
    if (lane < a.topk) my_ids[t * a.topk + lane] = id;
  }
  for (int j = 0; j < PerLane; j++) my_counts[lane + j * kWarp] = 0;
  __syncwarp();
  int rank[kTokens * kMaxTopk / kWarp];
#pragma unroll
  for (int n = 0; n < kTokens * kMaxTopk / kWarp; n++) {
    int i = n * kWarp + lane;
    if (n * kWarp >= slots) break;
    int id = i < slots ? my_ids[i] : -1;
    unsigned same = __match_any_sync(kAllLanes, id);
    int before = __popc(same & ((1u << lane) - 1));
    rank[n] = id < 0 ? 0 : my_counts[id] + before;
    __syncwarp();
    if (id >= 0 && before == 0) my_counts[id] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  for (int e = threadIdx.x; e < a.experts; e += Threads) {
    int sum = 0;
    for (int w = 0; w < kWarps; w++) {
      int count = counts[w * PerLane * kWarp + e];
      counts[w * PerLane * kWarp + e] = sum;
      sum += count;
    }
    a.tile_hist[int64_t{tile} * a.experts + e] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kTokens * kMaxTopk / kWarp; n++) {
    int i = n * kWarp + lane;
    if (i < slots) a.scatter[int64_t{first} * a.topk + i] = rank[n] + my_counts[my_ids[i]];
  }
}

// True in the one block that comes last, which then sees what all others wrote.
__device__ inline bool comes_last(Global<uint32_t> finished) {
  if (gridDim.x == 1) {
    __syncthreads();
    return true;
  }
  SHARED_ARRAY(int, last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomic_add(finished, 1u) == gridDim.x - 1;
  __syncthreads();
  bool mine = last[0] != 0;
  if (mine) __threadfence();
  return mine;
}

// hist, offs, and the rows of all slots, from the tiles' counts and ranks.
template <int Threads>
__device__ __forceinline__ void place(const Arguments& a) {
  static_assert(Threads >= kMaxExperts);
  SHARED_ARRAY(int, offs, kMaxExperts);
  SHARED_ARRAY(int, warp_sums, Threads / kWarp);
  int e = threadIdx.x, lane = e % kWarp, warp = e / kWarp, total = 0;
  if (e < a.experts) {
#pragma unroll 8
    for (int tile = 0; tile < a.tiles; tile++) {
      int count = a.tile_hist[int64_t{tile} * a.experts + e];
      a.tile_hist[int64_t{tile} * a.experts + e] = total;
      total += count;
    }
  }
  int through = warp_scan(total);
  if (lane == kWarp - 1) warp_sums[warp] = through;
  __syncthreads();
  for (int w = 0; w < warp; w++) through += warp_sums[w];
  if (e < a.experts) {
    a.hist[e] = total;
    a.offs[e] = through - total;
    offs[e] = through - total;
    if (e == a.experts - 1) a.offs[a.experts] = through;
  }
  __syncthreads();
  int slots = a.tokens * a.topk;
#pragma unroll 4
  for (int i = threadIdx.x; i < slots; i += Threads) {
    int t = i / a.topk, id;
    if (a.logits != nullptr)
      id = a.topk_ids[i];
    else
      id = max(0, min(load(a.given_ids + i), a.experts - 1));
    int row = a.scatter[i] + offs[id] + a.tile_hist[int64_t{t / kTile} * a.experts + id];
    a.scatter[i] = row;
    a.gather[row] = t;
  }
}

template <int PerLane>
__global__ void __launch_bounds__(kThreads) routing_kernel(Arguments a) {
  route_tile<PerLane, kThreads>(a, blockIdx.x);
  if (comes_last(a.finished)) place<kThreads>(a);
}

// logits of expert e for Rows tokens from t on
template <typename T, int Rows>
__device__ __forceinline__ void product(const Arguments& a, const Router<T>& r, int t, int e) {
  constexpr int V = kElements<T>;
  int lane = threadIdx.x % kWarp;
  float sum[Rows] = {};
  Global<const T> row[Rows];
#pragma unroll
  for (int i = 0; i < Rows; i++) row[i] = r.x + (t + min(i, a.tokens - 1 - t)) * a.x_stride;
#pragma unroll(Rows == 1 ? 4 : 2)
  for (int h = lane * V; h < a.hidden; h += kWarp * V) {
    float w[V], x[V];
    widen16<T>(load16(r.weight + (int64_t{e} * a.hidden + h)), w);
#pragma unroll
    for (int i = 0; i < Rows; i++) {
      widen16<T>(load16(row[i] + h), x);
#pragma unroll
      for (int j = 0; j < V; j++) sum[i] += w[j] * x[j];
    }
  }
  float bias = r.bias == nullptr ? 0.0f : load(r.bias + e);
#pragma unroll
  for (int i = 0; i < Rows; i++) {
    float logit = warp_sum(sum[i]) + bias;
    if (lane == 0 && t + i < a.tokens) a.logits[int64_t{t + i} * a.experts + e] = logit;
  }
}

template <typename T, int PerLane>
__global__ void __launch_bounds__(kProductThreads)
    routing_product_kernel(Arguments a, Router<T> r) {
  constexpr int kWarps = kProductThreads / kWarp;
  for (int e = blockIdx.x * kWarps + threadIdx.x / kWarp; e < a.experts; e += gridDim.x * kWarps) {
    if (a.tokens == 1)
      product<T, 1>(a, r, 0, e);
    else
      for (int t = 0; t < a.tokens; t += 4) product<T, 4>(a, r, t, e);
  }
  if (!comes_last(a.finished)) return;
  route_tile<PerLane, kProductThreads>(a, 0);
  place<kProductThreads>(a);
}

Arguments arguments(const cuda::RoutingCall& c) {
  Arguments a = {};
  a.x_stride = c.x_stride;
  a.tokens = static_cast<int>(c.tokens);
  a.hidden = static_cast<int>(c.hidden);
  a.experts = static_cast<int>(c.experts);
  a.topk = static_cast<int>(c.topk);
  a.tiles = static_cast<int>(ceil_div(c.tokens, kTile));
  a.scoring = c.scoring;
  a.renormalize = c.renormalize;
  a.correction_bias = c.correction_bias;
  a.given_ids = c.given_ids;
  a.logits = c.logits;
  a.topk_weights = c.topk_weights;
  a.topk_ids = c.topk_ids;
  a.hist = c.hist;
  a.offs = c.offs;
  a.gather = c.gather;
  a.scatter = c.scatter;
  a.tile_hist = c.scratch + 1;
  a.finished = reinterpret_cast<uint32_t*>(c.scratch);
  return a;
}

// f of the experts a lane holds, as a type
template <typename F>
const char* with_experts(int64_t experts, F&& f) {
  if (experts <= 32) return f(std::integral_constant<int, 1>{});
  if (experts <= 128) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 8>{});
}

const char* route_all(const Place& place, const cuda::RoutingCall& c, int blocks) {
  return with_experts(c.experts, [&](auto per_lane) {
    return launch(routing_kernel<per_lane>, place, dim3(blocks), kThreads, 0, arguments(c));
  });
}

}  // namespace

const char* cuda::routing(const Place& place, const RoutingCall& c) {
  if (c.experts > kMaxExperts || c.topk > kMaxTopk || c.tokens > kTile * kMaxTiles ||
      (c.x != nullptr && c.tokens > kProductTokens))
    return "expected fewer tokens, experts or topk";
  bool product = c.x != nullptr;
  int blocks = static_cast<int>(std::max<int64_t>(1, ceil_div(c.tokens, kTile)));
  if (product) {
    int64_t bytes = c.experts * c.hidden * (c.dtype == DType::kF32 ? 4 : 2);
    blocks = bytes <= kOneBlockBytes ? 1 : static_cast<int>(ceil_div(c.experts, 8));
  }
  if (blocks > 1) {
    const char* reason = clear(place, c.scratch, sizeof(int32_t));
    if (*reason != 0) return reason;
  }
  if (!product) return route_all(place, c, blocks);
  return with_dtype(c.dtype, [&](auto tag) {
    using T = decltype(tag);
    Router<T> r = {static_cast<const T*>(c.x), static_cast<const T*>(c.weight), c.bias};
    return with_experts(c.experts, [&](auto per_lane) {
      return launch(routing_product_kernel<T, per_lane>, place, dim3(blocks), kProductThreads, 0,
                    arguments(c), r);
    });
  });
}

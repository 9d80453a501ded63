// Router product, top-k, weights and the stable sort of token slots by expert.
//
// T tokens, H hidden, E experts, K topk.
#include "routing.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "buffer.h"
#include "dispatch.h"
#include "dot.h"
#include "gemm.h"

namespace {
using Problem = RoutingProblem;
using Forward = RoutingForward;

#if defined(__AVX512F__)
constexpr int64_t kRows = 6, kColumns = 4;  // 24 of 32 registers accumulate, 6 hold x, 1 a weight
#else
constexpr int64_t kRows = 3, kColumns = 4;  // 12 of 16, 3 and 1
#endif
constexpr int kRowColumns = 8;        // of a single row: as many sums as hide the latency of one
constexpr int64_t kDepth = 1024;      // of x and weight at a time: kRows rows of x stay in L1
constexpr int64_t kTokens = 48;       // of a task
constexpr int64_t kSerial = 1 << 19;  // products below which waking a second thread costs more

// logits of tokens [t0, t1) and experts [e0, e1)
template <typename T>
void product(const Problem& p, const Forward& f, int64_t t0, int64_t t1, int64_t e0, int64_t e1) {
  const T *x = static_cast<const T*>(f.x), *weight = static_cast<const T*>(f.weight);
  for (int64_t t = t0; t < t1; t++)
    for (int64_t e = e0; e < e1; e++)
      f.logits[t * p.experts + e] = f.bias == nullptr ? 0 : f.bias[e];
  for (int64_t h = 0; h < p.hidden; h += kDepth) {
    int64_t n = std::min(kDepth, p.hidden - h), count = 0;
    for (int64_t t = t0; t < t1; t += count) {
      count = t + kRows <= t1 ? kRows : 1;
      const T* row = x + t * f.x_stride + h;
      for (int64_t e = e0; e < e1;) {
        const T* columns = weight + e * p.hidden + h;
        float* out = f.logits + t * p.experts + e;
        if (count > 1 && e + kColumns <= e1) {
          int64_t tiles = (e1 - e0) / kColumns, each = (kRows + tiles - 1) / tiles;
          int64_t first = (e - e0) / kColumns * each;
          Ahead<T> ahead;
          if (t + 2 * kRows <= t1 && first < kRows)
            ahead = {row + (kRows + first) * f.x_stride, f.x_stride, std::min(each, kRows - first)};
          dot_tile<kRows, kColumns>(row, f.x_stride, columns, p.hidden, n, out, p.experts, ahead);
          e += kColumns;
        } else if (count > 1) {
          dot_tile<kRows, 1>(row, f.x_stride, columns, p.hidden, n, out, p.experts);
          e += 1;
        } else if (e + kRowColumns <= e1) {
          dot_tile<1, kRowColumns>(row, f.x_stride, columns, p.hidden, n, out, p.experts);
          e += kRowColumns;
        } else {
          dot_tile<1, 1>(row, f.x_stride, columns, p.hidden, n, out, p.experts);
          e += 1;
        }
      }
    }
  }
}

// A decoding step's few tokens are split by experts instead.
void products(const Problem& p, const Forward& f) {
  bool serial = p.tokens * p.experts * p.hidden < kSerial;
  int64_t threads = serial ? 1 : omp_get_max_threads();
  int64_t token_tasks = (p.tokens + kTokens - 1) / kTokens, expert_tasks = 1;
  if (token_tasks < threads)
    expert_tasks = std::min(threads, std::max<int64_t>(p.experts / kRowColumns, 1));
  int64_t experts = round_up(p.experts, expert_tasks * kRowColumns) / expert_tasks;
  with_dtype(f.dtype, [&](auto tag) {
    using T = decltype(tag);
#pragma omp parallel for collapse(2) schedule(static) if (token_tasks * expert_tasks > 1)
    for (int64_t t = 0; t < token_tasks; t++)
      for (int64_t e = 0; e < expert_tasks; e++)
        product<T>(p, f, t * kTokens, std::min((t + 1) * kTokens, p.tokens),
                   std::min(e * experts, p.experts), std::min((e + 1) * experts, p.experts));
  });
}

// ids of the topk largest, largest first, ties to the lower id; false where one is NaN
bool choose(const float* choice, int64_t experts, int64_t topk, float* best, int32_t* ids) {
  int64_t found = 0;
  bool sound = true;
  for (int64_t e = 0; e < experts; e++) {
    float c = choice[e];
    sound &= c == c;
    if (found == topk && !(c > best[topk - 1])) continue;
    int64_t at = found < topk ? found++ : topk - 1;
    for (; at > 0 && c > best[at - 1]; at--) {
      best[at] = best[at - 1];
      ids[at] = ids[at - 1];
    }
    best[at] = c;
    ids[at] = static_cast<int32_t>(e);
  }
  return sound;
}

void weigh(const Problem& p, const float* logits, const int32_t* ids, float* weights) {
  for (int64_t k = 0; k < p.topk; k++) weights[k] = logits[ids[k]];
  if (static_cast<Scoring>(p.scoring) == Scoring::kSigmoid) {
    float sum = 1e-20f;  // as DeepSeek's
    for (int64_t k = 0; k < p.topk; k++) sum += weights[k] = sigmoid(weights[k]);
    for (int64_t k = 0; p.renormalize && k < p.topk; k++) weights[k] /= sum;
    return;
  }
  bool chosen = softmax_of_chosen(p);
  const float* over = chosen ? weights : logits;
  int64_t count = chosen ? p.topk : p.experts;
  float most = largest(over, count), sum = exp_sum(over, count, most);
  for (int64_t k = 0; k < p.topk; k++) weights[k] = std::exp(weights[k] - most) / sum;
}

// One token; false where its logits are NaN.
bool route(const Problem& p, const Forward& f, int64_t t, float* scratch) {
  const float* logits = f.logits + t * p.experts;
  int32_t* ids = f.topk_ids + t * p.topk;
  bool sound = true;
  if (f.given_ids != nullptr) {
    std::copy_n(f.given_ids + t * p.topk, p.topk, ids);
    for (int64_t e = 0; e < p.experts; e++) sound &= logits[e] == logits[e];
  } else {
    const float* choice = logits;
    float* best = scratch + p.experts;
    if (f.correction_bias != nullptr) {
      for (int64_t e = 0; e < p.experts; e++)
        scratch[e] = sigmoid(logits[e]) + f.correction_bias[e];
      choice = scratch;
    }
    sound = choose(choice, p.experts, p.topk, best, ids);
  }
  if (sound) weigh(p, logits, ids, f.topk_weights + t * p.topk);
  return sound;
}

void check_ids(const int32_t* ids, int64_t slots, int64_t experts) {
  if (slots == 0) return;
  auto [low, high] = std::minmax_element(ids, ids + slots);
  if (*low < 0 || *high >= experts)
    throw std::invalid_argument("routing: expected topk_ids in 0 ... " +
                                std::to_string(experts - 1) + ", got " + std::to_string(*low) +
                                " ... " + std::to_string(*high));
}
}  // namespace

// Chunks of slots are counted, each gets its place within every expert, and fills it in order.
void routing_sort(const int32_t* ids, int64_t tokens, int64_t topk, int64_t experts,
                  const RoutingOrder& order) {
  int64_t slots = tokens * topk;
  check_ids(ids, slots, experts);
  int64_t chunks = std::min<int64_t>(omp_get_max_threads(), slots / (1 << 13) + 1);
  int64_t length = (slots + chunks - 1) / chunks;
  Buffer<int32_t> place(chunks * experts);
  std::fill_n(place.get(), chunks * experts, 0);
#pragma omp parallel for schedule(static) if (chunks > 1)
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t i = c * length; i < std::min((c + 1) * length, slots); i++)
      place[c * experts + ids[i]]++;
  int32_t next = 0;
  for (int64_t e = 0; e < experts; e++) {
    order.expert_offs[e] = next;
    for (int64_t c = 0; c < chunks; c++) {
      int32_t count = place[c * experts + e];
      place[c * experts + e] = next;
      next += count;
    }
    order.expert_hist[e] = next - order.expert_offs[e];
  }
  order.expert_offs[experts] = next;
#pragma omp parallel for schedule(static) if (chunks > 1)
  for (int64_t c = 0; c < chunks; c++) {
    int64_t i = c * length, token = i / topk, k = i % topk;
    for (; i < std::min((c + 1) * length, slots); i++) {
      int32_t row = place[c * experts + ids[i]]++;
      order.scatter_indices[i] = row;
      order.gather_indices[row] = static_cast<int32_t>(token);
      if (++k == topk) {
        k = 0;
        token++;
      }
    }
  }
}

void routing_fwd(const Problem& p, const Forward& f) {
  if (f.given_ids != nullptr) check_ids(f.given_ids, p.tokens * p.topk, p.experts);
  if (f.x != nullptr) products(p, f);
  int unsound = 0;
#pragma omp parallel if (p.tokens > 64) reduction(+ : unsound)
  {
    Buffer<float> scratch(p.experts + p.topk);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < p.tokens; t++) unsound += !route(p, f, t, scratch.get());
  }
  if (unsound > 0) throw std::invalid_argument("routing: expected logits without NaN, got NaN");
  routing_sort(f.topk_ids, p.tokens, p.topk, p.experts, f.order);
}

// Attention of a few new tokens over a dense or paged KV cache, split over the keys.
//
// B sequences of S new tokens, H query heads, G key heads, D head_dim (Dp padded to whole vectors).
// A "row" is one query of one of the H / G heads that share a key head, numbered token * (H / G) +
// head. A unit owns the rows of some key heads against one split of the keys and reads those once,
// in blocks; where a sequence has several splits, their sums are joined in order at the end. Splits
// follow from S and a sequence's own length, so its result does not depend on the batch.
#include <omp.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "dispatch.h"
#include "fp8.h"
#include "gemm.h"
#include "rotary.h"
#include "vmath.h"

namespace {
using Problem = DecodeProblem;
using Tensors = DecodeTensors;

constexpr int64_t kBlock = 64;       // keys between two updates of the running maximum
constexpr int64_t kSplit = 512;      // keys of a split times new tokens
constexpr int64_t kFewTokens = 16;   // more new tokens than this are not split over the keys
constexpr int64_t kBlockRows = 128;  // rows of one key head in a unit, if there are that many
constexpr int64_t kSumStep = 32;     // fp32 terms of one score summed in one chain
constexpr float kLowest = -1e30f;    // a running maximum that has seen nothing
constexpr int64_t kTileKeys = 8;     // most keys of one tile of scores
static_assert(kBlock % kTileKeys == 0, "whole tiles");

[[noreturn]] void refuse(const std::string& expected, int64_t got) {
  throw std::invalid_argument("decode_attention: expected " + expected + ", got " +
                              std::to_string(got));
}

struct Sequence {
  int64_t batch, length, total;  // keys before and after the append
};

// Some new tokens of one sequence against keys [lo, hi).
struct Unit {
  int64_t sequence, token, tokens, lo, hi, head_lo, head_hi;
  int64_t part;  // where its sums go, in rows of all parts; -1: it is the only split
};

// Tokens of one sequence whose splits are to be joined.
struct Join {
  int64_t sequence, token, tokens, part, splits;
};

struct Layout {
  const Problem& p;
  int64_t group, padded;
  explicit Layout(const Problem& problem)
      : p(problem),
        group(problem.heads / problem.kv_heads),
        padded(round_up(problem.head_dim, kLanes)) {}
  int64_t rows(int64_t tokens) const { return tokens * group; }
  int64_t row_lanes(int64_t tokens) const { return round_up(rows(tokens), kLanes); }
  // First key that a query at this position sees.
  int64_t first_key(int64_t position) const {
    return p.window_left < 0 ? 0 : std::max<int64_t>(0, position - p.window_left);
  }
  // Elements from a cache's start to the row of a key, head 0.
  int64_t offset(const Strides& s, int64_t batch, int64_t key) const {
    if (p.block_table == nullptr) return batch * s[0] + key * s[1];
    int64_t page = p.block_table[batch * p.table_stride + key / p.page];
    return page * s[0] + key % p.page * s[1];
  }
};

std::vector<Sequence> make_sequences(const Layout& layout) {
  const Problem& p = layout.p;
  int64_t appended = p.append ? p.tokens : 0, longest = p.capacity;
  if (p.cos != nullptr) longest = std::min(longest, p.table_length);
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < p.batches; b++) {
    int64_t length = p.seqlens[b], total = length + appended;
    if (length < -1 || (length >= 0 && total > longest))
      refuse("cache_seqlens of -1 ... " + std::to_string(longest - appended), length);
    if (length < 0) total = -1;
    sequences.push_back({b, length, total});
    if (p.block_table == nullptr || total <= 0) continue;
    int64_t first = layout.first_key(total - p.tokens) / p.page;
    for (int64_t i = first; i <= (total - 1) / p.page; i++) {
      int64_t page = p.block_table[b * p.table_stride + i];
      if (page < 0 || page >= p.pages)
        refuse("pages in 0 ... " + std::to_string(p.pages - 1), page);
    }
  }
  return sequences;
}

// A row as the operator's dtype T holds it, stored in the cache's dtype.
template <typename T, typename C>
void append_row(const float* row, C* out, int64_t dim, const float* scale) {
  if constexpr (std::is_same_v<C, e4m3>) {
    for (int64_t i = 0; i < dim; i++) {
      float x = to_float(from_float<T>(row[i]));
      out[i] = to_e4m3(scale == nullptr ? x : x / *scale);
    }
  } else {
    store_row(row, out, dim);
  }
}

// Sums of rows against one split each: out [Dp], its running maximum and sum.
struct Parts {
  float *out, *maximum, *sum;
};

// Keys are multiplied as floats, or as pairs of bf16 right from the cache where the CPU has dot
// products of those; queries lie in panels of NV vectors of rows: [units of D][NV kLanes].

// scores[key][row] of AR keys and NV vectors of rows
template <int AR, int NV>
inline void multiply(int64_t dim, const float* const* keys, const float* queries,
                     vf (&scores)[AR][NV]) {
  for (int m = 0; m < AR; m++)
    for (int n = 0; n < NV; n++) scores[m][n] = vf{};
  for (int64_t begin = 0; begin < dim; begin += kSumStep) {
    vf part[AR][NV] = {};
    int64_t end = std::min(dim, begin + kSumStep);
    for (int64_t d = begin; d < end; d++) {
      vf q[NV];
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) q[n] = load(queries + (d * NV + n) * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < AR; m++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) part[m][n] += keys[m][d] * q[n];
    }
#pragma GCC unroll 8
    for (int m = 0; m < AR; m++)
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) scores[m][n] += part[m][n];
  }
}
#if defined(__AVX512BF16__)
template <int AR, int NV>
inline void multiply(int64_t dim, const bf16* const* keys, const uint32_t* queries,
                     vf (&scores)[AR][NV]) {
  for (int m = 0; m < AR; m++)
    for (int n = 0; n < NV; n++) scores[m][n] = vf{};
  for (int64_t d = 0; d < dim / 2; d++) {
    __m512bh q[NV];
    for (int n = 0; n < NV; n++) std::memcpy(&q[n], queries + (d * NV + n) * kLanes, sizeof(q[n]));
#pragma GCC unroll 8
    for (int m = 0; m < AR; m++) {
      int32_t pair;
      std::memcpy(&pair, keys[m] + 2 * d, sizeof(pair));
      __m512bh key = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++)
        scores[m][n] = (vf)_mm512_dpbf16_ps((__m512)scores[m][n], key, q[n]);
    }
  }
}
#endif

// out[MR rows][ND vectors] = out * rescale + sum over keys of p[key][row] values[key]
template <int MR, int ND>
inline void add_values(int64_t count, const float* p, int64_t ldp, const float* values,
                       const float* rescale, float* out, int64_t padded) {
  vf acc[MR][ND] = {};
  for (int64_t j = 0; j < count; j++) {
    vf v[ND];
#pragma GCC unroll 4
    for (int n = 0; n < ND; n++) v[n] = load(values + j * padded + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int n = 0; n < ND; n++) acc[m][n] += p[j * ldp + m] * v[n];
  }
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < ND; n++) {
      float* at = out + m * padded + n * kLanes;
      store(at, load(at) * rescale[m] + acc[m][n]);
    }
}

template <int ND>
inline void add_values(int64_t rows, int64_t count, const float* p, int64_t ldp,
                       const float* values, const float* rescale, float* out, int64_t padded) {
  if (rows == 4)
    add_values<4, ND>(count, p, ldp, values, rescale, out, padded);
  else if (rows == 3)
    add_values<3, ND>(count, p, ldp, values, rescale, out, padded);
  else if (rows == 2)
    add_values<2, ND>(count, p, ldp, values, rescale, out, padded);
  else
    add_values<1, ND>(count, p, ldp, values, rescale, out, padded);
}

// Lines of cache rows that a later block reads, asked for a few at a time.
struct Ahead {
  const void* base;
  const int64_t* offsets;
  int64_t count, bytes, size;  // rows, bytes of a row and of an element
  void fetch(int64_t lo, int64_t hi) const {
    for (int64_t j = lo; j < std::min(hi, count); j++)
      for (int64_t i = 0; i < bytes; i += 64)
        __builtin_prefetch(static_cast<const char*>(base) + offsets[j] * size + i, 0, 2);
  }
};

// One thread's work on the units of one call. C is the caches' type, U a float or a pair of bf16.
template <typename T, typename C, typename U>
class Worker {
  // Keys are multiplied where they lie, or widened first.
  static constexpr bool kPairs = std::is_same_v<U, uint32_t>;
  static constexpr bool kDirect = kPairs || std::is_same_v<C, float>;
  using Key = std::conditional_t<kPairs, bf16, float>;

 public:
  Worker(const Layout& layout, const Tensors& tensors, int64_t most_heads, int64_t most_lanes)
      : l_(layout),
        p_(layout.p),
        a_(tensors),
        padded_(layout.padded),
        queries_(most_heads * most_lanes * padded_),
        out_(most_heads * most_lanes * padded_),
        maximum_(most_heads * most_lanes),
        sum_(most_heads * most_lanes),
        keys_(kBlock * padded_),
        values_(kBlock * padded_),
        scores_(kBlock * most_lanes),
        rescale_(most_lanes),
        row_(padded_),
        lo_(most_lanes),
        hi_(most_lanes) {}

  // Sums of the unit's rows go to parts, or if it is the only split its output to the tensor.
  void run(const Sequence& s, const Unit& unit, const Parts& parts) {
    rows_ = l_.rows(unit.tokens);
    lanes_ = l_.row_lanes(unit.tokens);
    int64_t heads = unit.head_hi - unit.head_lo;
    bool alone = unit.part < 0;
    float* out = alone ? out_.get() : parts.out + (unit.part + unit.head_lo * rows_) * padded_;
    std::fill_n(out, heads * rows_ * padded_, 0.0f);
    std::fill_n(maximum_.get(), heads * lanes_, kLowest);
    std::fill_n(sum_.get(), heads * lanes_, 0.0f);
    see(s, unit);
    for (int64_t h = 0; h < heads; h++) load_queries(s, unit, unit.head_lo + h, h);
    locate(s, unit.lo, unit.hi, 0);
    int now = 0;
    for (int64_t first = unit.lo; first < unit.hi; first += kBlock, now ^= 1) {
      locate(s, first + kBlock, unit.hi, now ^ 1);
      for (int64_t h = 0; h < heads; h++)
        block(unit.head_lo + h, h, first, now, out + h * rows_ * padded_);
    }
    for (int64_t h = 0; h < heads; h++)
      for (int64_t r = 0; r < rows_; r++) {
        int64_t at = unit.part + (unit.head_lo + h) * rows_ + r, lane = h * lanes_ + r;
        if (!alone) {
          parts.maximum[at] = maximum_[lane], parts.sum[at] = sum_[lane];
          continue;
        }
        Parts own{out + (h * rows_ + r) * padded_, &maximum_[lane], &sum_[lane]};
        finish_row(s, unit.token, unit.head_lo + h, r, own, 1, 0);
      }
  }

  // Token i of a sequence: its rotated key and its value into the caches.
  void append(const Sequence& s, int64_t i) {
    int64_t at = s.length + i, dim = p_.head_dim;
    const T* k = static_cast<const T*>(a_.k) + s.batch * a_.k_strides[0] + i * a_.k_strides[1];
    const T* v = static_cast<const T*>(a_.v) + s.batch * a_.v_strides[0] + i * a_.v_strides[1];
    C* k_out = static_cast<C*>(a_.k_cache) + l_.offset(a_.k_cache_strides, s.batch, at);
    C* v_out = static_cast<C*>(a_.v_cache) + l_.offset(a_.v_cache_strides, s.batch, at);
    float* row = row_.get();
    for (int64_t g = 0; g < p_.kv_heads; g++) {
      load_row(k + g * a_.k_strides[2], row, dim, padded_);
      if (p_.cos != nullptr)
        rotate_row(row, p_.cos + at * p_.half, p_.sin + at * p_.half, p_.half, 1.0f);
      append_row<T>(row, k_out + g * a_.k_cache_strides[2], dim,
                    p_.k_scale ? p_.k_scale + g : nullptr);
      load_row(v + g * a_.v_strides[2], row, dim, padded_);
      append_row<T>(row, v_out + g * a_.v_cache_strides[2], dim,
                    p_.v_scale ? p_.v_scale + g : nullptr);
    }
  }

  // Joins the splits of one row; `rows` of all heads lie between two splits of it.
  void finish_row(const Sequence& s, int64_t token, int64_t kv_head, int64_t r, const Parts& parts,
                  int64_t splits, int64_t rows) {
    int64_t head = kv_head * l_.group + r % l_.group;
    float sink = p_.sinks == nullptr ? kLowest : p_.sinks[head], highest = std::max(sink, kLowest);
    for (int64_t i = 0; i < splits; i++)
      highest = parts.maximum[i * rows] <= highest ? highest : parts.maximum[i * rows];
    float total = sink > kLowest ? std::exp(sink - highest) : 0.0f;
    float* row = row_.get();
    std::fill_n(row, padded_, 0.0f);
    for (int64_t i = 0; i < splits; i++) {
      float factor = std::exp(parts.maximum[i * rows] - highest);
      total += parts.sum[i * rows] * factor;
      const float* out = parts.out + i * rows * padded_;
      for (int64_t d = 0; d < padded_; d += kLanes)
        store(row + d, load(row + d) + load(out + d) * factor);
    }
    float inverse = total > 0.0f ? 1.0f / total : (total == 0.0f ? 0.0f : total);
    if (p_.v_scale != nullptr) inverse *= p_.v_scale[kv_head];
    for (int64_t d = 0; d < padded_; d += kLanes) store(row + d, load(row + d) * inverse);
    int64_t at = (s.batch * p_.tokens + token + r / l_.group) * p_.heads + head;
    store_row(row, static_cast<T*>(a_.out) + at * p_.head_dim, p_.head_dim);
  }

 private:
  // What each row sees, and what every row does.
  void see(const Sequence& s, const Unit& unit) {
    all_lo_ = unit.lo, all_hi_ = unit.hi;
    for (int64_t r = 0; r < lanes_; r++) {
      int64_t at = s.total - p_.tokens + unit.token + std::min(r, rows_ - 1) / l_.group;
      int64_t lo = std::max(unit.lo, l_.first_key(at)), hi = std::min(unit.hi, at + 1);
      lo_[r] = static_cast<int32_t>(lo), hi_[r] = static_cast<int32_t>(std::max<int64_t>(hi, 0));
      all_lo_ = std::max(all_lo_, lo), all_hi_ = std::min(all_hi_, hi);
    }
  }

  static int panel_vectors(int64_t left) {
    return static_cast<int>(left == 4 ? 2 : std::min<int64_t>(left, 3));
  }

  void load_queries(const Sequence& s, const Unit& unit, int64_t kv_head, int64_t h) {
    const Strides& qs = a_.q_strides;
    int64_t depth = kPairs ? p_.head_dim / 2 : p_.head_dim;
    U* head = queries_.get() + h * lanes_ * padded_;
    std::memset(static_cast<void*>(head), 0, lanes_ * padded_ * sizeof(U));
    for (int64_t v = 0; v < lanes_ / kLanes;) {
      int nv = panel_vectors(lanes_ / kLanes - v);
      U* panel = head + v * kLanes * depth;
      for (int64_t r = v * kLanes; r < std::min(rows_, (v + nv) * kLanes); r++) {
        int64_t token = unit.token + r / l_.group, at = s.total - p_.tokens + token;
        const T* q = static_cast<const T*>(a_.q) + s.batch * qs[0] + token * qs[1] +
                     (kv_head * l_.group + r % l_.group) * qs[2];
        float* row = row_.get();
        load_row(q, row, p_.head_dim, padded_);
        if (p_.cos != nullptr)
          rotate_row(row, p_.cos + at * p_.half, p_.sin + at * p_.half, p_.half, 1.0f);
        U* column = panel + r - v * kLanes;
        for (int64_t d = 0; d < depth; d++) {
          if constexpr (kPairs)
            column[d * nv * kLanes] = from_float<bf16>(row[2 * d]).bits |
                                      static_cast<uint32_t>(from_float<bf16>(row[2 * d + 1]).bits)
                                          << 16;
          else
            column[d * nv * kLanes] = row[d];
        }
      }
      v += nv;
    }
  }

  // Where the keys of the block at `first` lie.
  void locate(const Sequence& s, int64_t first, int64_t hi, int which) {
    count_[which] = std::clamp<int64_t>(hi - first, 0, kBlock);
    for (int64_t j = 0; j < count_[which]; j++) {
      k_offsets_[which][j] = l_.offset(a_.k_cache_strides, s.batch, first + j);
      v_offsets_[which][j] = l_.offset(a_.v_cache_strides, s.batch, first + j);
    }
  }

  // One block of keys of one key head.
  void block(int64_t kv_head, int64_t h, int64_t first, int now, float* out) {
    int64_t count = count_[now], tiles = round_up(count, kTileKeys),
            row_bytes = p_.head_dim * static_cast<int64_t>(sizeof(C));
    const C* k = static_cast<const C*>(a_.k_cache) + kv_head * a_.k_cache_strides[2];
    const C* v = static_cast<const C*>(a_.v_cache) + kv_head * a_.v_cache_strides[2];
    Ahead next_keys{k, k_offsets_[now ^ 1], count_[now ^ 1], row_bytes, sizeof(C)};
    Ahead next_values{v, v_offsets_[now ^ 1], count_[now ^ 1], row_bytes, sizeof(C)};
    const Key* keys[kBlock];
    for (int64_t j = 0; j < tiles; j++) {
      int64_t offset = k_offsets_[now][std::min(j, count - 1)];
      if constexpr (kDirect) {
        keys[j] = reinterpret_cast<const Key*>(k + offset);
      } else {
        keys[j] = keys_.get() + j * padded_;
        load_row(k + offset, keys_.get() + j * padded_, p_.head_dim, padded_);
      }
    }
    float scale = p_.k_scale == nullptr ? p_.scale : p_.scale * p_.k_scale[kv_head];
    const U* queries = queries_.get() + h * lanes_ * padded_;
    for (int64_t i = 0; i < lanes_ / kLanes;) {
      int nv = panel_vectors(lanes_ / kLanes - i);
      const U* panel = queries + i * kLanes * (kPairs ? p_.head_dim / 2 : p_.head_dim);
      Ahead none{};
      const Ahead& ahead = i == 0 ? next_keys : none;
      float *maximum = &maximum_[h * lanes_ + i * kLanes], *sum = &sum_[h * lanes_ + i * kLanes];
      if (nv == 1)
        score<8, 1>(keys, panel, first, count, i, scale, maximum, sum, ahead);
      else if (nv == 2)
        score<4, 2>(keys, panel, first, count, i, scale, maximum, sum, ahead);
      else
        score<4, 3>(keys, panel, first, count, i, scale, maximum, sum, ahead);
      i += nv;
    }
    for (int64_t j = 0; j < count; j++)
      load_row(v + v_offsets_[now][j], values_.get() + j * padded_, p_.head_dim, padded_);
    constexpr int kND = 2;
    int64_t whole = padded_ / (kND * kLanes) * kND * kLanes;
    int64_t passes = (rows_ + 3) / 4 * (padded_ / kLanes), done = 0;
    for (int64_t r = 0; r < rows_; r += 4) {
      int64_t some = std::min<int64_t>(4, rows_ - r);
      for (int64_t d = 0; d < padded_; d += d < whole ? kND * kLanes : kLanes) {
        int vectors = d < whole ? kND : 1;
        int64_t from = done * kBlock / passes;
        done += vectors;
        next_values.fetch(from, done * kBlock / passes);
        if (vectors == kND)
          add_values<kND>(some, count, &scores_[r], lanes_, values_.get() + d, &rescale_[r],
                          out + r * padded_ + d, padded_);
        else
          add_values<1>(some, count, &scores_[r], lanes_, values_.get() + d, &rescale_[r],
                        out + r * padded_ + d, padded_);
      }
    }
  }

  // Probabilities of one panel of rows, relative to their running maximum.
  template <int AR, int NV>
  void score(const Key* const* keys, const U* queries, int64_t first, int64_t count, int64_t vector,
             float scale, float* maximum, float* sum, const Ahead& ahead) {
    float* p = &scores_[vector * kLanes];
    vf highest[NV], before[NV], total[NV];
    for (int n = 0; n < NV; n++) highest[n] = before[n] = load(maximum + n * kLanes);
    for (int64_t j = 0; j < count; j += AR) {
      ahead.fetch(j, j + AR);
      vf scores[AR][NV];
      multiply<AR, NV>(p_.head_dim, keys + j, queries, scores);
#pragma GCC unroll 8
      for (int m = 0; m < AR; m++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) scores[m][n] = rounded(scores[m][n] * scale);
      if (first + j < all_lo_ || first + j + AR > all_hi_) mask(scores, first + j, vector);
#pragma GCC unroll 8
      for (int m = 0; m < AR; m++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) {
          highest[n] = max_or_nan(highest[n], scores[m][n]);
          store(p + (j + m) * lanes_ + n * kLanes, scores[m][n]);
        }
    }
    for (int n = 0; n < NV; n++) {
      vf rescale = exp_small(before[n] - highest[n]);
      total[n] = load(sum + n * kLanes) * rescale;
      store(&rescale_[(vector + n) * kLanes], rescale);
      store(maximum + n * kLanes, highest[n]);
    }
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) {
        float* at = p + j * lanes_ + n * kLanes;
        vf value = exp_small(load(at) - highest[n]);
        total[n] += value;
        store(at, value);
      }
    for (int n = 0; n < NV; n++) store(sum + n * kLanes, total[n]);
  }

  // Scores of keys that a row does not see become minus infinity.
  template <int AR, int NV>
  void mask(vf (&scores)[AR][NV], int64_t key, int64_t vector) const {
    for (int n = 0; n < NV; n++) {
      vi lo, hi;
      std::memcpy(&lo, &lo_[(vector + n) * kLanes], sizeof(lo));
      std::memcpy(&hi, &hi_[(vector + n) * kLanes], sizeof(hi));
      for (int m = 0; m < AR; m++) {
        vi at = vi{} + static_cast<int32_t>(key + m);
        scores[m][n] = (at >= lo) & (at < hi) ? scores[m][n] : splat(-__builtin_inff());
      }
    }
  }

  const Layout& l_;
  const Problem& p_;
  const Tensors& a_;
  int64_t padded_, rows_ = 0, lanes_ = 0, all_lo_ = 0, all_hi_ = 0;
  Buffer<U> queries_;               // [heads][panels]
  Buffer<float> out_;               // [heads][rows][Dp], where there is one split
  Buffer<float> maximum_, sum_;     // [heads][lanes]
  Buffer<float> keys_, values_;     // [kBlock][Dp]
  Buffer<float> scores_, rescale_;  // [kBlock][lanes], [lanes]
  Buffer<float> row_;               // [Dp]
  Buffer<int32_t> lo_, hi_;         // [lanes]
  int64_t count_[2], k_offsets_[2][kBlock], v_offsets_[2][kBlock];
};

// The units of all sequences, and what is to be joined after; returns the rows of all parts.
int64_t make_units(const Layout& layout, const std::vector<Sequence>& sequences,
                   std::vector<Unit>& units, std::vector<Join>& joins) {
  const Problem& p = layout.p;
  bool few = p.tokens <= kFewTokens;
  int64_t most = few ? p.tokens : std::max(kFewTokens, kBlockRows / layout.group), part = 0;
  for (const Sequence& s : sequences) {
    if (s.length < 0) continue;
    for (int64_t token = 0; token < p.tokens; token += most) {
      int64_t tokens = std::min(most, p.tokens - token), at = s.total - p.tokens + token;
      int64_t lo = layout.first_key(std::max<int64_t>(at, 0));
      int64_t hi = std::max(at + tokens, lo), length = few ? kSplit * p.tokens : hi - lo;
      int64_t splits = hi == lo ? 1 : (hi - lo + length - 1) / length;
      if (splits > 1) joins.push_back({s.batch, token, tokens, part, splits});
      for (int64_t i = 0; i < splits; i++) {
        int64_t from = lo + i * length;
        units.push_back({s.batch, token, tokens, from, std::min(from + length, hi), 0, p.kv_heads,
                         splits > 1 ? part : -1});
        if (splits > 1) part += layout.rows(tokens) * p.kv_heads;
      }
    }
  }
  return part;
}

// Divides the units by key heads until every thread has several.
int64_t divide_heads(const Layout& layout, std::vector<Unit>& units) {
  int64_t kv_heads = layout.p.kv_heads, wanted = 4 * omp_get_max_threads();
  int64_t each = std::max<int64_t>(
      1, kv_heads * static_cast<int64_t>(units.size()) / std::max<int64_t>(wanted, 1));
  each = std::min(each, kv_heads);
  if (layout.rows(layout.p.tokens) > kBlockRows / 4) each = 1;
  std::vector<Unit> divided;
  for (const Unit& unit : units)
    for (int64_t g = 0; g < kv_heads; g += each) {
      divided.push_back(unit);
      divided.back().head_lo = g, divided.back().head_hi = std::min(g + each, kv_heads);
    }
  units.swap(divided);
  return each;
}

template <typename T, typename C, typename U>
void decode(const Layout& layout, const Tensors& a) {
  const Problem& p = layout.p;
  std::vector<Sequence> sequences = make_sequences(layout);
  std::vector<Unit> units;
  std::vector<Join> joins;
  int64_t part_rows = make_units(layout, sequences, units, joins);
  int64_t heads = divide_heads(layout, units), most_lanes = 0, row_size = p.heads * p.head_dim;
  for (const Unit& unit : units) most_lanes = std::max(most_lanes, layout.row_lanes(unit.tokens));
  Buffer<float> out(part_rows * layout.padded), maximum(part_rows), sum(part_rows);
  Parts parts{out.get(), maximum.get(), sum.get()};
#pragma omp parallel
  {
    Worker<T, C, U> worker(layout, a, heads, most_lanes);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.batches * p.tokens; i++) {
      const Sequence& s = sequences[i / p.tokens];
      if (s.length < 0)
        std::memset(static_cast<T*>(a.out) + i * row_size, 0, row_size * sizeof(T));
      else if (p.append)
        worker.append(s, i % p.tokens);
    }
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < units.size(); i++)
      worker.run(sequences[units[i].sequence], units[i], parts);
    for (const Join& join : joins) {
      int64_t rows = layout.rows(join.tokens);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < rows * p.kv_heads; i++) {
        int64_t at = join.part + i;
        Parts own{parts.out + at * layout.padded, parts.maximum + at, parts.sum + at};
        worker.finish_row(sequences[join.sequence], join.token, i / rows, i % rows, own,
                          join.splits, rows * p.kv_heads);
      }
    }
  }
}
}  // namespace

void decode_attention(const DecodeProblem& problem, DType dtype, bool fp8, const DecodeTensors& a) {
  Layout layout(problem);
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    if (fp8)
      decode<T, e4m3, float>(layout, a);
    else if (problem.head_dim % units_per<PanelUnit<T>> == 0)
      decode<T, T, PanelUnit<T>>(layout, a);
    else
      decode<T, T, float>(layout, a);
  });
}

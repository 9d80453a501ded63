// Attention of a few new tokens over a dense or paged KV cache, split over the keys.
//
// B sequences of S new tokens, H query heads, G key heads, D head_dim (Dp padded to whole vectors).
// A "row" is one query of one of the H / G heads that share a key head, numbered token * (H / G) +
// head. A unit owns the rows of some key heads against one split of the keys and reads those once,
// in blocks; where a sequence has several splits, their sums are joined in order at the end. Splits
// follow from S and a sequence's own length, so its result does not depend on the batch.
//
// The inner loops over a block are in decode_attention.h.
#include "decode_attention.h"

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
using namespace decoding;
using Problem = DecodeProblem;
using Tensors = DecodeTensors;

constexpr int64_t kBlock = 32;       // keys between two updates of the running maximum
constexpr int64_t kSplit = 512;      // keys of a split times new tokens
constexpr int64_t kUnitKeys = 512;   // of one head: less is not worth a unit of its own
constexpr int64_t kFewTokens = 16;   // more new tokens than this are not split over the keys
constexpr int64_t kBlockRows = 128;  // rows of one key head in a unit, if there are that many
constexpr int64_t kSumStep = 32;     // fp32 terms of one score summed in one chain
constexpr int64_t kStride = 272;     // of a copied row: D is at most 256
constexpr float kLowest = -1e30f;    // a running maximum that has seen nothing
static_assert(kBlock % kTileKeys == 0 && kTileKeys % 4 == 0, "whole tiles");

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

// One thread's work on the units of one call. C is the caches' type, U a float or a pair of bf16.
template <typename T, typename C, typename U>
class Worker {
 public:
  Worker(const Layout& layout, const Tensors& tensors, int64_t most_heads, int64_t most_rows)
      : l_(layout),
        p_(layout.p),
        a_(tensors),
        padded_(layout.padded),
        depth_((layout.p.head_dim + units_per<U> - 1) / units_per<U>),
        most_slots_(round_up(most_rows, kChunk)),
        copy_keys_(!kSame || layout.p.head_dim % units_per<U> != 0),
        copy_values_(!kSame || layout.p.head_dim % (kTileVectors * kLanes) != 0),
        memory_(place_arrays(0, most_heads, most_rows)) {
    place_arrays(reinterpret_cast<uintptr_t>(memory_.get()), most_heads, most_rows);
  }

  // Sums of the unit's rows go to parts, or if it is the only split its output to the tensor.
  void run(const Sequence& s, const Unit& unit, const Parts& parts) {
    rows_ = l_.rows(unit.tokens), slots_ = round_up(rows_, kChunk);
    int64_t heads = unit.head_hi - unit.head_lo;
    bool alone = unit.part < 0;
    float* out = alone ? out_ : parts.out + (unit.part + unit.head_lo * rows_) * padded_;
    std::fill_n(out, heads * rows_ * padded_, 0.0f);
    std::fill_n(maximum_, heads * slots_, kLowest);
    std::fill_n(sum_, heads * slots_, 0.0f);
    see(s, unit);
    for (int64_t h = 0; h < heads; h++) load_queries(s, unit, unit.head_lo + h, h);
    locate(s, unit, unit.lo, 0);
    int now = 0;
    for (int64_t first = unit.lo; first < unit.hi; first += kBlock, now ^= 1) {
      int64_t next = locate(s, unit, first + kBlock, now ^ 1);
      int64_t count = std::min(kBlock, unit.hi - first);
      k_ahead_.start(k_rows_[now ^ 1], next, heads, a_.k_cache_strides[2] * sizeof(C), run_bytes());
      v_ahead_.start(v_rows_[now ^ 1], next, heads, a_.v_cache_strides[2] * sizeof(C), run_bytes());
      for (int64_t h = 0; h < heads; h++) {
        take_head(h, unit.head_lo + h, count, now);
        for (int64_t r = 0; r < rows_; r += kChunk) {
          int64_t slot = h * slots_ + r;
          score(&queries_[slot * depth_], count);
          soften(slot, r, first, count);
          add(std::min<int64_t>(kChunk, rows_ - r), count, out + (h * rows_ + r) * padded_);
        }
      }
    }
    for (int64_t i = 0; i < heads * rows_; i++) {
      int64_t h = i / rows_, r = i % rows_, kv_head = unit.head_lo + h, slot = h * slots_ + r;
      if (alone) {
        finish_row(s, unit.token, kv_head, r, {out + i * padded_, &maximum_[slot], &sum_[slot]}, 1,
                   0);
      } else {
        int64_t at = unit.part + kv_head * rows_ + r;
        parts.maximum[at] = maximum_[slot], parts.sum[at] = sum_[slot];
      }
    }
  }

  // Token i of a sequence: its rotated key and its value into the caches.
  void append(const Sequence& s, int64_t i) {
    int64_t at = s.length + i, dim = p_.head_dim;
    const T* k = static_cast<const T*>(a_.k) + s.batch * a_.k_strides[0] + i * a_.k_strides[1];
    const T* v = static_cast<const T*>(a_.v) + s.batch * a_.v_strides[0] + i * a_.v_strides[1];
    C* k_out = static_cast<C*>(a_.k_cache) + l_.offset(a_.k_cache_strides, s.batch, at);
    C* v_out = static_cast<C*>(a_.v_cache) + l_.offset(a_.v_cache_strides, s.batch, at);
    float* row = row_;
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
    float* row = row_;
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
  static constexpr bool kSame = sizeof(C) * units_per<U> == sizeof(U);
  int64_t run_bytes() const { return p_.head_dim * sizeof(C); }

  // One allocation holds all arrays: a dozen of them show in a short call. Returns their bytes.
  int64_t place_arrays(uintptr_t base, int64_t heads, int64_t rows) {
    int64_t used = 0;
    auto place = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::decay_t<decltype(array)>>(base + used);
      used += round_up(count * static_cast<int64_t>(sizeof(*array)), 64);
    };
    place(queries_, heads * most_slots_ * depth_);
    place(out_, heads * rows * padded_);
    place(maximum_, heads * most_slots_);
    place(sum_, heads * most_slots_);
    place(keys_, copy_keys_ ? kBlock * kStride : 0);
    place(values_, copy_values_ ? kBlock * kStride : 0);
    place(scores_, kBlock * kChunk);
    place(probabilities_, kBlock * kChunk);
    place(row_, padded_);
    place(lo_, most_slots_);
    place(hi_, most_slots_);
    return used;
  }

  // What each row sees, and what every row does.
  void see(const Sequence& s, const Unit& unit) {
    all_lo_ = unit.lo, all_hi_ = unit.hi;
    for (int64_t r = 0; r < slots_; r++) {
      int64_t token = unit.token + std::min(r, rows_ - 1) / l_.group;
      int64_t at = s.total - p_.tokens + token;
      int64_t lo = std::max(unit.lo, l_.first_key(at)), hi = std::min(unit.hi, at + 1);
      lo_[r] = static_cast<int32_t>(lo), hi_[r] = static_cast<int32_t>(std::max<int64_t>(hi, 0));
      all_lo_ = std::max(all_lo_, lo), all_hi_ = std::min(all_hi_, hi);
    }
  }

  // [chunks][units of D][kChunk]
  void load_queries(const Sequence& s, const Unit& unit, int64_t kv_head, int64_t h) {
    const Strides& qs = a_.q_strides;
    U* queries = &queries_[h * slots_ * depth_];
    float* row = row_;
    for (int64_t r = 0; r < slots_; r++) {
      int64_t token = unit.token + r / l_.group, at = s.total - p_.tokens + token;
      if (r < rows_) {
        const T* q = static_cast<const T*>(a_.q) + s.batch * qs[0] + token * qs[1] +
                     (kv_head * l_.group + r % l_.group) * qs[2];
        load_row(q, row, p_.head_dim, padded_);
        if (p_.cos != nullptr)
          rotate_row(row, p_.cos + at * p_.half, p_.sin + at * p_.half, p_.half, 1.0f);
      } else {
        std::fill_n(row, padded_, 0.0f);
      }
      const U* units = to_units(row, probabilities_, padded_);
      U* out = queries + r / kChunk * kChunk * depth_ + r % kChunk;
      for (int64_t d = 0; d < depth_; d++) out[d * kChunk] = units[d];
    }
  }

  // Where the keys and values of the block at `first` lie, the unit's first head; returns how many.
  int64_t locate(const Sequence& s, const Unit& unit, int64_t first, int which) {
    const C* k = static_cast<const C*>(a_.k_cache) + unit.head_lo * a_.k_cache_strides[2];
    const C* v = static_cast<const C*>(a_.v_cache) + unit.head_lo * a_.v_cache_strides[2];
    int64_t count = std::clamp<int64_t>(unit.hi - first, 0, kBlock);
    for (int64_t j = 0; j < count; j++) {
      k_rows_[which][j] = k + l_.offset(a_.k_cache_strides, s.batch, first + j);
      v_rows_[which][j] = v + l_.offset(a_.v_cache_strides, s.batch, first + j);
    }
    return count;
  }

  // Points to one head's rows of the block, or to copies of them; those past `count` are zeros.
  void take_head(int64_t h, int64_t kv_head, int64_t count, int now) {
    scale_ = p_.k_scale == nullptr ? p_.scale : p_.scale * p_.k_scale[kv_head];
    int64_t kh = h * a_.k_cache_strides[2], vh = h * a_.v_cache_strides[2];
    int64_t keys = round_up(count, kTileKeys);
    for (int64_t j = 0; j < count; j++) {
      head_k_[j] = static_cast<const C*>(k_rows_[now][j]) + kh;
      head_v_[j] = static_cast<const C*>(v_rows_[now][j]) + vh;
    }
    for (int64_t j = count; j < keys; j++) head_k_[j] = head_v_[j] = kZeros<C>;
    for (int64_t j = 0; copy_values_ && j < keys; j += units_per<U>)
      copy_values(static_cast<const C*>(head_v_[j]),
                  static_cast<const C*>(head_v_[j + units_per<U> - 1]),
                  &values_[j / units_per<U> * kStride], p_.head_dim, padded_);
    for (int64_t j = 0; copy_keys_ && j < keys; j++) {
      copy_key(static_cast<const C*>(head_k_[j]), &keys_[j * kStride], p_.head_dim, padded_);
      head_k_[j] = &keys_[j * kStride];
    }
  }

  // Scores [kBlock][kChunk] of a chunk of rows, unscaled, kTileKeys keys at a time.
  void score(const U* queries, int64_t count) {
    int64_t step = units_per<U> == 1 ? kSumStep : depth_;
    Ahead ahead = k_ahead_;
    for (int64_t j = 0; j < count; j += kTileKeys) {
      const U* keys[kTileKeys];
      for (int k = 0; k < kTileKeys; k++) keys[k] = static_cast<const U*>(head_k_[j + k]);
      vr sum[kTileKeys] = {};
      for (int64_t d0 = 0; d0 < depth_; d0 += step) {
        vr part[kTileKeys] = {};
        int64_t end = std::min(depth_, d0 + step), d = d0;
        auto one = [&](int64_t at) {
#pragma GCC unroll 16
          for (int k = 0; k < kTileKeys; k++)
            part[k] = add_key(part[k], queries + at * kChunk, keys[k][at]);
        };
        for (; d + 4 <= end; d += 4) {
          ahead.ask();
#pragma GCC unroll 4
          for (int i = 0; i < 4; i++) one(d + i);
        }
        for (; d < end; d++) one(d);
#pragma GCC unroll 16
        for (int k = 0; k < kTileKeys; k++) sum[k] += part[k];
      }
      std::memcpy(&scores_[j * kChunk], sum, sizeof(sum));
    }
    k_ahead_ = ahead;
  }

  // Scores to probabilities, relative to each row's running maximum; keys that a row does not see
  // get none.
  void soften(int64_t slot, int64_t r, int64_t first, int64_t count) {
    float *maximum = &maximum_[slot], *scores = scores_;
    int64_t keys = round_up(count, kTileKeys), vectors = keys * kChunk / kLanes;
    bool masked = first < all_lo_ || first + keys > all_hi_;
    vf highest[kPatterns], before[kPatterns], total[kPatterns] = {};
    for (int i = 0; i < kPatterns; i++) highest[i] = before[i] = row_lanes(maximum, i);
    for (int64_t n = 0; n < vectors; n++) {
      vf score = rounded(load(scores + n * kLanes) * scale_);
      if (masked) score = mask(score, r, first, n);
      store(scores + n * kLanes, score);
      highest[n % kPatterns] = max_or_nan(highest[n % kPatterns], score);
    }
    for (int i = 0; i < kPatterns; i++)
      highest[i] = across_keys(highest[i], [](vf a, vf b) { return max_or_nan(a, b); });
    for (int64_t n = 0; n < vectors; n += units_per<U>) {
      vf p[units_per<U>];
      for (int i = 0; i < units_per<U>; i++) {
        p[i] = exp_small(load(scores + (n + i) * kLanes) - highest[(n + i) % kPatterns]);
        total[(n + i) % kPatterns] += p[i];
      }
      put(&probabilities_[n / units_per<U> * kLanes], p);
    }
    for (int i = 0; i < kPatterns; i++) {
      vf factor = exp_small(before[i] - highest[i]);
      total[i] = across_keys(total[i], [](vf a, vf b) { return a + b; });
      vf sum = row_lanes(&sum_[slot], i) * factor + total[i];
      int n = std::min(kLanes, kChunk);
      std::memcpy(&sum_[slot + i * kLanes], &sum, n * sizeof(float));
      std::memcpy(maximum + i * kLanes, &highest[i], n * sizeof(float));
      std::memcpy(rescale_ + i * kLanes, &factor, n * sizeof(float));
    }
  }
  vf mask(vf score, int64_t r, int64_t first, int64_t n) {
    vi at, lo, hi;
    for (int i = 0; i < kLanes; i++) {
      int64_t lane = n * kLanes + i;
      at[i] = static_cast<int32_t>(first + lane / kChunk);
      lo[i] = lo_[r + lane % kChunk], hi[i] = hi_[r + lane % kChunk];
    }
    return (at >= lo) & (at < hi) ? score : splat(-__builtin_inff());
  }
  static void put(float* out, const vf (&p)[1]) { store(out, p[0]); }
#if defined(__AVX512BF16__)
  static void put(uint32_t* out, const vf (&p)[2]) {
    alignas(64) static constexpr uint16_t kKeyPairs[32] = {
        0,  8,  1,  9,  2,  10, 3,  11, 4,  12, 5,  13, 6,  14, 7,  15,
        16, 24, 17, 25, 18, 26, 19, 27, 20, 28, 21, 29, 22, 30, 23, 31};
    __m512i four = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0]);
    four = _mm512_permutexvar_epi16(_mm512_load_si512(kKeyPairs), four);
    std::memcpy(out, &four, sizeof(four));
  }
#endif

  // Values times probabilities into out [rows][Dp].
  void add(int64_t rows, int64_t count, float* out) {
    int64_t depth = (count + units_per<U> - 1) / units_per<U>;
    Ahead ahead = v_ahead_;
    for_tiles(rows, [&](int64_t r, auto tile) {
      const U* p = &probabilities_[r];
      int64_t d = 0;
      for (; d + kTileVectors * kLanes <= padded_; d += kTileVectors * kLanes) {
        auto copies = [&](int64_t j, auto& v) {
          ahead.ask();
          for (int n = 0; n < kTileVectors; n++)
            v[n] = load_units(&values_[j * kStride + d + n * kLanes]);
        };
        auto rows_themselves = [&](int64_t j, auto& v) {
          ahead.ask();
          int64_t key = j * units_per<U>;
          load_values(static_cast<const Value*>(head_v_[key]) + d,
                      static_cast<const Value*>(head_v_[key + units_per<U> - 1]) + d, v);
        };
        if (copy_values_)
          add_values<tile, kTileVectors>(depth, p, copies, rescale_ + r, out + r * padded_ + d,
                                         padded_);
        else
          add_values<tile, kTileVectors>(depth, p, rows_themselves, rescale_ + r,
                                         out + r * padded_ + d, padded_);
      }
      for (; d < padded_; d += kLanes) {
        auto copies = [&](int64_t j, auto& v) { v[0] = load_units(&values_[j * kStride + d]); };
        add_values<tile, 1>(depth, p, copies, rescale_ + r, out + r * padded_ + d, padded_);
      }
    });
    v_ahead_ = ahead;
  }

  using Value = std::conditional_t<units_per<U> == 1, float, bf16>;  // where values are not copied
  const Layout& l_;
  const Problem& p_;
  const Tensors& a_;
  int64_t padded_, depth_, most_slots_;
  bool copy_keys_, copy_values_;
  int64_t rows_ = 0, slots_ = 0, all_lo_ = 0, all_hi_ = 0;
  U* queries_;             // [heads][chunks][units of D][kChunk]
  float* out_;             // [heads][rows][Dp], where there is one split
  float *maximum_, *sum_;  // [heads][slots]
  U *keys_, *values_;      // copied rows [kBlock][kStride], [units of kBlock][kStride]
  float* scores_;          // [kBlock][kChunk]
  U* probabilities_;       // [units of kBlock][kChunk]
  float* row_;             // [Dp]
  int32_t *lo_, *hi_;      // [slots]
  Buffer<char> memory_;
  float rescale_[kChunk] = {}, scale_ = 0;
  const void *k_rows_[2][kBlock] = {}, *v_rows_[2][kBlock] = {};
  const void *head_k_[kBlock] = {}, *head_v_[kBlock] = {};
  Ahead k_ahead_, v_ahead_;
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

// Divides the units by key heads until every thread has several, if they are worth it.
int64_t divide_heads(const Layout& layout, std::vector<Unit>& units) {
  int64_t kv_heads = layout.p.kv_heads, threads = omp_get_max_threads(), keys = 0;
  for (const Unit& unit : units) keys += unit.hi - unit.lo;
  int64_t wanted = std::clamp(keys * kv_heads / kUnitKeys, threads, 4 * threads);
  int64_t each = std::max<int64_t>(1, kv_heads * static_cast<int64_t>(units.size()) / wanted);
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
  int64_t heads = divide_heads(layout, units), most_rows = 0, row_size = p.heads * p.head_dim;
  for (const Unit& unit : units) most_rows = std::max(most_rows, layout.rows(unit.tokens));
  Buffer<float> out(part_rows * layout.padded), maximum(part_rows), sum(part_rows);
  Parts parts{out.get(), maximum.get(), sum.get()};
  bool prepared = p.append;
  for (const Sequence& s : sequences) prepared |= s.length < 0;
#pragma omp parallel
  {
    Worker<T, C, U> worker(layout, a, heads, most_rows);
    if (prepared) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.batches * p.tokens; i++) {
        const Sequence& s = sequences[i / p.tokens];
        if (s.length < 0)
          std::memset(static_cast<T*>(a.out) + i * row_size, 0, row_size * sizeof(T));
        else if (p.append)
          worker.append(s, i % p.tokens);
      }
    }
#pragma omp for schedule(dynamic) nowait
    for (size_t i = 0; i < units.size(); i++)
      worker.run(sequences[units[i].sequence], units[i], parts);
    if (!joins.empty()) {
#pragma omp barrier
    }
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
    else
      decode<T, T, PanelUnit<T>>(layout, a);
  });
}

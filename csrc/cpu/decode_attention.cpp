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

constexpr int64_t kBlock = 32;       // keys between two updates of the running maximum
constexpr int64_t kSplit = 512;      // keys of a split times new tokens
constexpr int64_t kFewTokens = 16;   // more new tokens than this are not split over the keys
constexpr int64_t kBlockRows = 128;  // rows of one key head in a unit, if there are that many
constexpr int64_t kSumStep = 32;     // fp32 terms of one score summed in one chain
constexpr int64_t kStride = 272;     // of a row of values: D is at most 256
constexpr int kTileRows = kLanes > 8 ? 8 : 4, kTileVectors = 2;
constexpr float kLowest = -1e30f;  // a running maximum that has seen nothing
static_assert(kBlock % (kTileVectors * kLanes) == 0, "whole tiles");

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

// Operands are held in units of U (gemm.h): floats, or pairs of bf16 that follow each other along
// the dimension that a product sums over. A vector of them, and the sum with a times it:
inline vf load_units(const float* p) { return load(p); }
inline vf add_product(vf sum, float a, vf b) { return sum + a * b; }
#if defined(__AVX512BF16__)
inline __m512bh load_units(const uint32_t* p) {
  __m512bh v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline vf add_product(vf sum, uint32_t a, __m512bh b) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), b);
}
#endif

// kLanes units of one row of the cache, of which it has n
template <typename U, typename C>
inline vf load_key(const C* p, int64_t n) {
  if constexpr (units_per<U> == 1) {
    return n >= kLanes ? load(p) : load_partial(p, static_cast<int>(n));
  } else {
    float lanes[kLanes] = {};
    if (n >= 2 * kLanes)
      std::memcpy(lanes, p, sizeof(lanes));
    else
      std::memcpy(lanes, p, n * sizeof(C));
    return load(lanes);
  }
}

// A row of values, or two that follow each other: out [padded] of units
template <typename C>
inline void load_values(const C* in, const C*, float* out, int64_t n, int64_t padded) {
  load_row(in, out, n, padded);
}
#if defined(__AVX512BF16__)
alignas(64) constexpr uint16_t kPairs[64] = {
    // a0 b0 a1 b1 ...
    0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
    11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
    22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
inline void load_values(const bf16* low, const bf16* high, uint32_t* out, int64_t n,
                        int64_t padded) {
  bf16 row[2][2 * kLanes] = {};
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    __m512i halves[2] = {};
    for (int half = 0; half < 2; half++) {
      const bf16* in = half == 0 ? low : high;
      if (in == nullptr) continue;
      if (i + 2 * kLanes > n) {
        std::memcpy(row[half], in + i, (n - i) * sizeof(bf16));
        halves[half] = _mm512_loadu_si512(row[half]);
      } else {
        halves[half] = _mm512_loadu_si512(in + i);
      }
    }
    __m512i first = _mm512_permutex2var_epi16(halves[0], _mm512_loadu_si512(kPairs), halves[1]);
    __m512i second =
        _mm512_permutex2var_epi16(halves[0], _mm512_loadu_si512(kPairs + 32), halves[1]);
    std::memcpy(out + i, &first, sizeof(first));
    if (i + kLanes < padded) std::memcpy(out + i + kLanes, &second, sizeof(second));
  }
}
#endif

inline float reduce_max(vf v) {
  for (int width = kLanes; width > 1; width /= 2) v = max_or_nan(even_lanes(v, v), odd_lanes(v, v));
  return v[0];
}

// The next block's rows of all heads, one head's part after the other as they lie in memory, asked
// for bit by bit while this block is worked on: memory likes that better than one head at a time.
struct Ahead {
  const char* base;
  const int64_t* offsets;  // of rows, in bytes
  int64_t heads, head_bytes, row, head;
  Ahead(const void* cache, const int64_t* rows, int64_t count, int64_t bytes, int64_t part)
      : base(static_cast<const char*>(cache)),
        offsets(rows),
        heads(count),
        head_bytes(bytes),
        row(part / count),
        head(part % count) {}
  const char* next() {
    const char* at = base + offsets[row] + head * head_bytes;
    if (++head == heads) head = 0, row++;
    return at;
  }
};
inline void fetch(const char* part, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 64) __builtin_prefetch(part + i);
}

// out[MR rows][NV vectors] = out * rescale + sum over keys of p[row][key] values[key]; depth and ld
// in units
template <int MR, int NV, typename U, typename Values>
inline void add_values(int64_t depth, const U* p, const Values& values, const float* rescale,
                       float* out, int64_t padded) {
  vf acc[MR][NV] = {};
  for (int64_t j = 0; j < depth; j++) {
    const U* row = values(j);
    decltype(load_units(row)) v[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) v[n] = load_units(row + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) acc[m][n] = add_product(acc[m][n], p[m * kBlock + j], v[n]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) {
      float* at = out + m * padded + n * kLanes;
      store(at, load(at) * rescale[m] + acc[m][n]);
    }
}

// f(row, tag) for tiles of rows, as many as the tag's value says
template <typename F>
inline void for_tiles(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows) f(r, std::integral_constant<int, kTileRows>{});
  if constexpr (kTileRows > 4)
    for (; r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>{});
  for (; r + 2 <= rows; r += 2) f(r, std::integral_constant<int, 2>{});
  if (r < rows) f(r, std::integral_constant<int, 1>{});
}

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
        queries_(most_heads * most_rows * depth_),
        out_(most_heads * most_rows * padded_),
        maximum_(most_heads * most_rows),
        sum_(most_heads * most_rows * kLanes),
        keys_(round_up(depth_, kLanes) * kBlock),
        values_(kBlock * kStride),
        scores_(most_rows * kBlock),
        probabilities_(most_rows * kBlock),
        rescale_(round_up(most_rows, kLanes)),
        row_(padded_ + 1),
        lo_(most_rows),
        hi_(most_rows) {}

  // Sums of the unit's rows go to parts, or if it is the only split its output to the tensor.
  void run(const Sequence& s, const Unit& unit, const Parts& parts) {
    rows_ = l_.rows(unit.tokens);
    int64_t heads = heads_ = unit.head_hi - unit.head_lo;
    bool alone = unit.part < 0;
    float* out = alone ? out_.get() : parts.out + (unit.part + unit.head_lo * rows_) * padded_;
    std::fill_n(out, heads * rows_ * padded_, 0.0f);
    std::fill_n(maximum_.get(), heads * rows_, kLowest);
    std::fill_n(sum_.get(), heads * rows_ * kLanes, 0.0f);
    see(s, unit);
    for (int64_t h = 0; h < heads; h++) load_queries(s, unit, unit.head_lo + h, h);
    locate(s, unit.lo, unit.hi, 0);
    int now = 0;
    for (int64_t first = unit.lo; first < unit.hi; first += kBlock, now ^= 1) {
      locate(s, first + kBlock, unit.hi, now ^ 1);
      int64_t count = std::min(kBlock, unit.hi - first);
      for (int64_t h = 0; h < heads; h++) {
        score(unit.head_lo + h, h, first, count, now);
        soften(h, count);
        add(unit.head_lo + h, h, count, now, out + h * rows_ * padded_);
      }
    }
    for (int64_t i = 0; i < heads * rows_; i++) {
      int64_t kv_head = unit.head_lo + i / rows_, r = i % rows_;
      float sum = reduce_add(load(&sum_[i * kLanes]));
      if (alone) {
        finish_row(s, unit.token, kv_head, r, {out + i * padded_, &maximum_[i], &sum}, 1, 0);
      } else {
        int64_t at = unit.part + kv_head * rows_ + r;
        parts.maximum[at] = maximum_[i], parts.sum[at] = sum;
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
    for (int64_t r = 0; r < rows_; r++) {
      int64_t at = s.total - p_.tokens + unit.token + r / l_.group;
      int64_t lo = std::max(unit.lo, l_.first_key(at)), hi = std::min(unit.hi, at + 1);
      lo_[r] = static_cast<int32_t>(lo), hi_[r] = static_cast<int32_t>(std::max<int64_t>(hi, 0));
      all_lo_ = std::max(all_lo_, lo), all_hi_ = std::min(all_hi_, hi);
    }
  }

  // [units of D][rows]
  void load_queries(const Sequence& s, const Unit& unit, int64_t kv_head, int64_t h) {
    const Strides& qs = a_.q_strides;
    U* queries = queries_.get() + h * rows_ * depth_;
    float* row = row_.get();
    for (int64_t r = 0; r < rows_; r++) {
      int64_t token = unit.token + r / l_.group, at = s.total - p_.tokens + token;
      const T* q = static_cast<const T*>(a_.q) + s.batch * qs[0] + token * qs[1] +
                   (kv_head * l_.group + r % l_.group) * qs[2];
      load_row(q, row, p_.head_dim, padded_);
      if (p_.cos != nullptr)
        rotate_row(row, p_.cos + at * p_.half, p_.sin + at * p_.half, p_.half, 1.0f);
      row[p_.head_dim] = 0.0f;  // the other half of an odd pair
      for (int64_t d = 0; d < depth_; d++)
        queries[d * rows_ + r] = make_unit<U>(row + d * units_per<U>);
    }
  }

  // Where the keys of the block at `first` lie, in bytes.
  void locate(const Sequence& s, int64_t first, int64_t hi, int which) {
    for (int64_t j = 0; j < std::min(kBlock, hi - first); j++) {
      k_offsets_[which][j] = l_.offset(a_.k_cache_strides, s.batch, first + j) * sizeof(C);
      v_offsets_[which][j] = l_.offset(a_.v_cache_strides, s.batch, first + j) * sizeof(C);
    }
  }

  // Scores [rows][kBlock] of one block of keys, kTileVectors vectors of keys at a time.
  void score(int64_t kv_head, int64_t h, int64_t first, int64_t count, int now) {
    const C* k = static_cast<const C*>(a_.k_cache) + kv_head * a_.k_cache_strides[2];
    float scale = p_.k_scale == nullptr ? p_.scale : p_.scale * p_.k_scale[kv_head];
    const U* queries = queries_.get() + h * rows_ * depth_;
    for (int64_t j = 0; j < count;) {
      int64_t left = (count - j + kLanes - 1) / kLanes;
      load_keys(k, h, j, std::min(count, j + kLanes), now);
      if (left > 1) load_keys(k, h, j + kLanes, std::min(count, j + 2 * kLanes), now);
      for_tiles(rows_, [&](int64_t r, auto tile) {
        if (left > 1)
          multiply<tile, 2>(queries + r, j, &scores_[r * kBlock + j], scale);
        else
          multiply<tile, 1>(queries + r, j, &scores_[r * kBlock + j], scale);
      });
      j += left > 1 ? 2 * kLanes : kLanes;
    }
    if (first < all_lo_ || first + round_up(count, kLanes) > all_hi_) mask(first, count);
  }

  // Keys [lo, hi) of a block, at most kLanes of them, to [units of D][kBlock].
  void load_keys(const C* k, int64_t h, int64_t lo, int64_t hi, int now) {
    int64_t head_bytes = a_.k_cache_strides[2] * sizeof(C);
    const char* base = reinterpret_cast<const char*>(k);
    Ahead ahead(base - h * head_bytes, k_offsets_[now ^ 1], heads_, head_bytes, h * kBlock + lo);
    const char* parts[kLanes];
    for (int i = 0; i < kLanes; i++) parts[i] = ahead.next();
    for (int64_t d = 0; d < depth_; d += kLanes) {
      int64_t element = d * units_per<U>, left = p_.head_dim - element;
      vf r[kLanes];
      for (int64_t j = lo; j < hi; j++) {
        r[j - lo] =
            load_key<U>(reinterpret_cast<const C*>(base + k_offsets_[now][j]) + element, left);
        fetch(parts[j - lo], element * sizeof(C), (element + kLanes * units_per<U>)*sizeof(C));
      }
      for (int64_t j = hi; j < lo + kLanes; j++) r[j - lo] = vf{};
      transpose(r);
      for (int i = 0; i < kLanes; i++) {
        U* at = keys_.get() + (d + i) * kBlock + lo;
        std::memcpy(at, &r[i], sizeof(vf));
      }
    }
  }

  template <int MR, int NV>
  void multiply(const U* queries, int64_t j, float* scores, float scale) {
    int64_t step = units_per<U> == 1 ? kSumStep : depth_;
    vf sum[MR][NV] = {};
    for (int64_t d = 0; d < depth_; d += step) {
      vf part[MR][NV] = {};
      micro_kernel(std::min(step, depth_ - d), queries + d * rows_, rows_,
                   keys_.get() + d * kBlock + j, kBlock, part);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
        for (int n = 0; n < NV; n++) sum[m][n] += part[m][n];
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++)
        store(scores + m * kBlock + n * kLanes, rounded(sum[m][n] * scale));
  }

  // Scores of keys that a row does not see become minus infinity.
  void mask(int64_t first, int64_t count) {
    for (int64_t r = 0; r < rows_; r++)
      for (int64_t j = 0; j < count; j += kLanes) {
        vi at;
        for (int i = 0; i < kLanes; i++) at[i] = static_cast<int32_t>(first + j + i);
        float* score = &scores_[r * kBlock + j];
        store(score, (at >= lo_[r]) & (at < hi_[r]) ? load(score) : splat(-__builtin_inff()));
      }
  }

  // Scores to probabilities, relative to each row's running maximum.
  void soften(int64_t h, int64_t count) {
    float* maximum = &maximum_[h * rows_];
    int64_t vectors = (count + kLanes - 1) / kLanes;
    for (int64_t r = 0; r < rows_; r++) {
      const float* scores = &scores_[r * kBlock];
      vf highest = splat(maximum[r]);
      for (int64_t n = 0; n < vectors; n++)
        highest = max_or_nan(highest, load(scores + n * kLanes));
      float now = reduce_max(highest);
      rescale_[r] = maximum[r] - now;
      maximum[r] = now;
    }
    for (int64_t r = 0; r < rows_; r += kLanes) store(&rescale_[r], exp_small(load(&rescale_[r])));
    for (int64_t r = 0; r < rows_; r++) {
      const float* scores = &scores_[r * kBlock];
      U* out = &probabilities_[r * kBlock];
      float *sum = &sum_[(h * rows_ + r) * kLanes], now = maximum[r];
      vf total = load(sum) * rescale_[r];
      for (int64_t n = 0; n < vectors; n += units_per<U>) {
        vf p[units_per<U>];
        for (int i = 0; i < units_per<U>; i++) {
          p[i] = n + i < vectors ? exp_small(load(scores + (n + i) * kLanes) - now) : vf{};
          total += p[i];
        }
        put(out + n * kLanes / units_per<U>, p);
      }
      store(sum, total);
    }
  }
  static void put(float* out, const vf (&p)[1]) { store(out, p[0]); }
#if defined(__AVX512BF16__)
  static void put(uint32_t* out, const vf (&p)[2]) {
    __m512bh pairs = _mm512_cvtne2ps_pbh((__m512)p[1], (__m512)p[0]);
    std::memcpy(out, &pairs, sizeof(pairs));
  }
#endif

  // Values times probabilities into out [rows][Dp].
  void add(int64_t kv_head, int64_t h, int64_t count, int now, float* out) {
    const C* v = static_cast<const C*>(a_.v_cache) + kv_head * a_.v_cache_strides[2];
    const char* base = reinterpret_cast<const char*>(v);
    int64_t head_bytes = a_.v_cache_strides[2] * sizeof(C);
    const int64_t* offsets = v_offsets_[now];
    auto row = [&](int64_t j) {
      return j < count ? reinterpret_cast<const C*>(base + offsets[j]) : nullptr;
    };
    int64_t depth = (count + units_per<U> - 1) / units_per<U>;
    // where one tile has all rows, floats are read once: no need to copy them first
    bool copied = !std::is_same_v<C, U> || rows_ > kTileRows || p_.head_dim % kLanes != 0;
    for (int64_t j = 0; copied && j < depth; j++)
      load_values(row(j * units_per<U>), row(j * units_per<U> + 1), &values_[j * kStride],
                  p_.head_dim, padded_);
    for_tiles(rows_, [&](int64_t r, auto tile) {
      const U* p = &probabilities_[r * kBlock];
      int64_t d = 0;
      auto with = [&](auto vectors) {
        Ahead ahead(base - h * head_bytes, v_offsets_[now ^ 1], heads_, head_bytes, h * kBlock);
        auto values = [&](int64_t j) {
          for (int i = 0; r == 0 && i < units_per<U>; i++)
            fetch(ahead.next(), d * sizeof(C), (d + vectors * kLanes) * sizeof(C));
          return copied ? &values_[j * kStride + d]
                        : reinterpret_cast<const U*>(base + offsets[j]) + d;
        };
        add_values<tile, vectors>(depth, p, values, &rescale_[r], out + r * padded_ + d, padded_);
        d += vectors * kLanes;
      };
      while (d + kTileVectors * kLanes <= padded_)
        with(std::integral_constant<int, kTileVectors>{});
      while (d < padded_) with(std::integral_constant<int, 1>{});
    });
  }

  const Layout& l_;
  const Problem& p_;
  const Tensors& a_;
  int64_t padded_, depth_, heads_ = 0, rows_ = 0, all_lo_ = 0, all_hi_ = 0;
  Buffer<U> queries_;            // [heads][units of D][rows]
  Buffer<float> out_;            // [heads][rows][Dp], where there is one split
  Buffer<float> maximum_, sum_;  // [heads][rows], [heads][rows][kLanes]
  Buffer<U> keys_, values_;      // [units of D][kBlock], [units of kBlock][kStride]
  Buffer<float> scores_;         // [rows][kBlock]
  Buffer<U> probabilities_;      // [rows][kBlock], a unit each
  Buffer<float> rescale_, row_;  // [rows], [Dp]
  Buffer<int32_t> lo_, hi_;      // [rows]
  int64_t k_offsets_[2][kBlock] = {}, v_offsets_[2][kBlock] = {};
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
  int64_t heads = divide_heads(layout, units), most_rows = 0, row_size = p.heads * p.head_dim;
  for (const Unit& unit : units) most_rows = std::max(most_rows, layout.rows(unit.tokens));
  Buffer<float> out(part_rows * layout.padded), maximum(part_rows), sum(part_rows);
  Parts parts{out.get(), maximum.get(), sum.get()};
#pragma omp parallel
  {
    Worker<T, C, U> worker(layout, a, heads, most_rows);
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
    else
      decode<T, T, PanelUnit<T>>(layout, a);
  });
}

// Attention backward: one pass over the scores, five products a tile, no atomics.
//
// A part owns a range of rows of one (sequence, key head) and sums d_k and d_v of the keys they see
// in its own fp32 rows; the parts' sums are added in order at the end. Parts follow from the shapes
// and the number of threads alone, so gradients are bitwise repeatable.
#include <omp.h>

#include <cmath>

#include "attention.h"
#include "dispatch.h"

namespace attention {
namespace {
constexpr int64_t kChunkRows = 384;  // rows that share one packing of their keys
constexpr int64_t kMaxParts = 4;     // of one key head that sees everything: bounds their memory
static_assert(kChunkRows % kRows == 0 || kRows > kChunkRows, "whole panels");

// Rows of one (sequence, key head) and where their sums of d_k and d_v lie.
struct Part {
  int64_t sequence, kv_head;
  Range rows, keys;
  int64_t cost, offset;  // offset in rows of [Dp]
};

// U is a float or a pair of bf16; operands paired along rows or keys are named after those.
template <typename U>
struct Scratch {
  static constexpr int64_t kPanels = (kChunkRows + kRows - 1) / kRows;
  Buffer<U> query_rows, query_columns, d_out_rows, d_out_columns;
  Buffer<float> d_query_columns, lse, delta;     // lse and delta [kPanels][kRows]
  Buffer<U> key_rows, key_panels, value_panels;  // of one block of keys
  Buffer<float> rows;                            // of one panel or block on its way
  Buffer<U> out_columns;                         // the same
  Buffer<float> p;                               // of one step
  Buffer<U> d_s, p_panels, d_s_panels;           // the same
  Buffer<float> d_k, d_v;                        // of one block of keys, from one chunk of rows
  Panel panels[kPanels];

  explicit Scratch(const Problem& p_)
      : query_rows(units<U>(kPanels * kRows) * p_.padded()),
        query_columns(kPanels * kRows * units<U>(p_.head_dim)),
        d_out_rows(units<U>(kPanels * kRows) * p_.padded()),
        d_out_columns(kPanels * kRows * units<U>(p_.head_dim)),
        d_query_columns(kPanels * kRows * p_.padded()),
        lse(kPanels * kRows),
        delta(kPanels * kRows),
        key_rows(units<U>(kPackedKeys) * p_.padded()),
        key_panels(kPackedKeys * units<U>(p_.head_dim)),
        value_panels(kPackedKeys * units<U>(p_.head_dim)),
        rows(std::max(kPackedKeys, kRows) * p_.padded()),
        out_columns(kRows * units<U>(p_.head_dim)),
        p(kKeys * kRows),
        d_s(units<U>(kKeys) * kRows),
        p_panels(kKeys * units<U>(kRows)),
        d_s_panels(kKeys * units<U>(kRows)),
        d_k(kPackedKeys * p_.padded()),
        d_v(kPackedKeys * p_.padded()) {}
};

// One tile [kAR keys][kRows] to the A operand of the products over rows: [units of kRows][kAR].
inline void turn_tile(const vf (&tile)[kAR][kBV], float* out) {
#pragma GCC unroll 8
  for (int n = 0; n < kBV; n++) {
    vf r[kAR];
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++) r[m] = tile[m][n];
    transpose(r);
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++) store(out + (n * kAR + m) * kLanes, r[m]);
  }
}

#if defined(__AVX512BF16__)
// Two keys' rows fill one vector of pairs, so that its lanes are numbered [key bit 0][pair] and the
// vectors [key bits 2, 1]; three riffles make that [pair][key].
inline void turn_tile(const vf (&tile)[kAR][kBV], uint32_t* out) {
  constexpr int kVectors = kAR / 2;
  static_assert(kAR == 8 && kLanes == 16, "three riffles");
#pragma GCC unroll 8
  for (int n = 0; n < kBV; n++) {
    vf r[kVectors];
#pragma GCC unroll 8
    for (int m = 0; m < kVectors; m++)
      r[m] = (vf)_mm512_cvtne2ps_pbh((__m512)tile[2 * m + 1][n], (__m512)tile[2 * m][n]);
    rotate_index_bits<3>(r);
#pragma GCC unroll 8
    for (int m = 0; m < kVectors; m++) put_vector(out + (n * kVectors + m) * kLanes, r[m]);
  }
}
#endif

// sum[kAR keys][Dp] += turned [kRows][kAR] ^T times rows [kRows][Dp]
template <int NV, typename U>
inline void add_columns(const U* turned, const U* rows, int64_t padded, float* sum) {
  vf one[NV];
  for (int n = 0; n < NV; n++) one[n] = splat(1.0f);
  add_product<kAR, NV>(units<U>(kRows), turned, kAR, rows, padded, sum, padded, one);
}

template <typename U>
inline void add_rows(const U* turned, const U* rows, int64_t padded, float* sum) {
  int64_t d = 0, left = padded / kLanes;
  for (; left >= 3 && left != 4; left -= 3, d += 3 * kLanes)
    add_columns<3>(turned, rows + d, padded, sum + d);
  for (; left >= 2; left -= 2, d += 2 * kLanes) add_columns<2>(turned, rows + d, padded, sum + d);
  if (left == 1) add_columns<1>(turned, rows + d, padded, sum + d);
}

// One tile to the B operand of the product over keys: [units of kAR][kRows]
template <typename U>
inline void unite_tile(const vf (&tile)[kAR][kBV], U* out) {
#pragma GCC unroll 8
  for (int n = 0; n < kBV; n++) {
    vf keys[kAR];
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++) keys[m] = tile[m][n];
    make_units<U>(keys, kAR,
                  [&](int64_t unit, auto v) { put_vector(out + unit * kRows + n * kLanes, v); });
  }
}

// One panel against keys [lo, hi), at most kKeys. d_k and d_v are the rows of key lo.
template <typename U>
void step(const Problem& problem, Scratch<U>& w, int64_t panel, Range range, int64_t block,
          float* d_k, float* d_v, bool want_q) {
  int64_t dim = problem.head_dim, depth = units<U>(dim), padded = problem.padded();
  int64_t count = range.hi - range.lo;
  int64_t at = range.lo - block, first = panel * kRows;
  vf lse[kBV], delta[kBV];
  for (int n = 0; n < kBV; n++) {
    lse[n] = load(w.lse.get() + first + n * kLanes);
    delta[n] = load(w.delta.get() + first + n * kLanes);
  }
  float* p = w.p.get();
  U* d_s = w.d_s.get();
  for (int64_t j = 0; j < count; j += kAR) {
    vf tile[kAR][kBV];
    multiply(dim, w.key_panels.get() + (at + j) * depth, w.query_columns.get() + first * depth,
             tile);
    scale_scores(tile, problem.scale);
    w.panels[panel].mask(tile, range.lo + j);
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < kBV; n++) {
        tile[m][n] = exp_small(tile[m][n] - lse[n]);
        store(p + (j + m) * kRows + n * kLanes, tile[m][n]);
      }
    if (d_v != nullptr) turn_tile(tile, w.p_panels.get() + j * units<U>(kRows));
  }
  for (int64_t j = 0; j < count; j += kAR) {
    vf tile[kAR][kBV];
    multiply(dim, w.value_panels.get() + (at + j) * depth, w.d_out_columns.get() + first * depth,
             tile);
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < kBV; n++)
        tile[m][n] = load(p + (j + m) * kRows + n * kLanes) * (tile[m][n] - delta[n]);
    if (want_q) unite_tile(tile, d_s + units<U>(j) * kRows);
    if (d_k != nullptr) turn_tile(tile, w.d_s_panels.get() + j * units<U>(kRows));
  }
  for (int64_t j = 0; d_v != nullptr && j < count; j += kAR)
    add_rows(w.p_panels.get() + j * units<U>(kRows), w.d_out_rows.get() + units<U>(first) * padded,
             padded, d_v + j * padded);
  for (int64_t j = 0; d_k != nullptr && j < count; j += kAR)
    add_rows(w.d_s_panels.get() + j * units<U>(kRows),
             w.query_rows.get() + units<U>(first) * padded, padded, d_k + j * padded);
  vf one[kBV];
  for (int n = 0; n < kBV; n++) one[n] = splat(1.0f);
  for (int64_t d = 0; want_q && d < dim; d += kAR)
    add_product<kAR, kBV>(units<U>(count), w.key_rows.get() + units<U>(at) * padded + d, padded,
                          d_s, kRows, w.d_query_columns.get() + first * padded + d * kRows, kRows,
                          one);
}

// delta = sum of d_out * out less d_lse, and the sinks' gradient.
template <typename T, typename U>
void start_panel(const Sequence& s, const Panel& panel, int64_t kv_head, const AttentionBackward& a,
                 const U* d_out_columns, Scratch<U>& w, float* lse, float* delta, double* d_sinks) {
  const Problem& p = *s.p;
  int64_t group = p.group(), depth = units<U>(p.head_dim);
  load_queries(s, panel, kv_head, static_cast<const T*>(a.out), a.out_strides, false, w.rows.get());
  transpose_panel(w.rows.get(), w.out_columns.get(), p.head_dim, p.padded());
  // Added up as multiply() does, so that a query with one key has d_p - delta = 0 exactly.
  vf sums[kBV] = {};
  int64_t step = units_per<U> == 1 ? kSumStep : depth;
  for (int64_t d0 = 0; d0 < depth; d0 += step) {
    vf part[kBV] = {};
    for (int64_t d = d0; d < std::min(d0 + step, depth); d++)
      for (int n = 0; n < kBV; n++) {
        int64_t at = d * kRows + n * kLanes;
        part[n] = add_units(part[n], w.out_columns.get() + at, d_out_columns + at);
      }
    for (int n = 0; n < kBV; n++) sums[n] = d0 == 0 ? part[n] : sums[n] + part[n];
  }
  std::memcpy(delta, sums, sizeof(sums));
  int64_t token = panel.first / group, head = panel.first % group;
  for (int64_t r = 0; r < kRows; r++) {
    lse[r] = INFINITY;  // probabilities of 0 where there is no row or no key
    if (r >= panel.count) continue;
    int64_t h = kv_head * group + head, index = s.lse_index(token, h);
    if (a.d_lse != nullptr) delta[r] -= a.d_lse[index];
    if (a.lse[index] != -INFINITY) lse[r] = a.lse[index];
    if (a.sinks != nullptr && a.lse[index] != -INFINITY)
      d_sinks[head] -= std::exp(a.sinks[h] - a.lse[index]) * delta[r];
    if (++head == group) head = 0, token++;
  }
}

template <typename T>
void store_d_query(const Sequence& s, const Panel& panel, int64_t kv_head, const float* columns,
                   float* rows, T* d_q) {
  const Problem& p = *s.p;
  int64_t group = p.group(), padded = p.padded();
  vf scale[kBV];
  for (int n = 0; n < kBV; n++) scale[n] = splat(p.scale);
  untranspose_panel(columns, rows, padded, scale);
  int64_t token = panel.first / group, head = panel.first % group;
  for (int64_t r = 0; r < panel.count; r++) {
    float* row = rows + r * padded;
    if (p.cos != nullptr) {
      int64_t at = s.position(token + s.len_k - s.len_q) * p.half;
      rotate_row(row, p.cos + at, p.sin + at, p.half, -1.0f);
    }
    int64_t index = (s.batch * p.tokens_q + s.first_q + token) * p.heads + kv_head * group + head;
    store_row(row, d_q + index * p.head_dim, p.head_dim);
    if (++head == group) head = 0, token++;
  }
}

// A key that many rows see would lose bits in one chain over all of their panels.
inline void add_block(const float* block, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; i += kLanes) store(sum + i, load(sum + i) + load(block + i));
}

template <typename T, typename U>
void backward_chunk(const Sequence& s, const Part& part, Range rows, const AttentionBackward& a,
                    float* d_k, float* d_v, double* d_sinks, Scratch<U>& w) {
  const Problem& p = *s.p;
  int64_t dim = p.head_dim, depth = units<U>(dim), padded = p.padded();
  int64_t panels = (rows.hi - rows.lo + kRows - 1) / kRows;
  for (int64_t i = 0; i < panels; i++) {
    int64_t first = rows.lo + i * kRows, at = i * kRows;
    Panel& panel = w.panels[i] = Panel(s, {first, std::min(first + kRows, rows.hi)});
    auto prepare = [&](const void* data, const Strides& strides, bool rotated, U* united,
                       U* columns) {
      float* made = landing_rows(united, w.rows.get());
      load_queries(s, panel, part.kv_head, static_cast<const T*>(data), strides, rotated, made);
      transpose_panel(made, columns, dim, padded);
      unite_rows(made, united, kRows, padded);
    };
    U* d_out_columns = w.d_out_columns.get() + at * depth;
    prepare(a.q, a.q_strides, true, w.query_rows.get() + units<U>(at) * padded,
            w.query_columns.get() + at * depth);
    prepare(a.d_out, a.d_out_strides, false, w.d_out_rows.get() + units<U>(at) * padded,
            d_out_columns);
    start_panel<T>(s, panel, part.kv_head, a, d_out_columns, w, w.lse.get() + at,
                   w.delta.get() + at, d_sinks);
  }
  std::fill_n(w.d_query_columns.get(), panels * kRows * padded, 0.0f);
  Range seen = s.visible_to_rows(rows);
  for (int64_t block = seen.lo / kLanes * kLanes; block < seen.hi; block += kPackedKeys) {
    Range keys{block, std::min({block + kPackedKeys, round_up(seen.hi, kLanes), s.len_k})};
    int64_t count = round_up(keys.hi - keys.lo, kLanes);
    load_keys(s, part.kv_head, keys, static_cast<const T*>(a.v), a.v_strides, false, w.rows.get());
    pack_panels(w.rows.get(), w.value_panels.get(), count, dim, padded);
    float* made = landing_rows(w.key_rows.get(), w.rows.get());
    load_keys(s, part.kv_head, keys, static_cast<const T*>(a.k), a.k_strides, true, made);
    pack_panels(made, w.key_panels.get(), count, dim, padded);
    unite_rows(made, w.key_rows.get(), count, padded);
    if (d_k != nullptr) std::fill_n(w.d_k.get(), count * padded, 0.0f);
    if (d_v != nullptr) std::fill_n(w.d_v.get(), count * padded, 0.0f);
    for (int64_t i = 0; i < panels; i++) {
      Range mine = clip_to_block(w.panels[i].any, block);
      int64_t length = step_length(mine);
      for (int64_t lo = mine.lo; lo < mine.hi; lo += length) {
        int64_t offset = (lo - block) * padded;
        step(p, w, i, {lo, std::min(lo + length, mine.hi)}, block,
             d_k ? w.d_k.get() + offset : nullptr, d_v ? w.d_v.get() + offset : nullptr,
             a.d_q != nullptr);
      }
    }
    int64_t offset = (block - part.keys.lo) * padded;
    int64_t whole = std::min(count, part.keys.hi - block) * padded;
    if (d_k != nullptr) add_block(w.d_k.get(), whole, d_k + offset);
    if (d_v != nullptr) add_block(w.d_v.get(), whole, d_v + offset);
  }
  for (int64_t i = 0; a.d_q != nullptr && i < panels; i++)
    store_d_query(s, w.panels[i], part.kv_head, w.d_query_columns.get() + i * kRows * padded,
                  w.rows.get(), static_cast<T*>(a.d_q));
}

// Cuts every (sequence, key head) into parts of about equal work, one where that is enough.
std::vector<Part> make_parts(const Problem& p, const std::vector<Sequence>& sequences) {
  auto cost_of = [&](const Sequence& s, int64_t lo) {
    Range seen = s.visible_to_rows({lo, std::min(lo + kRows, s.rows())});
    return seen.hi - seen.lo + kKeys;
  };
  std::vector<int64_t> costs;
  int64_t total = 0;
  for (const Sequence& s : sequences) {
    int64_t cost = 0;
    for (int64_t lo = 0; lo < s.rows(); lo += kRows) cost += cost_of(s, lo);
    costs.push_back(cost);
    total += cost * p.kv_heads;
  }
  bool windowed = p.window_left >= 0 && p.window_right >= 0;
  int64_t target = std::max<int64_t>(1, total / (2 * omp_get_max_threads()));
  std::vector<Part> parts;
  for (size_t n = 0; n < sequences.size(); n++) {
    const Sequence& s = sequences[n];
    int64_t most = windowed ? (s.rows() + kChunkRows - 1) / kChunkRows : kMaxParts;
    int64_t count = std::clamp<int64_t>((costs[n] + target / 2) / target, 1, most > 0 ? most : 1);
    for (int64_t g = 0; g < p.kv_heads; g++) {
      int64_t begin = 0, spent = 0, made = 0;
      for (int64_t lo = 0; lo < s.rows(); lo += kRows) {
        spent += cost_of(s, lo);
        int64_t end = std::min(lo + kRows, s.rows());
        if (spent * count < costs[n] * (made + 1) && end < s.rows()) continue;
        Range keys = s.visible_to_rows({begin, end});
        keys = {keys.lo / kLanes * kLanes, round_up(keys.hi, kLanes)};
        parts.push_back(
            {static_cast<int64_t>(n), g, {begin, end}, keys, spent - costs[n] * made / count, 0});
        begin = end;
        made++;
      }
    }
  }
  int64_t offset = 0;
  for (Part& part : parts) {
    part.offset = offset;
    offset += part.keys.hi - part.keys.lo;
  }
  return parts;
}

// d_k or d_v of every key: the parts' sums in order, scaled, un-rotated.
template <typename T>
void store_d_keys(const Problem& p, const std::vector<Sequence>& sequences,
                  const std::vector<Part>& parts, const float* sums, float scale, bool rotated,
                  T* out) {
  int64_t padded = p.padded();
  std::vector<size_t> first_part(sequences.size() * p.kv_heads + 1, parts.size());
  for (size_t i = parts.size(); i-- > 0;)
    first_part[parts[i].sequence * p.kv_heads + parts[i].kv_head] = i;
  for (size_t i = first_part.size() - 1; i-- > 0;)
    first_part[i] = std::min(first_part[i], first_part[i + 1]);
#pragma omp parallel
  {
    Buffer<float> row(padded);
    for (size_t n = 0; n < sequences.size(); n++) {
      const Sequence& s = sequences[n];
#pragma omp for schedule(static) nowait
      for (int64_t key = 0; key < s.len_k; key++)
        for (int64_t g = 0; g < p.kv_heads; g++) {
          std::fill_n(row.get(), padded, 0.0f);
          for (size_t i = first_part[n * p.kv_heads + g]; i < first_part[n * p.kv_heads + g + 1];
               i++) {
            const Part& part = parts[i];
            if (key < part.keys.lo || key >= part.keys.hi) continue;
            const float* in = sums + (part.offset + key - part.keys.lo) * padded;
            for (int64_t d = 0; d < padded; d += kLanes)
              store(row.get() + d, load(row.get() + d) + load(in + d) * scale);
          }
          if (rotated && p.cos != nullptr) {
            int64_t at = s.position(key) * p.half;
            rotate_row(row.get(), p.cos + at, p.sin + at, p.half, -1.0f);
          }
          int64_t index = (s.batch * p.tokens_k + s.first_k + key) * p.kv_heads + g;
          store_row(row.get(), out + index * p.head_dim, p.head_dim);
        }
    }
  }
}

template <typename T>
void backward_typed(const Problem& p, const AttentionBackward& a) {
  std::vector<Sequence> sequences = make_sequences(p);
  std::vector<Part> parts = make_parts(p, sequences);
  std::vector<size_t> order(parts.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t x, size_t y) { return parts[x].cost > parts[y].cost; });
  int64_t padded = p.padded(), group = p.group();
  int64_t size = parts.empty()
                     ? 0
                     : (parts.back().offset + parts.back().keys.hi - parts.back().keys.lo) * padded;
  Buffer<float> d_k(a.d_k != nullptr ? size : 0), d_v(a.d_v != nullptr ? size : 0);
  std::vector<double> d_sinks(parts.size() * group, 0.0);
  int64_t bytes = p.batches() * p.head_dim * sizeof(T);
  if (a.d_q != nullptr) advise_huge_pages(a.d_q, bytes * p.tokens_q * p.heads);
  if (a.d_k != nullptr) advise_huge_pages(a.d_k, bytes * p.tokens_k * p.kv_heads);
  if (a.d_v != nullptr) advise_huge_pages(a.d_v, bytes * p.tokens_k * p.kv_heads);
#pragma omp parallel
  {
    Scratch<PanelUnit<T>> scratch(p);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < order.size(); i++) {
      const Part& part = parts[order[i]];
      int64_t length = (part.keys.hi - part.keys.lo) * padded;
      float* own_d_k = a.d_k != nullptr ? d_k.get() + part.offset * padded : nullptr;
      float* own_d_v = a.d_v != nullptr ? d_v.get() + part.offset * padded : nullptr;
      if (own_d_k != nullptr) std::fill_n(own_d_k, length, 0.0f);
      if (own_d_v != nullptr) std::fill_n(own_d_v, length, 0.0f);
      for (int64_t lo = part.rows.lo; lo < part.rows.hi; lo += kChunkRows)
        backward_chunk<T>(sequences[part.sequence], part,
                          {lo, std::min(lo + kChunkRows, part.rows.hi)}, a, own_d_k, own_d_v,
                          d_sinks.data() + order[i] * group, scratch);
    }
  }
  if (a.d_k != nullptr)
    store_d_keys(p, sequences, parts, d_k.get(), p.scale, true, static_cast<T*>(a.d_k));
  if (a.d_v != nullptr)
    store_d_keys(p, sequences, parts, d_v.get(), 1.0f, false, static_cast<T*>(a.d_v));
  if (a.d_sinks != nullptr) {
    std::vector<double> total(p.heads, 0.0);
    for (size_t i = 0; i < parts.size(); i++)
      for (int64_t h = 0; h < group; h++)
        total[parts[i].kv_head * group + h] += d_sinks[i * group + h];
    for (int64_t h = 0; h < p.heads; h++) a.d_sinks[h] = static_cast<float>(total[h]);
  }
}
}  // namespace
}  // namespace attention

void attention_bwd(const AttentionProblem& problem, DType dtype, const AttentionBackward& a) {
  attention::Problem p(problem);
  with_dtype(dtype, [&](auto tag) { attention::backward_typed<decltype(tag)>(p, a); });
}

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

struct Scratch {
  static constexpr int64_t kPanels = (kChunkRows + kRows - 1) / kRows;
  Buffer<float> query_rows, query_columns, d_out_rows, d_out_columns, d_query_columns;
  Buffer<float> lse, delta;                          // [kPanels][kRows]
  Buffer<float> key_rows, key_panels, value_panels;  // of one block of keys
  Buffer<float> rows, p, d_s, p_panels, d_s_panels;  // of one step
  Panel panels[kPanels];

  explicit Scratch(const Problem& p_)
      : query_rows(kPanels * kRows * p_.padded()),
        query_columns(kPanels * kRows * p_.head_dim),
        d_out_rows(kPanels * kRows * p_.padded()),
        d_out_columns(kPanels * kRows * p_.head_dim),
        d_query_columns(kPanels * kRows * p_.padded()),
        lse(kPanels * kRows),
        delta(kPanels * kRows),
        key_rows(kPackedKeys * p_.padded()),
        key_panels(kPackedKeys * p_.head_dim),
        value_panels(kPackedKeys * p_.head_dim),
        rows(std::max(kPackedKeys, kRows) * p_.padded()),
        p(kKeys * kRows),
        d_s(kKeys * kRows),
        p_panels(kKeys * kRows),
        d_s_panels(kKeys * kRows) {}
};

// One tile [kAR keys][kRows] to the A operand of the products over rows: [kRows][kAR].
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

// sum[kAR][Dp] += turned [kRows][kAR] ^T times rows [kRows][Dp]
template <int NV>
inline void add_columns(const float* turned, const float* rows, int64_t padded, float* sum) {
  vf acc[kAR][NV];
#pragma GCC unroll 8
  for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) acc[m][n] = load(sum + m * padded + n * kLanes);
  micro_kernel(kRows, turned, kAR, rows, padded, acc);
#pragma GCC unroll 8
  for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
    for (int n = 0; n < NV; n++) store(sum + m * padded + n * kLanes, acc[m][n]);
}

inline void add_product(const float* turned, const float* rows, int64_t padded, float* sum) {
  int64_t d = 0, left = padded / kLanes;
  for (; left >= 3 && left != 4; left -= 3, d += 3 * kLanes)
    add_columns<3>(turned, rows + d, padded, sum + d);
  for (; left >= 2; left -= 2, d += 2 * kLanes) add_columns<2>(turned, rows + d, padded, sum + d);
  if (left == 1) add_columns<1>(turned, rows + d, padded, sum + d);
}

// One panel against keys [lo, hi), at most kKeys. d_k and d_v are the rows of key lo.
void step(const Problem& problem, Scratch& w, int64_t panel, Range range, int64_t block, float* d_k,
          float* d_v, bool want_q) {
  int64_t dim = problem.head_dim, padded = problem.padded(), count = range.hi - range.lo;
  int64_t at = range.lo - block, first = panel * kRows;
  vf lse[kBV], delta[kBV];
  for (int n = 0; n < kBV; n++) {
    lse[n] = load(w.lse.get() + first + n * kLanes);
    delta[n] = load(w.delta.get() + first + n * kLanes);
  }
  float *p = w.p.get(), *d_s = w.d_s.get();
  for (int64_t j = 0; j < count; j += kAR) {
    vf tile[kAR][kBV] = {};
    micro_kernel(dim, w.key_panels.get() + (at + j) * dim, kAR, w.query_columns.get() + first * dim,
                 kRows, tile);
    w.panels[panel].mask(tile, range.lo + j);
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < kBV; n++) {
        tile[m][n] = exp_small(tile[m][n] - lse[n]);
        store(p + (j + m) * kRows + n * kLanes, tile[m][n]);
      }
    if (d_v != nullptr) turn_tile(tile, w.p_panels.get() + j * kRows);
  }
  for (int64_t j = 0; j < count; j += kAR) {
    vf tile[kAR][kBV] = {};
    micro_kernel(dim, w.value_panels.get() + (at + j) * dim, kAR,
                 w.d_out_columns.get() + first * dim, kRows, tile);
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < kBV; n++) {
        tile[m][n] = load(p + (j + m) * kRows + n * kLanes) * (tile[m][n] - delta[n]);
        store(d_s + (j + m) * kRows + n * kLanes, tile[m][n]);
      }
    if (d_k != nullptr) turn_tile(tile, w.d_s_panels.get() + j * kRows);
  }
  for (int64_t j = 0; d_v != nullptr && j < count; j += kAR)
    add_product(w.p_panels.get() + j * kRows, w.d_out_rows.get() + first * padded, padded,
                d_v + j * padded);
  for (int64_t j = 0; d_k != nullptr && j < count; j += kAR)
    add_product(w.d_s_panels.get() + j * kRows, w.query_rows.get() + first * padded, padded,
                d_k + j * padded);
  for (int64_t d = 0; want_q && d < dim; d += kAR) {
    float* sum = w.d_query_columns.get() + first * padded + d * kRows;
    vf acc[kAR][kBV];
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < kBV; n++) acc[m][n] = load(sum + m * kRows + n * kLanes);
    micro_kernel(count, w.key_rows.get() + at * padded + d, padded, d_s, kRows, acc);
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < kBV; n++) store(sum + m * kRows + n * kLanes, acc[m][n]);
  }
}

// delta = sum of d_out * out less d_lse, and the sinks' gradient.
template <typename T>
void start_panel(const Sequence& s, const Panel& panel, int64_t kv_head, const AttentionBackward& a,
                 const float* d_out_rows, float* out_rows, float* lse, float* delta,
                 double* d_sinks) {
  const Problem& p = *s.p;
  int64_t group = p.group(), padded = p.padded();
  load_queries(s, panel, kv_head, static_cast<const T*>(a.out), a.out_strides, false, out_rows);
  int64_t token = panel.first / group, head = panel.first % group;
  for (int64_t r = 0; r < kRows; r++) {
    lse[r] = INFINITY, delta[r] = 0;  // probabilities of 0 where there is no row or no key
    if (r >= panel.count) continue;
    vf sum = {};
    for (int64_t d = 0; d < padded; d += kLanes)
      sum += load(d_out_rows + r * padded + d) * load(out_rows + r * padded + d);
    int64_t h = kv_head * group + head, index = s.lse_index(token, h);
    delta[r] = reduce_add(sum) - (a.d_lse != nullptr ? a.d_lse[index] : 0.0f);
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

template <typename T>
void backward_chunk(const Sequence& s, const Part& part, Range rows, const AttentionBackward& a,
                    float* d_k, float* d_v, double* d_sinks, Scratch& w) {
  const Problem& p = *s.p;
  int64_t dim = p.head_dim, padded = p.padded();
  int64_t panels = (rows.hi - rows.lo + kRows - 1) / kRows;
  for (int64_t i = 0; i < panels; i++) {
    int64_t first = rows.lo + i * kRows, at = i * kRows;
    Panel& panel = w.panels[i] = Panel(s, {first, std::min(first + kRows, rows.hi)});
    float *q = w.query_rows.get() + at * padded, *d_out = w.d_out_rows.get() + at * padded;
    load_queries(s, panel, part.kv_head, static_cast<const T*>(a.q), a.q_strides, true, q);
    transpose_panel(q, w.query_columns.get() + at * dim, dim, padded);
    load_queries(s, panel, part.kv_head, static_cast<const T*>(a.d_out), a.d_out_strides, false,
                 d_out);
    transpose_panel(d_out, w.d_out_columns.get() + at * dim, dim, padded);
    start_panel<T>(s, panel, part.kv_head, a, d_out, w.rows.get(), w.lse.get() + at,
                   w.delta.get() + at, d_sinks);
  }
  std::fill_n(w.d_query_columns.get(), panels * kRows * padded, 0.0f);
  Range seen = s.visible_to_rows(rows);
  for (int64_t block = seen.lo / kLanes * kLanes; block < seen.hi; block += kPackedKeys) {
    Range keys{block, std::min({block + kPackedKeys, round_up(seen.hi, kLanes), s.len_k})};
    int64_t count = round_up(keys.hi - keys.lo, kLanes);
    load_keys(s, part.kv_head, keys, static_cast<const T*>(a.v), a.v_strides, false, w.rows.get());
    pack_panels(w.rows.get(), w.value_panels.get(), count, dim, padded, 1.0f);
    load_keys(s, part.kv_head, keys, static_cast<const T*>(a.k), a.k_strides, true,
              w.key_rows.get());
    pack_panels(w.key_rows.get(), w.key_panels.get(), count, dim, padded, p.scale);
    for (int64_t i = 0; i < panels; i++) {
      Range mine = clip_to_block(w.panels[i].any, block);
      int64_t length = step_length(mine);
      for (int64_t lo = mine.lo; lo < mine.hi; lo += length) {
        int64_t offset = (lo - part.keys.lo) * padded;
        step(p, w, i, {lo, std::min(lo + length, mine.hi)}, block, d_k ? d_k + offset : nullptr,
             d_v ? d_v + offset : nullptr, a.d_q != nullptr);
      }
    }
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
  int64_t batches = p.cu_q != nullptr ? 1 : p.sequences, bytes = batches * p.head_dim * sizeof(T);
  if (a.d_q != nullptr) advise_huge_pages(a.d_q, bytes * p.tokens_q * p.heads);
  if (a.d_k != nullptr) advise_huge_pages(a.d_k, bytes * p.tokens_k * p.kv_heads);
  if (a.d_v != nullptr) advise_huge_pages(a.d_v, bytes * p.tokens_k * p.kv_heads);
#pragma omp parallel
  {
    Scratch scratch(p);
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

void attention_bwd(const AttentionProblem& p, DType dtype, const AttentionBackward& a) {
  with_dtype(dtype,
             [&](auto tag) { attention::backward_typed<decltype(tag)>(attention::Problem(p), a); });
}

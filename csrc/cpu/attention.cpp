// Attention forward: blocked online softmax over panels of rows, one key head at a time.
#include "attention.h"

#include <omp.h>

#include <cmath>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace attention {
namespace {
constexpr int64_t kUnitRows = 1536;  // rows that share one packing of their keys
constexpr float kLowest = -1e30f;    // a running maximum that has seen nothing

void check_lengths(const int32_t* cu, int64_t sequences, int64_t total, const char* name) {
  bool rises = cu[0] == 0 && cu[sequences] == total;
  for (int64_t n = 0; n < sequences; n++) rises = rises && cu[n] <= cu[n + 1];
  if (!rises)
    throw std::invalid_argument(std::string("attention: expected ") + name + " rising from 0 to " +
                                std::to_string(total) + ", got other lengths");
}

void check_positions(const Problem& p, const std::vector<Sequence>& sequences) {
  for (const Sequence& s : sequences) {
    if (s.len_q > s.len_k)
      throw std::invalid_argument(
          "attention: expected no more queries than keys with rotary, got " +
          std::to_string(s.len_q) + " and " + std::to_string(s.len_k));
    if (p.position_ids == nullptr && s.len_k > p.table_length)
      throw std::invalid_argument("attention: expected tables of at least " +
                                  std::to_string(s.len_k) + " positions, got " +
                                  std::to_string(p.table_length));
    for (int64_t j = 0; p.position_ids != nullptr && j < s.len_k; j++)
      if (s.position(j) < 0 || s.position(j) >= p.table_length)
        throw std::invalid_argument("attention: expected positions in 0 ... " +
                                    std::to_string(p.table_length - 1) + ", got " +
                                    std::to_string(s.position(j)));
  }
}

// What a thread keeps while it works on one unit; U is a float or a pair of bf16.
template <typename U>
struct Scratch {
  Buffer<U> queries;                // of every panel of the unit
  Buffer<float> out, maximum, sum;  // the same
  Buffer<U> keys, values;
  Buffer<float> rows, p;
  std::vector<Panel> panels;

  Scratch(const Problem& p, int64_t unit_rows)
      : queries(unit_rows * units<U>(p.head_dim)),
        out(unit_rows * p.padded()),
        maximum(unit_rows),
        sum(unit_rows),
        keys(kPackedKeys * units<U>(p.head_dim)),
        values(units<U>(kPackedKeys) * p.padded()),
        rows(std::max(kPackedKeys, kRows) * p.padded()),
        p(kKeys * kRows),
        panels(unit_rows / kRows) {}
};

// Scores, softmax and output of one panel against keys [lo, hi), at most kKeys of them.
template <typename U>
void step(const Problem& problem, const Panel& panel, const U* queries, const U* keys,
          const U* values, Range range, float* p, float* maximum, float* sum, float* out) {
  int64_t dim = problem.head_dim, padded = problem.padded(), count = range.hi - range.lo;
  vf highest[kBV], before[kBV], total[kBV], rescale[kBV];
  for (int n = 0; n < kBV; n++) highest[n] = before[n] = load(maximum + n * kLanes);
  for (int64_t j = 0; j < count; j += kAR) {
    vf scores[kAR][kBV];
    multiply(dim, keys + j * units<U>(dim), queries, scores);
    scale_scores(scores, problem.scale);
    panel.mask(scores, range.lo + j);
#pragma GCC unroll 8
    for (int m = 0; m < kAR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < kBV; n++) {
        highest[n] = max_or_nan(highest[n], scores[m][n]);
        store(p + (j + m) * kRows + n * kLanes, scores[m][n]);
      }
  }
  for (int n = 0; n < kBV; n++) {
    rescale[n] = exp_small(before[n] - highest[n]);
    total[n] = load(sum + n * kLanes) * rescale[n];
    store(maximum + n * kLanes, highest[n]);
  }
  U* probabilities = reinterpret_cast<U*>(p);  // overtakes no score that is still to be read
  for (int64_t j = 0; j < count; j += units_per<U>)
#pragma GCC unroll 8
    for (int n = 0; n < kBV; n++) {
      vf values[units_per<U>];
#pragma GCC unroll 2
      for (int i = 0; i < units_per<U>; i++) {
        values[i] = exp_small(load(p + (j + i) * kRows + n * kLanes) - highest[n]);
        total[n] += values[i];
      }
      U* at = probabilities + units<U>(j) * kRows + n * kLanes;
      make_units<U>(values, units_per<U>, [&](int64_t, auto v) { put_vector(at, v); });
    }
  for (int n = 0; n < kBV; n++) store(sum + n * kLanes, total[n]);
  for (int64_t d = 0; d < dim; d += kAR)
    add_product<kAR, kBV>(units<U>(count), values + d, padded, probabilities, kRows,
                          out + d * kRows, kRows, rescale);
}

template <typename T>
void finish_panel(const Sequence& s, const Panel& panel, int64_t kv_head, const float* maximum,
                  const float* sum, const float* columns, float* rows, const AttentionForward& a) {
  const Problem& p = *s.p;
  int64_t group = p.group(), padded = p.padded();
  vf inverse[kBV];
  for (int n = 0; n < kBV; n++) {
    vf total = load(sum + n * kLanes);
    inverse[n] = total > 0.0f ? 1.0f / total : (total == 0.0f ? vf{} : total);
  }
  untranspose_panel(columns, rows, padded, inverse);
  int64_t token = panel.first / group, head = panel.first % group;
  for (int64_t r = 0; r < panel.count; r++) {
    int64_t h = kv_head * group + head;
    store_row(rows + r * padded, s.query(static_cast<T*>(a.out), a.out_strides, token, h),
              p.head_dim);
    bool nothing = maximum[r] <= kLowest;
    a.lse[s.lse_index(token, h)] = nothing ? -INFINITY : maximum[r] + std::log(sum[r]);
    if (++head == group) head = 0, token++;
  }
}

template <typename T, typename U>
void forward_unit(const Sequence& s, const Unit& unit, const AttentionForward& a, Scratch<U>& w) {
  const Problem& p = *s.p;
  int64_t dim = p.head_dim, depth = units<U>(dim), padded = p.padded(), group = p.group();
  int64_t panels = (unit.rows.hi - unit.rows.lo + kRows - 1) / kRows;
  for (int64_t i = 0; i < panels; i++) {
    int64_t first = unit.rows.lo + i * kRows;
    Panel& panel = w.panels[i] = Panel(s, {first, std::min(first + kRows, unit.rows.hi)});
    load_queries(s, panel, unit.kv_head, static_cast<const T*>(a.q), a.q_strides, true,
                 w.rows.get());
    transpose_panel(w.rows.get(), w.queries.get() + i * kRows * depth, dim, padded);
    for (int64_t r = 0; r < kRows; r++) {
      int64_t head = unit.kv_head * group + (first + r) % group;
      float sink = a.sinks ? a.sinks[head] : kLowest;
      w.maximum[i * kRows + r] = std::max(sink, kLowest);
      w.sum[i * kRows + r] = sink > kLowest ? 1.0f : 0.0f;
    }
  }
  std::fill_n(w.out.get(), panels * kRows * padded, 0.0f);
  Range seen = s.visible_to_rows(unit.rows);
  for (int64_t block = seen.lo / kLanes * kLanes; block < seen.hi; block += kPackedKeys) {
    Range keys{block, std::min({block + kPackedKeys, round_up(seen.hi, kLanes), s.len_k})};
    int64_t count = round_up(keys.hi - keys.lo, kLanes);
    load_keys(s, unit.kv_head, keys, static_cast<const T*>(a.k), a.k_strides, true, w.rows.get());
    pack_panels(w.rows.get(), w.keys.get(), count, dim, padded);
    float* values = landing_rows(w.values.get(), w.rows.get());
    load_keys(s, unit.kv_head, keys, static_cast<const T*>(a.v), a.v_strides, false, values);
    unite_rows(values, w.values.get(), count, padded);
    for (int64_t i = 0; i < panels; i++) {
      Range mine = clip_to_block(w.panels[i].any, block);
      int64_t length = step_length(mine);
      for (int64_t lo = mine.lo; lo < mine.hi; lo += length)
        step(p, w.panels[i], w.queries.get() + i * kRows * depth,
             w.keys.get() + (lo - block) * depth, w.values.get() + units<U>(lo - block) * padded,
             {lo, std::min(lo + length, mine.hi)}, w.p.get(), w.maximum.get() + i * kRows,
             w.sum.get() + i * kRows, w.out.get() + i * kRows * padded);
    }
  }
  for (int64_t i = 0; i < panels; i++)
    finish_panel<T>(s, w.panels[i], unit.kv_head, w.maximum.get() + i * kRows,
                    w.sum.get() + i * kRows, w.out.get() + i * kRows * padded, w.rows.get(), a);
}

// Rows of one unit: few enough that every thread has several units, costliest first.
std::vector<Unit> make_units(const Problem& p, const std::vector<Sequence>& sequences,
                             int64_t& unit_rows) {
  int64_t total = 0;
  for (const Sequence& s : sequences) total += s.rows() * p.kv_heads;
  int64_t share = round_up(total / (omp_get_max_threads() * 8) + 1, kRows);
  unit_rows = round_up(std::min<int64_t>(std::max<int64_t>(share, 4 * kRows), kUnitRows), kRows);
  std::vector<Unit> units;
  for (size_t n = 0; n < sequences.size(); n++)
    for (int64_t lo = 0; lo < sequences[n].rows(); lo += unit_rows) {
      Range rows{lo, std::min(lo + unit_rows, sequences[n].rows())};
      Range seen = sequences[n].visible_to_rows(rows);
      int64_t cost = (rows.hi - rows.lo) * (seen.hi - seen.lo + kKeys);
      for (int64_t g = 0; g < p.kv_heads; g++)
        units.push_back({static_cast<int64_t>(n), g, rows, cost});
    }
  std::stable_sort(units.begin(), units.end(),
                   [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
  return units;
}
}  // namespace

std::vector<Sequence> make_sequences(const Problem& p) {
  if (p.cu_q != nullptr) {
    check_lengths(p.cu_q, p.sequences, p.tokens_q, "cu_seqlens_q");
    check_lengths(p.cu_k, p.sequences, p.tokens_k, "cu_seqlens_k");
  }
  std::vector<Sequence> sequences;
  for (int64_t n = 0; n < p.sequences; n++) sequences.emplace_back(p, n);
  if (p.cos != nullptr) check_positions(p, sequences);
  return sequences;
}
}  // namespace attention

void attention_fwd(const AttentionProblem& problem, DType dtype, const AttentionForward& a) {
  using namespace attention;
  Problem p(problem);
  std::vector<Sequence> sequences = make_sequences(p);
  int64_t unit_rows;
  std::vector<Unit> units = make_units(p, sequences, unit_rows);
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    advise_huge_pages(a.out, p.batches() * p.tokens_q * p.heads * p.head_dim * sizeof(T));
#pragma omp parallel
    {
      Scratch<PanelUnit<T>> scratch(p, unit_rows);
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < units.size(); i++)
        forward_unit<T>(sequences[units[i].sequence], units[i], a, scratch);
    }
  });
}

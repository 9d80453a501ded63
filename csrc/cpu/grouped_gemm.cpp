// Grouped products: rows are gathered on load, weights are widened or decoded a tile at a time.
#include "grouped_gemm.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <utility>

#include "buffer.h"
#include "grouped_few.h"

namespace grouped {
namespace {
constexpr int64_t kRowBlock = 384;
constexpr int64_t kDepth = 256;                                      // of a packed chunk of weights
constexpr int64_t kPause = 16;                                       // to ask for memory
constexpr int64_t kGrain = kBlock % kNR == 0 ? kBlock : 3 * kBlock;  // of a tile's columns
constexpr int64_t kColumns = 256 / kGrain * kGrain;
// With no more rows than these an expert's weights are multiplied as they stream by, not packed.
constexpr int64_t kFewRows = 8, kFewRowsOfBlocks = 12;
constexpr int64_t kRuns = 8;  // of tiles, a thread

struct Nothing {
  void operator()() const {}
};

// c [MR][stride] (+)= a panel [depth][kMR] x b panel [depth][kNR], summed in steps; `between` is
// called every kPause of depth.
template <int MR, int64_t STEP = kDepthStep, typename Between = Nothing>
void multiply_panels(int64_t depth, const float* a, const float* b, float* c, int64_t stride,
                     bool first, const Between& between = {}) {
  vf acc[MR][kNV] = {};
  for (int64_t begin = 0; begin < depth; begin += STEP) {
    vf part[MR][kNV] = {};
    int64_t end = std::min(begin + STEP, depth), pause = 0;
    for (int64_t k = begin; k < end; k += pause) {
      between();
      pause = std::min(std::is_same_v<Between, Nothing> ? STEP : kPause, end - k);
      micro_kernel<MR, kNV>(pause, a + k * kMR, kMR, b + k * kNR, kNR, part);
    }
    for (int m = 0; m < MR; m++)
      for (int n = 0; n < kNV; n++) acc[m][n] += part[m][n];
  }
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < kNV; n++) {
      float* to = c + m * stride + n * kLanes;
      store(to, first ? acc[m][n] : load(to) + acc[m][n]);
    }
}

struct AskAhead {
  Lines& lines;
  int64_t count;
  void operator()() const { lines.ask(count); }
};

using Multiply = void (*)(int64_t, const float*, const float*, float*, int64_t, bool,
                          const AskAhead&);
template <size_t... I>
constexpr std::array<Multiply, sizeof...(I)> multiply_table(std::index_sequence<I...>) {
  return {&multiply_panels<I + 1, kDepthStep, AskAhead>...};
}
constexpr auto kMultiply = multiply_table(std::make_index_sequence<kMR>());

// Rows as panels [m / kMR][k][kMR]; the last panel's missing rows are never read.
void pack_rows(const Rows& rows, int64_t row, int64_t count, float* line, float* out) {
  for (int64_t m = 0; m < count; m++) {
    read_row(rows, row + m, 0, rows.width, line);
    float* to = out + m / kMR * kMR * rows.width + m % kMR;
    for (int64_t k = 0; k < rows.width; k++) to[k * kMR] = line[k];
  }
}

struct RowBlock {  // of an expert, sharing one reading of its weights
  int64_t expert, row, rows;
};

std::vector<RowBlock> row_blocks(const int32_t* offs, int64_t experts) {
  std::vector<RowBlock> blocks;
  for (int64_t e = 0; e < experts; e++) {
    int64_t rows = offs[e + 1] - offs[e], parts = (rows + kRowBlock - 1) / kRowBlock;
    int64_t each = parts > 0 ? round_up((rows + parts - 1) / parts, kMR) : 0;
    for (int64_t row = 0; row < rows; row += each)
      blocks.push_back({e, offs[e] + row, std::min(each, rows - row)});
  }
  return blocks;
}

bool takes_few(const Stack& b, int64_t rows) {
  if (b.scales != nullptr) return rows <= kFewRowsOfBlocks && !b.n_contiguous;
  return rows <= kFewRows;
}
}  // namespace

void read_row(const Rows& rows, int64_t s, int64_t begin, int64_t count, float* out) {
  int64_t at = (rows.index != nullptr ? rows.index[s] : s) * rows.width + begin;
  vf scale = splat(rows.scale != nullptr ? rows.scale[s] : 1.0f);
  with_dtype(rows.dtype, [&](auto tag) {
    auto* in = static_cast<const decltype(tag)*>(rows.data) + at;
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) store(out + k, load(in + k) * scale);
    if (k < count) {
      int rest = static_cast<int>(count - k);
      store_partial(out + k, load_partial(in + k, rest) * scale, rest);
    }
  });
}

void product(const int32_t* offs, int64_t experts, const std::vector<Segment>& segments,
             bool halves, const std::function<void(const Tile&)>& finish) {
  std::vector<RowBlock> blocks = row_blocks(offs, experts);
  int64_t most = 0, floats = 0, deepest = 0, n = segments[0].b.n;
  for (const RowBlock& block : blocks) most = std::max(most, block.rows);
  for (const Segment& s : segments) {
    floats += few_floats(s.a.width) * round_up(most, kMR);
    deepest = std::max(deepest, few_stride(s.a.width));
  }
  // Weights with contiguous n stream best in long rows.
  bool streams = most <= kFewRows && segments[0].b.scales == nullptr && segments[0].b.n_contiguous;
  int64_t span = halves ? n / 2 : n;
  int64_t width = streams
                      ? round_up((span + omp_get_max_threads() - 1) / omp_get_max_threads(), kGrain)
                      : kColumns / (halves ? 2 : 1);
  int64_t tiles = (span + width - 1) / width, stride = width * (halves ? 2 : 1);
  int64_t tasks = static_cast<int64_t>(blocks.size()) * tiles;
  // Weights that stream by do so best in long runs.
  bool runs = segments[0].b.scales != nullptr && takes_few(segments[0].b, most);
  int64_t run = runs ? std::max<int64_t>(1, tasks / (kRuns * omp_get_max_threads())) : 1;
#pragma omp parallel
  {
    Buffer<float> a(floats), b(panel_size(kDepth) * (stride / kNR)),
        c(round_up(most, kMR) * stride), line(deepest);
    const RowBlock* packed = nullptr;
#pragma omp for schedule(dynamic, run)
    for (int64_t task = 0; task < tasks; task++) {
      const RowBlock& block = blocks[task / tiles];
      int64_t begin = task % tiles * width;
      Columns columns{
          halves ? 2 : 1, {begin, begin + n / 2}, {0, width}, std::min(width, span - begin)};
      float* at = a.get();
      bool first = true;
      for (const Segment& s : segments) {
        Matrix matrix = matrix_of(s.b, block.expert);
        int64_t depth = s.a.width;
        if (takes_few(s.b, block.rows)) {
          if (packed != &block) copy_rows(s.a, s.b, block.row, block.rows, line.get(), at);
          multiply_few(s.a, matrix, block.rows, columns, at, c.get(), stride, first);
        } else {
          if (packed != &block) pack_rows(s.a, block.row, block.rows, line.get(), at);
          for (int64_t k = 0; k < depth; k += kDepth) {
            int64_t deep = std::min(kDepth, depth - k), next = std::min(kDepth, depth - k - deep);
            pack_weights(matrix, k, deep, columns, b.get());
            int64_t pauses = (block.rows + kMR - 1) / kMR * columns.parts *
                             ((columns.count + kNR - 1) / kNR) * ((deep + kPause - 1) / kPause);
            Lines lines(matrix, k + deep, next, columns);
            AskAhead ask{lines, (lines.count() + pauses - 1) / pauses};
            for (int64_t m = 0; m < block.rows; m += kMR) {
              Multiply multiply = kMultiply[std::min<int64_t>(kMR, block.rows - m) - 1];
              for (int part = 0; part < columns.parts; part++)
                for (int64_t j = 0; j < columns.count; j += kNR) {
                  int64_t place = columns.at[part] + j;
                  multiply(deep, at + m * depth + k * kMR, b.get() + place / kNR * panel_size(deep),
                           c.get() + m * stride + place, stride, first && k == 0, ask);
                }
            }
          }
        }
        first = false;
        at += few_floats(depth) * round_up(most, kMR);
      }
      packed = &block;
      finish({block.expert, block.row, block.rows, columns, c.get(), stride});
    }
  }
}

namespace {
constexpr int64_t kOuterRows = 240, kOuterColumns = 480, kOuterDepth = 512;
constexpr int64_t kRowStep = 32;  // gradients of one sign add up over an expert's rows

// Columns [begin, begin + count) of rows as panels [c / size][row][size], zero-padded.
void pack_slices(const Rows& rows, int64_t row, int64_t depth, int64_t begin, int64_t count,
                 int64_t size, float* line, float* out) {
  int64_t padded = round_up(count, size);
  std::fill(line + count, line + padded, 0.0f);
  for (int64_t d = 0; d < depth; d++) {
    read_row(rows, row + d, begin, count, line);
    for (int64_t c = 0; c < padded; c += size)
      std::copy_n(line + c, size, out + (c * depth + d * size));
  }
}

template <typename T>
void store_columns(T* out, const float* in, int64_t count, float factor) {
  for (int64_t n = 0; n < count; n += kLanes) {
    vf v = load(in + n) * factor;
    if (n + kLanes <= count)
      store(out + n, v);
    else
      store_partial(out + n, v, static_cast<int>(count - n));
  }
}
}  // namespace

void outer(const int32_t* offs, int64_t experts, const Rows& a, const Rows& b, float factor,
           DType dtype, void* out) {
  int64_t m_blocks = (a.width + kOuterRows - 1) / kOuterRows;
  int64_t n_blocks = (b.width + kOuterColumns - 1) / kOuterColumns;
  int64_t bytes = dtype == DType::kF32 ? 4 : 2;
  advise_huge_pages(out, experts * a.width * b.width * bytes);
#pragma omp parallel
  {
    int64_t columns = round_up(std::min(kOuterColumns, b.width), kNR);
    int64_t rows = round_up(std::min(kOuterRows, a.width), kMR);
    Buffer<float> pa(kOuterDepth * rows), pb(kOuterDepth * columns), c(rows * columns),
        line(std::max(rows, columns) + kLanes);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < experts * m_blocks * n_blocks; task++) {
      int64_t e = task / (m_blocks * n_blocks), m0 = task / n_blocks % m_blocks * kOuterRows;
      int64_t n0 = task % n_blocks * kOuterColumns;
      int64_t m_count = std::min(kOuterRows, a.width - m0);
      int64_t n_count = std::min(kOuterColumns, b.width - n0);
      if (offs[e] == offs[e + 1]) std::fill_n(c.get(), rows * columns, 0.0f);
      for (int64_t s = offs[e]; s < offs[e + 1]; s += kOuterDepth) {
        int64_t depth = std::min<int64_t>(kOuterDepth, offs[e + 1] - s);
        pack_slices(a, s, depth, m0, m_count, kMR, line.get(), pa.get());
        pack_slices(b, s, depth, n0, n_count, kNR, line.get(), pb.get());
        for (int64_t n = 0; n < n_count; n += kNR)
          for (int64_t m = 0; m < m_count; m += kMR)
            multiply_panels<kMR, kRowStep>(depth, pa.get() + m * depth, pb.get() + n * depth,
                                           c.get() + m * columns + n, columns, s == offs[e]);
      }
      with_dtype(dtype, [&](auto tag) {
        using T = decltype(tag);
        T* to = static_cast<T*>(out) + (e * a.width + m0) * b.width + n0;
        for (int64_t m = 0; m < m_count; m++)
          store_columns(to + m * b.width, c.get() + m * columns, n_count, factor);
      });
    }
  }
}

void column_sums(const int32_t* offs, int64_t experts, const Rows& a, DType dtype, void* out) {
#pragma omp parallel
  {
    int64_t padded = round_up(a.width, kLanes);
    Buffer<float> line(padded), part(padded), total(padded);
#pragma omp for schedule(dynamic)
    for (int64_t e = 0; e < experts; e++) {
      std::fill_n(total.get(), padded, 0.0f);
      for (int64_t s = offs[e]; s < offs[e + 1]; s += kRowStep) {
        std::fill_n(part.get(), padded, 0.0f);
        for (int64_t i = s; i < std::min<int64_t>(s + kRowStep, offs[e + 1]); i++) {
          read_row(a, i, 0, a.width, line.get());
          for (int64_t n = 0; n < a.width; n++) part[n] += line[n];
        }
        for (int64_t n = 0; n < a.width; n++) total[n] += part[n];
      }
      with_dtype(dtype, [&](auto tag) {
        using T = decltype(tag);
        store_columns(static_cast<T*>(out) + e * a.width, total.get(), a.width, 1.0f);
      });
    }
  }
}
}  // namespace grouped

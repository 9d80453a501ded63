// Grouped products: rows are gathered on load, weights are widened or decoded a tile at a time.
#include "grouped_gemm.h"

#include <omp.h>

#include <algorithm>
#include <array>
#include <utility>

#include "buffer.h"
#include "dispatch.h"
#include "mxfp4_decode.h"
#include "vmath.h"

namespace grouped {
namespace {
constexpr int64_t kRowBlock = 384;
constexpr int64_t kDepth = 384;                                      // of a packed chunk of weights
constexpr int64_t kGrain = kBlock % kNR == 0 ? kBlock : 3 * kBlock;  // of a tile's columns
constexpr int64_t kColumns = 256 / kGrain * kGrain;
constexpr int64_t kFewRows = 8;  // weights are multiplied as they stream by, not packed

struct Matrix {  // one expert's
  const Stack* of;
  const void* data;
  const uint8_t* scales;
};

Matrix matrix_of(const Stack& stack, int64_t expert) {
  int64_t size = stack.k * stack.n;
  if (stack.scales != nullptr)
    return {&stack, static_cast<const uint8_t*>(stack.data) + expert * size / 2,
            stack.scales + expert * size / kBlock};
  int64_t bytes = stack.dtype == DType::kF32 ? 4 : 2;
  return {&stack, static_cast<const char*>(stack.data) + expert * size * bytes, nullptr};
}

// Where column c of a packed chunk of `depth` rows lies: panels [c / kNR][k][kNR].
inline float* packed_at(float* out, int64_t depth, int64_t k, int64_t c) {
  return out + (c / kNR * depth + k) * kNR + c % kNR;
}

// Columns [n0, n0 + count) and rows [k0, k0 + depth) to places [at, at + round_up(count, kNR)).
template <typename T>
void pack_wide_rows(const T* data, int64_t ld, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                    float* out, int64_t at) {
  int64_t padded = round_up(count, kNR);
  for (int64_t k = 0; k < depth; k++) {
    const T* row = data + (k0 + k) * ld + n0;
    for (int64_t c = 0; c < padded; c += kLanes) {
      vf v = c + kLanes <= count
                 ? load(row + c)
                 : load_partial(row + c, static_cast<int>(std::max<int64_t>(0, count - c)));
      store(packed_at(out, depth, k, at + c), v);
    }
  }
}

template <typename T>
void pack_deep_rows(const T* data, int64_t ld, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                    float* out, int64_t at) {
  int64_t padded = round_up(count, kNR);
  for (int64_t c = 0; c < padded; c += kLanes)
    for (int64_t k = 0; k < depth; k += kLanes) {
      int deep = static_cast<int>(std::min<int64_t>(kLanes, depth - k));
      vf r[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const T* row = data + (n0 + c + i) * ld + k0 + k;
        r[i] = c + i >= count ? vf{} : deep == kLanes ? load(row) : load_partial(row, deep);
      }
      transpose(r);
      for (int i = 0; i < deep; i++) store(packed_at(out, depth, k + i, at + c), r[i]);
    }
}

// Blocks along n: a block of 16 bytes is 32 columns of one k.
void pack_wide_blocks(const Matrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                      float* out, int64_t at) {
  int64_t ld = b.of->n / kBlock;
  for (int64_t k = 0; k < depth; k++) {
    int64_t first = (k0 + k) * ld + n0 / kBlock;
    for (int64_t c = 0; c < count; c += kBlock) {
      int64_t block = first + c / kBlock;
      const uint8_t* bytes = static_cast<const uint8_t*>(b.data) + block * kBlockBytes;
      vf scale = splat(kMxfp4Scales.value[b.scales[block]]);
      for (int i = 0; i < kBlockBytes; i += kLanes) {
        vu codes = load_bytes(bytes + i);
        vf even = decode(codes) * scale, odd = decode(codes >> 4) * scale;
        store(packed_at(out, depth, k, at + c + 2 * i), riffle_low(even, odd));
        store(packed_at(out, depth, k, at + c + 2 * i + kLanes), riffle_high(even, odd));
      }
    }
    for (int64_t c = count; c < round_up(count, kNR); c += kLanes)
      store(packed_at(out, depth, k, at + c), vf{});
  }
}

// Blocks along k: the bytes of 16 columns are transposed, so that a vector is one k of them.
void pack_deep_blocks(const Matrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t count,
                      float* out, int64_t at) {
  int64_t ld = b.of->k / kBlock, padded = round_up(count, kNR);
  for (int64_t c = 0; c < padded; c += 16)
    for (int64_t k = 0; k < depth; k += kBlock) {
      Bytes16 r[16];
      float scale[16];
      for (int i = 0; i < 16; i++) {
        int64_t block = (n0 + c + i) * ld + (k0 + k) / kBlock;
        bool there = c + i < count;
        r[i] = Bytes16{};
        if (there)
          std::memcpy(&r[i], static_cast<const uint8_t*>(b.data) + block * kBlockBytes, 16);
        scale[i] = there ? kMxfp4Scales.value[b.scales[block]] : 0.0f;
      }
      transpose_bytes(r);
      for (int j = 0; j < 16; j++) {
        uint8_t bytes[16];
        std::memcpy(bytes, &r[j], 16);
        for (int i = 0; i < 16 && c + i < padded; i += kLanes) {
          vu codes = load_bytes(bytes + i);
          vf s = load(scale + i);
          store(packed_at(out, depth, k + 2 * j, at + c + i), decode(codes) * s);
          store(packed_at(out, depth, k + 2 * j + 1, at + c + i), decode(codes >> 4) * s);
        }
      }
    }
}

void pack_weights(const Matrix& b, int64_t k0, int64_t depth, const Columns& columns, float* out) {
  for (int part = 0; part < columns.parts; part++) {
    int64_t n0 = columns.begin[part], at = columns.at[part], count = columns.count;
    const Stack& of = *b.of;
    if (of.scales != nullptr) {
      (of.n_contiguous ? pack_wide_blocks : pack_deep_blocks)(b, k0, depth, n0, count, out, at);
      continue;
    }
    with_dtype(of.dtype, [&](auto tag) {
      auto* data = static_cast<const decltype(tag)*>(b.data);
      if (of.n_contiguous)
        pack_wide_rows(data, of.n, k0, depth, n0, count, out, at);
      else
        pack_deep_rows(data, of.k, k0, depth, n0, count, out, at);
    });
  }
}

// c [MR][stride] (+)= a panel [depth][kMR] x b panel [depth][kNR], summed in steps
template <int MR, int64_t STEP = kDepthStep>
void multiply_panels(int64_t depth, const float* a, const float* b, float* c, int64_t stride,
                     bool first) {
  vf acc[MR][kNV] = {};
  for (int64_t k = 0; k < depth; k += STEP) {
    vf part[MR][kNV] = {};
    micro_kernel<MR, kNV>(std::min(STEP, depth - k), a + k * kMR, kMR, b + k * kNR, kNR, part);
    for (int m = 0; m < MR; m++)
      for (int n = 0; n < kNV; n++) acc[m][n] += part[m][n];
  }
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < kNV; n++) {
      float* to = c + m * stride + n * kLanes;
      store(to, first ? acc[m][n] : load(to) + acc[m][n]);
    }
}

using Multiply = void (*)(int64_t, const float*, const float*, float*, int64_t, bool);
template <size_t... I>
constexpr std::array<Multiply, sizeof...(I)> multiply_table(std::index_sequence<I...>) {
  return {&multiply_panels<I + 1>...};
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

// Few rows: each weight is read once, from memory, and multiplied with all of them.

// Rows as they are, padded with zeros to `stride`; against blocks along k, each block's even
// places come before its odd ones, as they leave the bytes.
void copy_rows(const Rows& rows, int64_t row, int64_t count, bool in_blocks, int64_t stride,
               float* line, float* out) {
  for (int64_t m = 0; m < count; m++) {
    float* to = out + m * stride;
    read_row(rows, row + m, 0, rows.width, in_blocks ? line : to);
    if (in_blocks)
      for (int64_t k = 0; k < rows.width; k += kBlock)
        for (int i = 0; i < kBlockBytes; i++) {
          to[k + i] = line[k + 2 * i];
          to[k + kBlockBytes + i] = line[k + 2 * i + 1];
        }
    std::fill(to + rows.width, to + stride, 0.0f);
  }
}

// sums[m][i] += weights of output i times row m, lane by lane; NB outputs share the rows' loads.
template <int MR, int NB, typename T>
void dots(const T* const (&w)[NB], int64_t depth, const float* a, int64_t stride,
          vf (*sums)[kLanes]) {
  vf acc[MR][NB] = {};
  int64_t whole = depth / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes)
    for (int i = 0; i < NB; i++) {
      vf v = load(w[i] + k);
      for (int m = 0; m < MR; m++) acc[m][i] += v * load(a + m * stride + k);
    }
  for (int i = 0; i < NB && whole < depth; i++) {
    vf v = load_partial(w[i] + whole, static_cast<int>(depth - whole));
    for (int m = 0; m < MR; m++) acc[m][i] += v * load(a + m * stride + whole);
  }
  for (int m = 0; m < MR; m++)
    for (int i = 0; i < NB; i++) sums[m][i] = acc[m][i];
}

struct PackedRow {
  const uint8_t *bytes, *scales;
};

template <int MR, int NB>
void dots(const PackedRow (&w)[NB], int64_t depth, const float* a, int64_t stride,
          vf (*sums)[kLanes]) {
  vf acc[MR][NB] = {};
  for (int64_t block = 0; block < depth / kBlock; block++) {
    const float* rows = a + block * kBlock;
#pragma GCC unroll 4
    for (int i = 0; i < NB; i++) {
      vf scale = splat(kMxfp4Scales.value[w[i].scales[block]]);
      vf part[MR] = {};
#pragma GCC unroll 4
      for (int j = 0; j < kBlockBytes; j += kLanes) {
        vu codes = load_bytes(w[i].bytes + block * kBlockBytes + j);
        vf even = decode(codes), odd = decode(codes >> 4);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) {
          part[m] += even * load(rows + m * stride + j);
          part[m] += odd * load(rows + m * stride + kBlockBytes + j);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) acc[m][i] += part[m] * scale;
    }
  }
  for (int m = 0; m < MR; m++)
    for (int i = 0; i < NB; i++) sums[m][i] = acc[m][i];
}

// c[m][0, kLanes) (+)= MR rows times kLanes outputs, whose weights `row_of` finds.
template <int MR, int NB, typename Row, typename RowOf>
void few_outputs(const RowOf& row_of, int live, int64_t depth, const float* a, int64_t stride,
                 float* c, int64_t c_stride, bool first) {
  vf sums[MR][kLanes];
  for (int i = 0; i < kLanes; i += NB) {
    Row w[NB];
    for (int j = 0; j < NB; j++) w[j] = row_of(std::min(i + j, live - 1));
    vf part[MR][kLanes];
    dots<MR>(w, depth, a, stride, part);
    for (int m = 0; m < MR; m++)
      for (int j = 0; j < NB; j++) sums[m][i + j] = part[m][j];
    if (i + NB >= live)
      for (int m = 0; m < MR; m++)
        for (int j = i + NB; j < kLanes; j++) sums[m][j] = vf{};
    if (i + NB >= live) break;
  }
  for (int m = 0; m < MR; m++) {
    transpose(sums[m]);
    vf total = sums[m][0];
    for (int i = 1; i < kLanes; i++) total += sums[m][i];
    float* to = c + m * c_stride;
    store(to, first ? total : load(to) + total);
  }
}

template <typename Row, typename RowOf>
void few_rows(const RowOf& row_of, int64_t count, int64_t rows, int64_t depth, const float* a,
              int64_t stride, float* c, int64_t c_stride, bool first) {
  for (int64_t n = 0; n < count; n += kLanes) {
    int live = static_cast<int>(std::min<int64_t>(kLanes, count - n));
    auto at = [&](int i) { return row_of(n + i); };
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)
      few_outputs<4, 2, Row>(at, live, depth, a + m * stride, stride, c + m * c_stride + n,
                             c_stride, first);
    if (m + 2 <= rows) {
      few_outputs<2, 4, Row>(at, live, depth, a + m * stride, stride, c + m * c_stride + n,
                             c_stride, first);
      m += 2;
    }
    if (m < rows)
      few_outputs<1, 4, Row>(at, live, depth, a + m * stride, stride, c + m * c_stride + n,
                             c_stride, first);
  }
}

// c[m][n] += sum over STEP rows of weights w[k][n] a[m][k]
template <int MR, int STEP, typename T>
void add_rows(const T* w, int64_t ld, int64_t count, const float* a, int64_t stride, float* c,
              int64_t c_stride) {
  for (int64_t n = 0; n < count; n += kLanes) {
    vf sum[MR];
    for (int m = 0; m < MR; m++) sum[m] = load(c + m * c_stride + n);
    int live = static_cast<int>(std::min<int64_t>(kLanes, count - n));
#pragma GCC unroll 8
    for (int k = 0; k < STEP; k++) {
      vf v = live == kLanes ? load(w + k * ld + n) : load_partial(w + k * ld + n, live);
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) sum[m] += v * a[m * stride + k];
    }
    for (int m = 0; m < MR; m++) store(c + m * c_stride + n, sum[m]);
  }
}

template <int MR, typename T>
void stream_rows(const T* w, int64_t ld, int64_t depth, int64_t count, const float* a,
                 int64_t stride, float* c, int64_t c_stride) {
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) add_rows<MR, 8>(w + k * ld, ld, count, a + k, stride, c, c_stride);
  for (; k < depth; k++) add_rows<MR, 1>(w + k * ld, ld, count, a + k, stride, c, c_stride);
}

void multiply_few(const Matrix& b, int64_t rows, const Columns& columns, const float* a,
                  int64_t stride, float* c, int64_t c_stride, bool first) {
  const Stack& of = *b.of;
  for (int part = 0; part < columns.parts; part++) {
    int64_t n0 = columns.begin[part], count = columns.count;
    float* to = c + columns.at[part];
    if (of.scales != nullptr) {
      int64_t blocks = of.k / kBlock;
      auto row_of = [&](int64_t n) {
        return PackedRow{static_cast<const uint8_t*>(b.data) + (n0 + n) * blocks * kBlockBytes,
                         b.scales + (n0 + n) * blocks};
      };
      few_rows<PackedRow>(row_of, count, rows, of.k, a, stride, to, c_stride, first);
      continue;
    }
    with_dtype(of.dtype, [&](auto tag) {
      using T = decltype(tag);
      auto* data = static_cast<const T*>(b.data);
      if (!of.n_contiguous) {
        auto row_of = [&](int64_t n) { return data + (n0 + n) * of.k; };
        few_rows<const T*>(row_of, count, rows, of.k, a, stride, to, c_stride, first);
        return;
      }
      for (int64_t m = 0; first && m < rows; m++)
        std::fill_n(to + m * c_stride, round_up(count, kLanes), 0.0f);
      int64_t m = 0;
      for (; m + 2 <= rows; m += 2)
        stream_rows<2>(data + n0, of.n, of.k, count, a + m * stride, stride, to + m * c_stride,
                       c_stride);
      if (m < rows)
        stream_rows<1>(data + n0, of.n, of.k, count, a + m * stride, stride, to + m * c_stride,
                       c_stride);
    });
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
  return rows <= kFewRows && !(b.scales != nullptr && b.n_contiguous);
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
    floats += round_up(s.a.width, kBlock) * round_up(most, kMR);
    deepest = std::max(deepest, s.a.width);
  }
  // Weights with contiguous n stream best in long rows.
  bool streams = most <= kFewRows && segments[0].b.scales == nullptr && segments[0].b.n_contiguous;
  int64_t span = halves ? n / 2 : n;
  int64_t width = streams
                      ? round_up((span + omp_get_max_threads() - 1) / omp_get_max_threads(), kGrain)
                      : kColumns / (halves ? 2 : 1);
  int64_t tiles = (span + width - 1) / width, stride = width * (halves ? 2 : 1);
#pragma omp parallel
  {
    Buffer<float> a(floats), b(kDepth * stride), c(round_up(most, kMR) * stride), line(deepest);
    const RowBlock* packed = nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < static_cast<int64_t>(blocks.size()) * tiles; task++) {
      const RowBlock& block = blocks[task / tiles];
      int64_t begin = task % tiles * width;
      Columns columns{
          halves ? 2 : 1, {begin, begin + n / 2}, {0, width}, std::min(width, span - begin)};
      float* at = a.get();
      bool first = true;
      for (const Segment& s : segments) {
        Matrix matrix = matrix_of(s.b, block.expert);
        int64_t depth = s.a.width, row_stride = round_up(depth, kBlock);
        if (takes_few(s.b, block.rows)) {
          if (packed != &block)
            copy_rows(s.a, block.row, block.rows, s.b.scales != nullptr, row_stride, line.get(),
                      at);
          multiply_few(matrix, block.rows, columns, at, row_stride, c.get(), stride, first);
        } else {
          if (packed != &block) pack_rows(s.a, block.row, block.rows, line.get(), at);
          for (int64_t k = 0; k < depth; k += kDepth) {
            int64_t deep = std::min(kDepth, depth - k);
            pack_weights(matrix, k, deep, columns, b.get());
            for (int64_t m = 0; m < block.rows; m += kMR) {
              Multiply multiply = kMultiply[std::min<int64_t>(kMR, block.rows - m) - 1];
              for (int part = 0; part < columns.parts; part++)
                for (int64_t j = 0; j < columns.count; j += kNR) {
                  int64_t place = columns.at[part] + j;
                  multiply(deep, at + m * depth + k * kMR, b.get() + place * deep,
                           c.get() + m * stride + place, stride, first && k == 0);
                }
            }
          }
        }
        first = false;
        at += row_stride * round_up(most, kMR);
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

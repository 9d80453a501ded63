// Few rows against one expert's weights: no packing, each weight is multiplied as it streams by.
#pragma once

#include "grouped_splits.h"

namespace grouped {
// Of three splits; more rows are faster in floats.
constexpr int64_t kFewFloats = 2;

// Against floats: each block's even places come before its odd ones, as they leave the bytes.
inline void arrange(float* line, int64_t width, float* out) {
  for (int64_t k = 0; k < width; k += kBlock)
    for (int i = 0; i < kBlockBytes; i++) {
      out[k + i] = line[k + 2 * i];
      out[k + kBlockBytes + i] = line[k + 2 * i + 1];
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

template <int MR, int NB>
void dots(const PackedRow (&w)[NB], int64_t depth, const float* a, int64_t stride,
          vf (*sums)[kLanes]) {
  vf acc[MR][NB] = {};
  // Rows are too short for the hardware to see them coming; one alone is a stream of all of them.
  int64_t ahead = NB == 1 ? 4096 : NB * depth / 2;
  for (int64_t block = 0; block < depth / kBlock; block++) {
    const float* rows = a + block * kBlock;
#pragma GCC unroll 4
    for (int i = 0; i < NB; i++) {
      __builtin_prefetch(w[i].bytes + block * kBlockBytes + ahead);
      vf scale = splat(kMxfp4Scales.value[w[i].scales[block]]);
      vf part = {};  // of a single row, scaled once instead of each weight
#pragma GCC unroll 4
      for (int j = 0; j < kBlockBytes; j += kLanes) {
        vu codes = load_bytes(w[i].bytes + block * kBlockBytes + j);
        vf even = decode(codes), odd = decode(codes >> 4);
        if constexpr (MR == 1) {
          part += even * load(rows + j);
          part += odd * load(rows + kBlockBytes + j);
          continue;
        }
        even *= scale, odd *= scale;
#pragma GCC unroll 8
        for (int m = 0; m < MR; m++) {
          acc[m][i] += even * load(rows + m * stride + j);
          acc[m][i] += odd * load(rows + m * stride + kBlockBytes + j);
        }
      }
      if constexpr (MR == 1) acc[0][i] += part * scale;
    }
  }
  for (int m = 0; m < MR; m++)
    for (int i = 0; i < NB; i++) sums[m][i] = acc[m][i];
}

// c[m][0, kLanes) (+)= MR rows times kLanes outputs, whose weights `row_of` finds.
template <int MR, int NB, typename Row, typename RowOf, typename A>
void few_outputs(const RowOf& row_of, int live, int64_t depth, const A* a, int64_t stride, float* c,
                 int64_t c_stride, bool first) {
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

template <typename Row, typename RowOf, typename A>
void few_rows(const RowOf& row_of, int64_t count, int64_t rows, int64_t depth, const A* a,
              int64_t stride, float* c, int64_t c_stride, bool first) {
  constexpr bool kFloats = std::is_same_v<A, float>;
  constexpr int kAlone = kFloats ? 1 : 4, kMany = kFloats && kLanes == 16 ? 2 : 1;
  for (int64_t n = 0; n < count; n += kLanes) {
    int live = static_cast<int>(std::min<int64_t>(kLanes, count - n));
    auto at = [&](int i) { return row_of(n + i); };
    int64_t m = 0;
    for (; m + 8 <= rows; m += 8)
      few_outputs<8, kMany, Row>(at, live, depth, a + m * stride, stride, c + m * c_stride + n,
                                 c_stride, first);
    for (; m + 4 <= rows; m += 4)
      few_outputs<4, 2, Row>(at, live, depth, a + m * stride, stride, c + m * c_stride + n,
                             c_stride, first);
    if (m + 2 <= rows) {
      few_outputs<2, 4, Row>(at, live, depth, a + m * stride, stride, c + m * c_stride + n,
                             c_stride, first);
      m += 2;
    }
    if (m < rows)
      few_outputs<1, kAlone, Row>(at, live, depth, a + m * stride, stride, c + m * c_stride + n,
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

template <int STEP, typename T>
void stream_rows(const T* w, int64_t ld, int64_t count, int64_t rows, const float* a,
                 int64_t stride, float* c, int64_t c_stride) {
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2)
    add_rows<2, STEP>(w, ld, count, a + m * stride, stride, c + m * c_stride, c_stride);
  if (m < rows) add_rows<1, STEP>(w, ld, count, a + m * stride, stride, c + m * c_stride, c_stride);
}

// How many bf16 a value of these rows is the sum of, against blocks along k; 0: rows stay floats.
inline int splits_of(const Rows& a, const Stack& b, int64_t rows) {
#if defined(__AVX512BF16__)
  if (b.scales == nullptr) return 0;
  int splits = a.scale != nullptr ? 3 : (a.bits + 7) / 8;
  return splits < 3 || rows <= kFewFloats ? splits : 0;
#else
  (void)a, (void)b, (void)rows;
  return 0;
#endif
}

// Calls run(rows) on memory of floats as what dots() takes from it.
template <typename Run>
void with_splits(int splits, float* a, const Run& run) {
#if defined(__AVX512BF16__)
  if (splits == 1) return run(reinterpret_cast<Split<1>*>(a));
  if (splits == 2) return run(reinterpret_cast<Split<2>*>(a));
  if (splits == 3) return run(reinterpret_cast<Split<3>*>(a));
#endif
  run(a);
}

// From one row to the next: elements of any kind, and floats of memory.
inline int64_t few_stride(int64_t depth) { return round_up(depth, kGroup); }
inline int64_t few_floats(int64_t depth) { return few_stride(depth) * 3 / 2; }

// Rows as multiply_few() takes them, padded with zeros.
inline void copy_rows(const Rows& rows, const Stack& b, int64_t row, int64_t count, float* line,
                      float* out) {
  int64_t stride = few_stride(rows.width);
  std::fill(line + rows.width, line + stride, 0.0f);
  with_splits(splits_of(rows, b, count), out, [&](auto* copied) {
    for (int64_t m = 0; m < count; m++) {
      read_row(rows, row + m, 0, rows.width, line);
      if (b.scales != nullptr)
        arrange(line, stride, copied + m * stride);
      else
        std::copy_n(line, stride, out + m * stride);
    }
  });
}

// c (+)= rows, as copy_rows() left them in `a`, times columns of b
inline void multiply_few(const Rows& from, const Matrix& b, int64_t rows, const Columns& columns,
                         float* a, float* c, int64_t c_stride, bool first) {
  const Stack& of = *b.of;
  int64_t stride = few_stride(of.k);
  for (int part = 0; part < columns.parts; part++) {
    int64_t n0 = columns.begin[part], count = columns.count;
    float* to = c + columns.at[part];
    if (of.scales != nullptr) {
      int64_t blocks = of.k / kBlock;
      auto row_of = [&](int64_t n) {
        return PackedRow{static_cast<const uint8_t*>(b.data) + (n0 + n) * blocks * kBlockBytes,
                         b.scales + (n0 + n) * blocks};
      };
      with_splits(splits_of(from, of, rows), a, [&](auto* copied) {
        few_rows<PackedRow>(row_of, count, rows, of.k, copied, stride, to, c_stride, first);
      });
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
      int64_t k = 0;
      for (; k + 8 <= of.k; k += 8)
        stream_rows<8>(data + k * of.n + n0, of.n, count, rows, a + k, stride, to, c_stride);
      for (; k < of.k; k++)
        stream_rows<1>(data + k * of.n + n0, of.n, count, rows, a + k, stride, to, c_stride);
    });
  }
}
}  // namespace grouped

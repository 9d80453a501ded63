// Products of expert-sorted rows with one matrix an expert, a tile of rows x columns at a time.
//
// S rows sorted by expert, E experts; a product is [rows, K] x [K, N]. Nothing is atomic, and each
// element is summed in an order that depends on shapes only.
#pragma once

#include <functional>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace grouped {

// S rows in some dtype; row s is the index[s]-th of data, scaled by scale[s].
struct Rows {
  const void* data;
  DType dtype;
  int64_t width;
  const int32_t* index = nullptr;  // null: s itself
  const float* scale = nullptr;    // null: 1
  int bits = 24;                   // of a value's mantissa that count
};

// E matrices [k, n]: dense with k or n contiguous, or MXFP4 with blocks along the contiguous one.
struct Stack {
  const void* data;
  const uint8_t* scales;  // null: dense
  DType dtype;            // of dense data
  bool n_contiguous;
  int64_t k, n;
};

struct Segment {  // one summand of a product: a [S, k] x b [k, n]
  Rows a;
  Stack b;
};

// The columns of a tile: one range, or a range of gates and the same range of ups.
struct Columns {
  int parts;
  int64_t begin[2], at[2];  // first column, and its place in the tile
  int64_t count;            // of each part
};

struct Tile {
  int64_t expert, row, rows;
  Columns columns;
  float* c;  // [rows][stride], whose padding is undefined
  int64_t stride;
};

// Sums the segments (of one n) tile by tile; `finish` gets each finished tile, on any thread. With
// `halves` a tile holds columns j and n / 2 + j of equal ranges. Tiles begin at multiples of 32.
void product(const int32_t* offs, int64_t experts, const std::vector<Segment>& segments,
             bool halves, const std::function<void(const Tile&)>& finish);

// out [E, M, N] in `dtype` = factor * sum over an expert's rows of a[s][m] b[s][n].
void outer(const int32_t* offs, int64_t experts, const Rows& a, const Rows& b, float factor,
           DType dtype, void* out);

// out [E, width] in `dtype` = sum of each expert's rows.
void column_sums(const int32_t* offs, int64_t experts, const Rows& a, DType dtype, void* out);

// Row s of `rows` from column `begin` on, widened and scaled, to out[0, count).
void read_row(const Rows& rows, int64_t s, int64_t begin, int64_t count, float* out);
}  // namespace grouped

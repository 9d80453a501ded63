// Packed patch embedding: pixels are read once, normalised into register-tile panels, projected,
// and land on output rows that already hold bias and interpolated position.
#include "patch_embed.h"

#include <omp.h>

#include "dispatch.h"

namespace {
constexpr int kTilePanels = 8;
constexpr int kTileRows = kTilePanels * kMR;

// B panels of the projection: panel[n][unit][kNR] from weight[n * kNR + j][column[k]]
template <typename Unit, typename T>
void pack_weight(const T* weight, Unit* panels, const std::vector<int64_t>& column, int64_t width,
                 int64_t depth) {
  constexpr int per = units_per<Unit>;
  int64_t count = round_up(width, kNR) / kNR, units = (depth + per - 1) / per;
#pragma omp parallel
  {
    Buffer<float> row(units * per);
    std::fill_n(row.get(), units * per, 0.0f);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < count; n++)
      for (int64_t j = 0; j < kNR; j++) {
        int64_t d = n * kNR + j;
        Unit* out = panels + n * units * kNR + j;
        if (d < width)
          for (int64_t k = 0; k < depth; k++) row[k] = to_float(weight[d * depth + column[k]]);
        for (int64_t u = 0; u < units; u++)
          out[u * kNR] = d < width ? make_unit<Unit>(row.get() + u * per) : Unit{0};
      }
  }
}

// Writes acc + start to columns [column, column + kNR) of an output row, clipped to `width`.
template <typename T>
inline void store_row(T* out, const vf (&acc)[kNV], const float* start, int64_t column,
                      int64_t width) {
  for (int n = 0; n < kNV; n++) {
    int64_t at = column + n * kLanes;
    vf value = acc[n] + load(start + at);
    if (at + kLanes <= width)
      store(out + at, value);
    else if (at < width)
      store_partial(out + at, value, static_cast<int>(width - at));
  }
}

template <typename T>
void forward_typed(const Problem& p, const T* weight, const T* bias, const float* table,
                   const T* prefix, T* tokens, int32_t* coords) {
  Layout layout(p);
  Normalisation norm(p);
  TapTable taps(p, layout);
  using Unit = PanelUnit<T>;
  constexpr int per = units_per<Unit>;
  int64_t depth = depth_of(p), units = (depth + per - 1) / per;
  int64_t padded = round_up(p.width, kNR), panels = padded / kNR;
  Buffer<Unit> weight_panels(padded * units);
  Buffer<float> start_row(padded);
  pack_weight(weight, weight_panels.get(), weight_columns(p), p.width, depth);
  std::fill_n(start_row.get(), padded, 0.0f);
  if (bias != nullptr)
    for (int64_t d = 0; d < p.width; d++) start_row[d] = to_float(bias[d]);
  Buffer<float> wide_table(p.grid * p.grid * padded);
  if (p.grid > 0)
    for (int64_t cell = 0; cell < p.grid * p.grid; cell++) {
      float* out = wide_table.get() + cell * padded;
      std::copy_n(table + cell * p.width, p.width, out);
      std::fill(out + p.width, out + padded, 0.0f);
    }

  int64_t total = p.patches + p.images * p.prefix_rows;
  advise_huge_pages(tokens, total * p.width * static_cast<int64_t>(sizeof(T)));
  for (int64_t n = 0; n < p.images; n++)
    for (int64_t r = 0; r < p.prefix_rows; r++) {
      int64_t at = layout.first_patch[n] + n * p.prefix_rows + r;
      std::copy_n(prefix + r * p.width, p.width, tokens + at * p.width);
      coords[2 * at] = coords[2 * at + 1] = -1;
    }

  int64_t tiles = (p.patches + kTileRows - 1) / kTileRows;
#pragma omp parallel
  {
    Buffer<Unit> a(units * kTileRows);
    Buffer<float> row(units * per), start(kTileRows * padded);
    std::fill_n(row.get(), units * per, 0.0f);
    Buffer<float> blended(p.grid * padded);  // the table's rows blended for one row of patches
    int64_t blended_image = -1, blended_y = -1;
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; tile++) {
      int64_t first = tile * kTileRows, rows = std::min<int64_t>(kTileRows, p.patches - first);
      T* out_rows[kTileRows];
      Cursor at(layout, first);
      for (int64_t m = 0; m < rows; m++, at.advance()) {
        read_patch(p, layout, norm, at, row.get());
        Unit* panel = a.get() + m / kMR * kMR * units + m % kMR;
        for (int64_t u = 0; u < units; u++) panel[u * kMR] = make_unit<Unit>(row.get() + u * per);
        int64_t out_row = at.patch + (at.image + 1) * p.prefix_rows;
        out_rows[m] = tokens + out_row * p.width;
        coords[2 * out_row] = static_cast<int32_t>(at.y);
        coords[2 * out_row + 1] = static_cast<int32_t>(at.x);

        float* begin = start.get() + m * padded;
        std::copy_n(start_row.get(), padded, begin);
        if (p.grid == 0) continue;
        if (at.image != blended_image || at.y != blended_y) {
          blended_image = at.image, blended_y = at.y;
          const Taps& t = *taps.rows[at.image];
          std::fill_n(blended.get(), p.grid * padded, 0.0f);
          for (int j = 0; j < t.count[at.y]; j++)
            add_scaled(blended.get(), wide_table.get() + (t.first[at.y] + j) * p.grid * padded,
                       t.weight[at.y * t.most + j], p.grid * padded);
        }
        const Taps& t = *taps.columns[at.image];
        for (int j = 0; j < t.count[at.x]; j++)
          add_scaled(begin, blended.get() + (t.first[at.x] + j) * padded,
                     t.weight[at.x * t.most + j], padded);
      }
      for (int64_t m = rows; m < round_up(rows, kMR); m++) {
        Unit* panel = a.get() + m / kMR * kMR * units + m % kMR;
        for (int64_t u = 0; u < units; u++) panel[u * kMR] = Unit{0};
      }
      for (int64_t n = 0; n < panels; n++)
        for (int64_t mp = 0; mp * kMR < rows; mp++) {
          vf acc[kMR][kNV] = {};
          gemm_micro_kernel(units, a.get() + mp * kMR * units,
                            weight_panels.get() + n * units * kNR, acc);
          for (int64_t m = 0; m < std::min<int64_t>(kMR, rows - mp * kMR); m++)
            store_row(out_rows[mp * kMR + m], acc[m], start.get() + (mp * kMR + m) * padded,
                      n * kNR, p.width);
        }
    }
  }
}
}  // namespace

void patch_embed_fwd(const Problem& p, const PatchEmbedForward& f) {
  with_dtype(f.dtype, [&](auto tag) {
    using T = decltype(tag);
    forward_typed<T>(p, static_cast<const T*>(f.weight), static_cast<const T*>(f.bias), f.table,
                     static_cast<const T*>(f.prefix), static_cast<T*>(f.tokens), f.coords);
  });
}

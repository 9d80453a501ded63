// Packed patch embedding: pixels are read once, normalised into register-tile panels, projected,
// and land on output rows that already hold bias and interpolated position.
//
// N images, T patches in all, R prefix rows an image, P patch side, K = 3 P P, D width,
// G side of the position table. uint8 pixels are HWC and K runs (py, px, c); float pixels are CHW
// and K runs (c, py, px): "pixel order". Panels are those of gemm.h.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "dispatch.h"
#include "gemm.h"

namespace py = pybind11;

namespace {
constexpr int kChannels = 3;
constexpr int kTilePanels = 8;
constexpr int kTileRows = kTilePanels * kMR;
constexpr int kChunk = 384;  // tokens a step of the weight gradient

enum class Interpolation : int {
  kBilinearAntialias = 0,
  kBilinearAlignCorners = 1,
  kBicubic = 2,
  kBicubicAntialias = 3
};

// Raw pointers and sizes, as Python hands them over.
struct Problem {
  const void* pixels;
  DType pixel_dtype;
  const int32_t* sizes;  // [N, 2] height, width in pixels
  int64_t images, patches, prefix_rows, patch_size, width, grid;
  Interpolation interpolation;
  bool conv_layout;
  float mean[kChannels], std[kChannels];

  int64_t depth() const { return kChannels * patch_size * patch_size; }
};

// Where each image starts, in patches and pixels.
struct Layout {
  std::vector<int64_t> first_patch, first_element, grid_h, grid_w;

  explicit Layout(const Problem& p) : first_patch{0}, first_element{0} {
    for (int64_t n = 0; n < p.images; n++) {
      int64_t h = p.sizes[2 * n], w = p.sizes[2 * n + 1];
      grid_h.push_back(h / p.patch_size);
      grid_w.push_back(w / p.patch_size);
      first_patch.push_back(first_patch.back() + grid_h.back() * grid_w.back());
      first_element.push_back(first_element.back() + h * w * kChannels);
    }
    if (first_patch.back() != p.patches)
      throw std::invalid_argument("patch_embed: sizes make " + std::to_string(first_patch.back()) +
                                  " patches, the pixels " + std::to_string(p.patches));
  }
  int64_t image_of(int64_t patch) const {
    return std::upper_bound(first_patch.begin(), first_patch.end(), patch) - first_patch.begin() -
           1;
  }
};

// A walk over consecutive patches that keeps (image, y, x) without divisions.
struct Cursor {
  const Layout& layout;
  int64_t patch, image, y, x;

  Cursor(const Layout& l, int64_t start) : layout(l), patch(start), image(l.image_of(start)) {
    int64_t local = start - l.first_patch[image];
    y = local / l.grid_w[image];
    x = local % l.grid_w[image];
  }
  void advance() {
    patch++;
    if (++x < layout.grid_w[image]) return;
    x = 0;
    if (++y < layout.grid_h[image]) return;
    y = 0;
    image++;
    while (image < static_cast<int64_t>(layout.grid_h.size()) &&
           layout.first_patch[image + 1] == patch)
      image++;
  }
};

// Normalisation per element of a patch, in pixel order: x = pixel * scale[k] + shift[k].
struct Normalisation {
  std::vector<float> scale, shift;

  explicit Normalisation(const Problem& p) {
    int64_t area = p.patch_size * p.patch_size;
    bool bytes = p.pixel_dtype == DType::kU8;
    for (int64_t k = 0; k < p.depth(); k++) {
      int c = bytes ? k % kChannels : k / area;
      double range = bytes ? 255.0 : 1.0;
      scale.push_back(static_cast<float>(1.0 / (range * p.std[c])));
      shift.push_back(static_cast<float>(-static_cast<double>(p.mean[c]) / p.std[c]));
    }
  }
};

// pixel order -> column of the weight
std::vector<int64_t> weight_columns(const Problem& p) {
  int64_t area = p.patch_size * p.patch_size;
  std::vector<int64_t> column(p.depth());
  for (int64_t k = 0; k < p.depth(); k++) {
    bool bytes = p.pixel_dtype == DType::kU8;
    int64_t c = bytes ? k % kChannels : k / area, at = bytes ? k / kChannels : k % area;
    column[k] = p.conv_layout ? c * area + at : at * kChannels + c;
  }
  return column;
}

// row[k] = the normalised patch under the cursor, in pixel order
inline void read_patch(const Problem& p, const Layout& l, const Normalisation& norm,
                       const Cursor& at, float* row) {
  int64_t ps = p.patch_size, w = l.grid_w[at.image] * ps;
  if (p.pixel_dtype == DType::kU8) {
    auto* image = static_cast<const uint8_t*>(p.pixels) + l.first_element[at.image];
    int64_t run = ps * kChannels;
    for (int64_t py = 0; py < ps; py++) {
      const uint8_t* in = image + ((at.y * ps + py) * w + at.x * ps) * kChannels;
      for (int64_t i = 0; i < run; i++)
        row[py * run + i] =
            static_cast<float>(in[i]) * norm.scale[py * run + i] + norm.shift[py * run + i];
    }
    return;
  }
  int64_t h = l.grid_h[at.image] * ps;
  for (int64_t c = 0; c < kChannels; c++)
    for (int64_t py = 0; py < ps; py++) {
      int64_t offset = l.first_element[at.image] + (c * h + at.y * ps + py) * w + at.x * ps;
      int64_t k0 = (c * ps + py) * ps;
      for (int64_t i = 0; i < ps; i++) {
        float x = p.pixel_dtype == DType::kF32
                      ? static_cast<const float*>(p.pixels)[offset + i]
                      : (p.pixel_dtype == DType::kBF16
                             ? to_float(static_cast<const bf16*>(p.pixels)[offset + i])
                             : to_float(static_cast<const f16*>(p.pixels)[offset + i]));
        row[k0 + i] = x * norm.scale[k0 + i] + norm.shift[k0 + i];
      }
    }
}

// The taps that one axis of the position table is resized with: output i reads table cells
// first[i] ... first[i] + count[i] - 1 with weight[i * most + j]. Coordinates are exact rationals.
struct Taps {
  std::vector<int> first, count;
  std::vector<float> weight;
  int most = 0;
};

double cubic(double x, double a) {
  x = std::fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return ((x - 5) * x + 8) * x * a - 4 * a;
  return 0;
}

Taps make_taps(int64_t out, int64_t in, Interpolation mode) {
  std::vector<std::vector<double>> rows(out, std::vector<double>(in, 0.0));
  for (int64_t i = 0; i < out; i++) {
    auto& row = rows[i];
    if (out == in) {
      row[i] = 1;  // table used as is
    } else if (mode == Interpolation::kBilinearAlignCorners) {
      int64_t steps = std::max<int64_t>(out - 1, 1), at = i * (in - 1);
      int64_t low = out > 1 ? at / steps : 0, rest = out > 1 ? at % steps : 0;
      double fraction = static_cast<double>(rest) / steps;
      row[low] += 1 - fraction;
      row[std::min(low + 1, in - 1)] += fraction;
    } else if (mode == Interpolation::kBicubic) {
      // centre (2i + 1) in / (2 out) - 1/2, floored
      int64_t numerator = (2 * i + 1) * in - out;
      int64_t low =
          numerator >= 0 ? numerator / (2 * out) : -((-numerator + 2 * out - 1) / (2 * out));
      double fraction = static_cast<double>(numerator - low * 2 * out) / (2 * out);
      for (int64_t j = -1; j <= 2; j++)
        row[std::clamp<int64_t>(low + j, 0, in - 1)] += cubic(fraction - j, -0.75);
    } else {
      double total = 0;
      int64_t unit = 2 * std::max(in, out);
      for (int64_t j = 0; j < in; j++) {
        double x = static_cast<double>((2 * j + 1) * out - (2 * i + 1) * in) / unit;
        row[j] = mode == Interpolation::kBilinearAntialias ? std::max(0.0, 1 - std::fabs(x))
                                                           : cubic(x, -0.5);
        total += row[j];
      }
      for (double& value : row) value /= total;
    }
  }
  Taps taps;
  for (auto& row : rows) {
    int first = 0, last = static_cast<int>(in) - 1;
    while (first < last && row[first] == 0) first++;
    while (last > first && row[last] == 0) last--;
    taps.first.push_back(first);
    taps.count.push_back(last - first + 1);
    taps.most = std::max(taps.most, last - first + 1);
  }
  taps.weight.assign(out * taps.most, 0.0f);
  for (int64_t i = 0; i < out; i++)
    for (int j = 0; j < taps.count[i]; j++)
      taps.weight[i * taps.most + j] = static_cast<float>(rows[i][taps.first[i] + j]);
  return taps;
}

// The taps of every image's two axes, each distinct length computed once.
class TapTable {
 public:
  TapTable(const Problem& p, const Layout& l) {
    if (p.grid == 0) return;
    for (int64_t n = 0; n < p.images; n++)
      for (int64_t length : {l.grid_h[n], l.grid_w[n]})
        if (!taps_.count(length)) taps_[length] = make_taps(length, p.grid, p.interpolation);
    for (int64_t n = 0; n < p.images; n++) {
      rows.push_back(&taps_[l.grid_h[n]]);
      columns.push_back(&taps_[l.grid_w[n]]);
    }
  }
  std::vector<const Taps*> rows, columns;

 private:
  std::map<int64_t, Taps> taps_;
};

// out[i] += weight * in[i] over whole vectors
inline void add_scaled(float* out, const float* in, float weight, int64_t n) {
  vf w = splat(weight);
  for (int64_t i = 0; i < n; i += kLanes) store(out + i, load(out + i) + w * load(in + i));
}

// rows [n, width] of any dtype -> float rows of stride `stride`, zero-padded
template <typename T>
void widen_rows(const T* in, float* out, int64_t n, int64_t width, int64_t stride) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < n; r++) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(out + r * stride + i, load(in + r * width + i));
    for (; i < stride; i++) out[r * stride + i] = i < width ? to_float(in[r * width + i]) : 0.0f;
  }
}

// B panels of the projection: panel[n][k][kNR] = weight[n * kNR + j][column[k]]
template <typename T>
void pack_weight(const T* weight, float* panels, const std::vector<int64_t>& column, int64_t width,
                 int64_t depth) {
  int64_t count = round_up(width, kNR) / kNR;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < count; n++)
    for (int64_t j = 0; j < kNR; j++) {
      int64_t d = n * kNR + j;
      float* out = panels + n * depth * kNR + j;
      if (d < width)
        for (int64_t k = 0; k < depth; k++) out[k * kNR] = to_float(weight[d * depth + column[k]]);
      else
        for (int64_t k = 0; k < depth; k++) out[k * kNR] = 0;
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
  int64_t depth = p.depth(), padded = round_up(p.width, kNR), panels = padded / kNR;
  Buffer<float> weight_panels(padded * depth), start_row(padded);
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

  for (int64_t n = 0; n < p.images; n++)
    for (int64_t r = 0; r < p.prefix_rows; r++) {
      int64_t at = layout.first_patch[n] + n * p.prefix_rows + r;
      std::copy_n(prefix + r * p.width, p.width, tokens + at * p.width);
      coords[2 * at] = coords[2 * at + 1] = -1;
    }

  int64_t tiles = (p.patches + kTileRows - 1) / kTileRows;
#pragma omp parallel
  {
    Buffer<float> row(depth), a(depth * kTileRows), start(kTileRows * padded);
    Buffer<float> blended(p.grid * padded);  // the table's rows blended for one row of patches
    int64_t blended_image = -1, blended_y = -1;
#pragma omp for schedule(dynamic)
    for (int64_t tile = 0; tile < tiles; tile++) {
      int64_t first = tile * kTileRows, rows = std::min<int64_t>(kTileRows, p.patches - first);
      T* out_rows[kTileRows];
      Cursor at(layout, first);
      for (int64_t m = 0; m < rows; m++, at.advance()) {
        read_patch(p, layout, norm, at, row.get());
        float* panel = a.get() + m / kMR * kMR * depth + m % kMR;
        for (int64_t k = 0; k < depth; k++) panel[k * kMR] = row[k];
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
        float* panel = a.get() + m / kMR * kMR * depth + m % kMR;
        for (int64_t k = 0; k < depth; k++) panel[k * kMR] = 0;
      }
      for (int64_t n = 0; n < panels; n++)
        for (int64_t mp = 0; mp * kMR < rows; mp++) {
          vf acc[kMR][kNV] = {};
          gemm_micro_kernel(depth, a.get() + mp * kMR * depth,
                            weight_panels.get() + n * depth * kNR, acc);
          for (int64_t m = 0; m < std::min<int64_t>(kMR, rows - mp * kMR); m++)
            store_row(out_rows[mp * kMR + m], acc[m], start.get() + (mp * kMR + m) * padded,
                      n * kNR, p.width);
        }
    }
  }
}

// d_weight [D, K] and d_bias [D]: each thread owns a range of D and sums over all tokens in order.
template <typename T>
void backward_weight(const Problem& p, const Layout& layout, const T* d_tokens, T* d_weight,
                     T* d_bias) {
  Normalisation norm(p);
  std::vector<int64_t> column = weight_columns(p);
  int64_t depth = p.depth(), padded = round_up(depth, kNR), b_panels = padded / kNR;
  int64_t a_panels = (p.width + kMR - 1) / kMR;
  Buffer<float> acc_all(a_panels * kMR * padded), b(kChunk * padded);
  Buffer<const T*> rows(kChunk);
  std::fill_n(acc_all.get(), a_panels * kMR * padded, 0.0f);
#pragma omp parallel
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t from = a_panels * me / threads, to = a_panels * (me + 1) / threads;
    Buffer<float> a(kChunk * kMR), row(padded);
    std::fill_n(row.get(), padded, 0.0f);
    std::vector<double> bias_sum((to - from) * kMR, 0.0);
    for (int64_t first = 0; first < p.patches; first += kChunk) {
      int64_t count = std::min<int64_t>(kChunk, p.patches - first);
#pragma omp for schedule(static)
      for (int64_t part = 0; part < threads; part++) {
        int64_t lo = count * part / threads, hi = count * (part + 1) / threads;
        if (lo == hi) continue;
        Cursor at(layout, first + lo);
        for (int64_t t = lo; t < hi; t++, at.advance()) {
          read_patch(p, layout, norm, at, row.get());
          for (int64_t n = 0; n < b_panels; n++)
            std::copy_n(row.get() + n * kNR, kNR, b.get() + (n * kChunk + t) * kNR);
          rows[t] = d_tokens + (at.patch + (at.image + 1) * p.prefix_rows) * p.width;
        }
      }
      for (int64_t mp = from; mp < to; mp++) {
        int64_t d0 = mp * kMR, live = std::min<int64_t>(kMR, p.width - d0);
        double* total = bias_sum.data() + (mp - from) * kMR;
        for (int64_t t = 0; t < count; t++)
          for (int64_t m = 0; m < kMR; m++) {
            float value = m < live ? to_float(rows[t][d0 + m]) : 0.0f;
            a[t * kMR + m] = value;
            total[m] += value;
          }
        for (int64_t n = 0; n < b_panels; n++) {
          vf acc[kMR][kNV];
          float* c = acc_all.get() + d0 * padded + n * kNR;
          for (int m = 0; m < kMR; m++)
            for (int v = 0; v < kNV; v++) acc[m][v] = load(c + m * padded + v * kLanes);
          gemm_micro_kernel(count, a.get(), b.get() + n * kChunk * kNR, acc);
          for (int m = 0; m < kMR; m++)
            for (int v = 0; v < kNV; v++) store(c + m * padded + v * kLanes, acc[m][v]);
        }
      }
#pragma omp barrier
    }
    for (int64_t d = from * kMR; d < std::min(to * kMR, p.width); d++) {
      if (d_weight != nullptr)
        for (int64_t k = 0; k < depth; k++)
          d_weight[d * depth + column[k]] = from_float<T>(acc_all[d * padded + k]);
      if (d_bias != nullptr)
        d_bias[d] = from_float<T>(static_cast<float>(bias_sum[d - from * kMR]));
    }
  }
}

// d_table [G, G, D] fp32: the transposed resize, a row of patches at a time; threads own D ranges.
template <typename T>
void backward_table(const Problem& p, const Layout& layout, const T* d_tokens, float* d_table) {
  TapTable taps(p, layout);
  int64_t blocks = (p.width + kLanes - 1) / kLanes;
  std::fill_n(d_table, p.grid * p.grid * p.width, 0.0f);
#pragma omp parallel
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t from = blocks * me / threads * kLanes;
    int64_t to = std::min(blocks * (me + 1) / threads * kLanes, p.width);
    int64_t span = round_up(std::max<int64_t>(to - from, 0), kLanes);
    Buffer<float> blended(p.grid * span), sum(p.grid * p.grid * span), row(span);
    std::fill_n(sum.get(), p.grid * p.grid * span, 0.0f);
    std::fill_n(row.get(), span, 0.0f);
    for (int64_t n = 0; n < p.images && span > 0; n++) {
      const Taps &ty = *taps.rows[n], &tx = *taps.columns[n];
      const T* in = d_tokens + (layout.first_patch[n] + (n + 1) * p.prefix_rows) * p.width + from;
      for (int64_t y = 0; y < layout.grid_h[n]; y++) {
        std::fill_n(blended.get(), p.grid * span, 0.0f);
        for (int64_t x = 0; x < layout.grid_w[n]; x++, in += p.width) {
          int64_t d = 0;
          for (; d + kLanes <= to - from; d += kLanes) store(row.get() + d, load(in + d));
          for (; d < to - from; d++) row[d] = to_float(in[d]);
          for (int j = 0; j < tx.count[x]; j++)
            add_scaled(blended.get() + (tx.first[x] + j) * span, row.get(),
                       tx.weight[x * tx.most + j], span);
        }
        for (int j = 0; j < ty.count[y]; j++)
          add_scaled(sum.get() + (ty.first[y] + j) * p.grid * span, blended.get(),
                     ty.weight[y * ty.most + j], p.grid * span);
      }
    }
    for (int64_t cell = 0; cell < p.grid * p.grid; cell++)
      for (int64_t d = from; d < to; d++) d_table[cell * p.width + d] = sum[cell * span + d - from];
  }
}

template <typename T>
void backward_prefix(const Problem& p, const Layout& layout, const T* d_tokens, T* d_prefix) {
  std::vector<double> sum(p.width);
  for (int64_t r = 0; r < p.prefix_rows; r++) {
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int64_t n = 0; n < p.images; n++) {
      const T* in = d_tokens + (layout.first_patch[n] + n * p.prefix_rows + r) * p.width;
      for (int64_t d = 0; d < p.width; d++) sum[d] += to_float(in[d]);
    }
    for (int64_t d = 0; d < p.width; d++)
      d_prefix[r * p.width + d] = from_float<T>(static_cast<float>(sum[d]));
  }
}

// d_pixels, in the float pixels' own dtype and places: (d_tokens @ weight) / std.
template <typename T, typename X>
void backward_pixels(const Problem& p, const Layout& layout, const T* d_tokens, const T* weight,
                     X* d_pixels) {
  Normalisation norm(p);
  std::vector<int64_t> column = weight_columns(p);
  int64_t depth = p.depth(), padded = round_up(depth, kNR), b_panels = padded / kNR,
          ps = p.patch_size;
  Buffer<float> b(p.width * padded);
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < b_panels; n++)
    for (int64_t d = 0; d < p.width; d++)
      for (int64_t j = 0; j < kNR; j++) {
        int64_t k = n * kNR + j;
        b[(n * p.width + d) * kNR + j] = k < depth ? to_float(weight[d * depth + column[k]]) : 0.0f;
      }
  int64_t tiles = (p.patches + kMR - 1) / kMR;
#pragma omp parallel
  {
    Buffer<float> a(p.width * kMR), out(kMR * padded);
#pragma omp for schedule(dynamic, 8)
    for (int64_t tile = 0; tile < tiles; tile++) {
      int64_t first = tile * kMR, rows = std::min<int64_t>(kMR, p.patches - first);
      Cursor at(layout, first);
      for (int64_t m = 0; m < kMR; m++) {
        const T* in =
            m < rows ? d_tokens + (at.patch + (at.image + 1) * p.prefix_rows) * p.width : nullptr;
        for (int64_t d = 0; d < p.width; d++) a[d * kMR + m] = in ? to_float(in[d]) : 0.0f;
        if (m + 1 < rows) at.advance();
      }
      for (int64_t n = 0; n < b_panels; n++) {
        vf acc[kMR][kNV] = {};
        gemm_micro_kernel(p.width, a.get(), b.get() + n * p.width * kNR, acc);
        for (int m = 0; m < kMR; m++)
          for (int v = 0; v < kNV; v++)
            store(out.get() + m * padded + n * kNR + v * kLanes, acc[m][v]);
      }
      Cursor to(layout, first);
      for (int64_t m = 0; m < rows; m++) {
        int64_t w = layout.grid_w[to.image] * ps, h = layout.grid_h[to.image] * ps;
        for (int64_t c = 0; c < kChannels; c++)
          for (int64_t py = 0; py < ps; py++) {
            int64_t offset =
                layout.first_element[to.image] + (c * h + to.y * ps + py) * w + to.x * ps;
            int64_t k0 = (c * ps + py) * ps;
            for (int64_t i = 0; i < ps; i++)
              d_pixels[offset + i] = from_float<X>(out[m * padded + k0 + i] * norm.scale[k0 + i]);
          }
        if (m + 1 < rows) to.advance();
      }
    }
  }
}

Problem make_problem(uintptr_t pixels, int pixel_dtype, uintptr_t sizes, int64_t images,
                     int64_t patches, int64_t prefix_rows, int64_t patch_size, int64_t width,
                     int64_t grid, int interpolation, bool conv_layout, py::sequence mean,
                     py::sequence std) {
  Problem p{reinterpret_cast<const void*>(pixels),
            static_cast<DType>(pixel_dtype),
            reinterpret_cast<const int32_t*>(sizes),
            images,
            patches,
            prefix_rows,
            patch_size,
            width,
            grid,
            static_cast<Interpolation>(interpolation),
            conv_layout,
            {},
            {}};
  for (int c = 0; c < kChannels; c++) {
    p.mean[c] = mean[c].cast<float>();
    p.std[c] = std[c].cast<float>();
  }
  return p;
}

// Absent tensors are passed as 0; table is fp32 [G, G, D].
void forward(const Problem& p, int dtype, uintptr_t weight, uintptr_t bias, uintptr_t table,
             uintptr_t prefix, uintptr_t tokens, uintptr_t coords) {
  with_dtype(static_cast<DType>(dtype), [&](auto tag) {
    using T = decltype(tag);
    forward_typed<T>(p, reinterpret_cast<const T*>(weight), reinterpret_cast<const T*>(bias),
                     reinterpret_cast<const float*>(table), reinterpret_cast<const T*>(prefix),
                     reinterpret_cast<T*>(tokens), reinterpret_cast<int32_t*>(coords));
  });
}

// Gradients that are not wanted are passed as 0; d_table is fp32.
void backward(const Problem& p, int dtype, uintptr_t d_tokens, uintptr_t weight, uintptr_t d_weight,
              uintptr_t d_bias, uintptr_t d_table, uintptr_t d_prefix, uintptr_t d_pixels) {
  with_dtype(static_cast<DType>(dtype), [&](auto tag) {
    using T = decltype(tag);
    Layout layout(p);
    auto* in = reinterpret_cast<const T*>(d_tokens);
    if (d_weight || d_bias)
      backward_weight<T>(p, layout, in, reinterpret_cast<T*>(d_weight),
                         reinterpret_cast<T*>(d_bias));
    if (d_table) backward_table<T>(p, layout, in, reinterpret_cast<float*>(d_table));
    if (d_prefix) backward_prefix<T>(p, layout, in, reinterpret_cast<T*>(d_prefix));
    if (d_pixels)
      with_dtype(p.pixel_dtype, [&](auto pixel_tag) {
        using X = decltype(pixel_tag);
        backward_pixels<T, X>(p, layout, in, reinterpret_cast<const T*>(weight),
                              reinterpret_cast<X*>(d_pixels));
      });
  });
}
}  // namespace

void bind_patch_embed(py::module_& m) {
  py::class_<Problem>(m, "PatchEmbedProblem")
      .def(py::init(&make_problem), py::kw_only(), py::arg("pixels"), py::arg("pixel_dtype"),
           py::arg("sizes"), py::arg("images"), py::arg("patches"), py::arg("prefix_rows"),
           py::arg("patch_size"), py::arg("width"), py::arg("grid"), py::arg("interpolation"),
           py::arg("conv_layout"), py::arg("mean"), py::arg("std"));
  m.def("patch_embed_fwd", &forward, py::kw_only(), py::arg("problem"), py::arg("dtype"),
        py::arg("weight"), py::arg("bias"), py::arg("table"), py::arg("prefix"), py::arg("tokens"),
        py::arg("coords"), py::call_guard<py::gil_scoped_release>());
  m.def("patch_embed_bwd", &backward, py::kw_only(), py::arg("problem"), py::arg("dtype"),
        py::arg("d_tokens"), py::arg("weight"), py::arg("d_weight"), py::arg("d_bias"),
        py::arg("d_table"), py::arg("d_prefix"), py::arg("d_pixels"),
        py::call_guard<py::gil_scoped_release>());
}

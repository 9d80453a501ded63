// What both passes of patch_embed share: where patches lie, how they are read, how the table is
// resized.
//
// N images, T patches in all, R prefix rows an image, P patch side, K = 3 P P, D width,
// G side of the position table. uint8 pixels are HWC and K runs (py, px, c); float pixels are CHW
// and K runs (c, py, px): "pixel order". Panels are those of gemm.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "gemm.h"
#include "kernels.h"

namespace {
constexpr int kChannels = 3;

enum class Interpolation : int {
  kBilinearAntialias = 0,
  kBilinearAlignCorners = 1,
  kBicubic = 2,
  kBicubicAntialias = 3
};

using Problem = PatchEmbedProblem;

int64_t depth_of(const Problem& p) { return kChannels * p.patch_size * p.patch_size; }

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
    for (int64_t k = 0; k < depth_of(p); k++) {
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
  std::vector<int64_t> column(depth_of(p));
  for (int64_t k = 0; k < depth_of(p); k++) {
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
        if (!taps_.count(length))
          taps_[length] = make_taps(length, p.grid, static_cast<Interpolation>(p.interpolation));
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

// out[i] = the unit of rows 0 ... per - 1 at column i: per rows of floats, interleaved along k
template <typename Unit>
inline void pack_rows(const float* rows, int64_t stride, int64_t n, Unit* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    if constexpr (units_per<Unit> == 1)
      store(out + i, load(rows + i));
    else
      store_pair(out + i, load(rows + i), load(rows + stride + i));
  }
}
}  // namespace

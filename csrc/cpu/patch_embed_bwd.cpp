// Gradients of packed patch embedding; every sum runs in an order that depends on shapes only.
#include <omp.h>

#include "dispatch.h"
#include "patch_embed.h"

namespace {
constexpr int kChunk = 384;  // tokens a step of the weight gradient

// d_weight [D, K] and d_bias [D]: each thread owns a range of D and sums over all tokens in order.
// A step packs kChunk tokens; a B panel stays in L1 while the thread's A panels pass from L2.
template <typename T>
void backward_weight(const Problem& p, const Layout& layout, const T* d_tokens, T* d_weight,
                     T* d_bias) {
  Normalisation norm(p);
  std::vector<int64_t> column = weight_columns(p);
  int64_t depth = depth_of(p), padded = round_up(depth, kNR), b_panels = padded / kNR;
  int64_t a_panels = (p.width + kMR - 1) / kMR;
  Buffer<float> sums(a_panels * kMR * padded);  // tiles [n][mp][kMR][kNR]
  using Unit = PanelUnit<T>;
  constexpr int per = units_per<Unit>;
  constexpr int64_t steps = kChunk / per;  // units of a whole chunk
  Buffer<Unit> b(steps * padded);          // panels [n][unit][kNR]
  Buffer<const T*> rows(kChunk);
  std::fill_n(sums.get(), a_panels * kMR * padded, 0.0f);
#pragma omp parallel
  {
    int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t from = a_panels * me / threads, to = a_panels * (me + 1) / threads;
    int64_t d0 = from * kMR, live = std::min(to * kMR, p.width) - d0;
    int64_t line_size = round_up((to - from) * kMR, kLanes);
    Buffer<Unit> a(steps * (to - from) * kMR),
        wide(std::max(padded, line_size));  // [mp][unit][kMR]
    Buffer<float> row(per * padded), line(per * line_size);
    std::vector<double> bias_sum((to - from) * kMR, 0.0);
    for (int64_t first = 0; first < p.patches; first += kChunk) {
      int64_t count = std::min<int64_t>(kChunk, p.patches - first);
      int64_t units = (count + per - 1) / per;
#pragma omp for schedule(static)
      for (int64_t part = 0; part < threads; part++) {
        int64_t lo = units * part / threads, hi = units * (part + 1) / threads;
        if (lo == hi) continue;
        Cursor at(layout, first + lo * per);
        for (int64_t u = lo; u < hi; u++) {
          std::fill_n(row.get(), per * padded, 0.0f);
          for (int64_t t = u * per; t < std::min((u + 1) * per, count); t++, at.advance()) {
            read_patch(p, layout, norm, at, row.get() + (t - u * per) * padded);
            rows[t] = d_tokens + (at.patch + (at.image + 1) * p.prefix_rows) * p.width;
          }
          pack_rows(row.get(), padded, padded, wide.get());
          for (int64_t n = 0; n < b_panels; n++)
            std::copy_n(wide.get() + n * kNR, kNR, b.get() + (n * steps + u) * kNR);
        }
      }
      for (int64_t u = 0; u < units; u++) {
        std::fill_n(line.get(), per * line_size, 0.0f);
        for (int64_t t = u * per; t < std::min((u + 1) * per, count); t++) {
          const T* in = rows[t] + d0;
          float* out = line.get() + (t - u * per) * line_size;
          for (int64_t d = 0; d < live; d += kLanes)
            store(out + d, live - d < kLanes ? load_partial(in + d, live - d) : load(in + d));
          for (int64_t d = 0; d < live; d++) bias_sum[d] += out[d];
        }
        pack_rows(line.get(), line_size, line_size, wide.get());
        for (int64_t mp = 0; mp < to - from; mp++)
          std::copy_n(wide.get() + mp * kMR, kMR, a.get() + (mp * steps + u) * kMR);
      }
      for (int64_t n = 0; n < b_panels; n++)
        for (int64_t mp = 0; mp < to - from; mp++) {
          vf acc[kMR][kNV] = {};
          gemm_micro_kernel(units, a.get() + mp * steps * kMR, b.get() + n * steps * kNR, acc);
          float* c = sums.get() + (n * a_panels + from + mp) * kMR * kNR;
          for (int m = 0; m < kMR; m++)
            for (int v = 0; v < kNV; v++) {
              float* at = c + m * kNR + v * kLanes;
              store(at, load(at) + acc[m][v]);
            }
        }
#pragma omp barrier
    }
    for (int64_t d = 0; d < live; d++) {
      int64_t mp = from + d / kMR, m = d % kMR;
      if (d_weight != nullptr)
        for (int64_t k = 0; k < depth; k++)
          d_weight[(d0 + d) * depth + column[k]] =
              from_float<T>(sums[((k / kNR * a_panels + mp) * kMR + m) * kNR + k % kNR]);
      if (d_bias != nullptr) d_bias[d0 + d] = from_float<T>(static_cast<float>(bias_sum[d]));
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

// d_pixels fp32, in the float pixels' places: (d_tokens @ weight) / std.
template <typename T>
void backward_pixels(const Problem& p, const Layout& layout, const T* d_tokens, const T* weight,
                     float* d_pixels) {
  Normalisation norm(p);
  std::vector<int64_t> column = weight_columns(p);
  int64_t depth = depth_of(p), padded = round_up(depth, kNR), b_panels = padded / kNR,
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
              d_pixels[offset + i] = out[m * padded + k0 + i] * norm.scale[k0 + i];
          }
        if (m + 1 < rows) to.advance();
      }
    }
  }
}
}  // namespace

void patch_embed_bwd(const Problem& p, const PatchEmbedBackward& b) {
  with_dtype(b.dtype, [&](auto tag) {
    using T = decltype(tag);
    Layout layout(p);
    auto* in = static_cast<const T*>(b.d_tokens);
    if (b.d_weight || b.d_bias)
      backward_weight<T>(p, layout, in, static_cast<T*>(b.d_weight), static_cast<T*>(b.d_bias));
    if (b.d_table) backward_table<T>(p, layout, in, b.d_table);
    if (b.d_prefix) backward_prefix<T>(p, layout, in, static_cast<T*>(b.d_prefix));
    if (b.d_pixels) backward_pixels<T>(p, layout, in, static_cast<const T*>(b.weight), b.d_pixels);
  });
}

// One expert's weights as panels of floats, whatever they are stored as.
#pragma once

#include <algorithm>

#include "dispatch.h"
#include "grouped_gemm.h"
#include "mxfp4_decode.h"
#include "vmath.h"

namespace grouped {
struct Matrix {  // one expert's
  const Stack* of;
  const void* data;
  const uint8_t* scales;
};

inline Matrix matrix_of(const Stack& stack, int64_t expert) {
  int64_t size = stack.k * stack.n;
  if (stack.scales != nullptr)
    return {&stack, static_cast<const uint8_t*>(stack.data) + expert * size / 2,
            stack.scales + expert * size / kBlock};
  int64_t bytes = stack.dtype == DType::kF32 ? 4 : 2;
  return {&stack, static_cast<const char*>(stack.data) + expert * size * bytes, nullptr};
}

struct PackedRow {  // of MXFP4 weights
  const uint8_t *bytes, *scales;
};

// Floats between the panels of a packed chunk of `depth` rows. A power of two would let the panels
// that one row of weights goes to evict each other.
inline int64_t panel_size(int64_t depth) { return (depth + 1) * kNR; }

// Where column c of it lies: panels [c / kNR][k][kNR].
inline float* packed_at(float* out, int64_t depth, int64_t k, int64_t c) {
  return out + c / kNR * panel_size(depth) + k * kNR + c % kNR;
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
inline void pack_wide_blocks(const Matrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t count,
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
inline void pack_deep_blocks(const Matrix& b, int64_t k0, int64_t depth, int64_t n0, int64_t count,
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

inline void pack_weights(const Matrix& b, int64_t k0, int64_t depth, const Columns& columns,
                         float* out) {
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

// The cache lines of a chunk of weights, asked for a few at a time before it is packed. Only short
// runs of dense rows need it: there every row is another page, which the hardware does not see
// coming. The processor drops a prefetch from a page that it has not looked up, and those of a long
// burst; hence the loads, a row ahead, and the few at a time.
class Lines {
 public:
  Lines(const Matrix& b, int64_t k, int64_t depth, const Columns& columns) {
    const Stack& of = *b.of;
    if (of.scales != nullptr || !of.n_contiguous || depth == 0) return;
    int64_t bytes = of.dtype == DType::kF32 ? 4 : 2;
    stride_ = of.n * bytes, run_ = columns.count * bytes, depth_ = depth, parts_ = columns.parts;
    for (int part = 0; part < parts_; part++)
      begin_[part] = static_cast<const char*>(b.data) + (k * of.n + columns.begin[part]) * bytes;
    start(0);
  }
  int64_t count() const { return (run_ + 63) / 64 * depth_ * parts_; }
  void ask(int64_t count) {
    for (; count > 0 && rows_ > 0; count--) {
      __builtin_prefetch(row_ + at_, 0, 3);
      at_ += 64;
      if (at_ >= run_) next_row();
    }
  }

 private:
  void start(int part) {
    part_ = part, row_ = begin_[part], rows_ = depth_, at_ = 0, look_up(row_);
  }
  void next_row() {
    at_ = 0, row_ += stride_;
    if (--rows_ > 1)
      look_up(row_ + stride_);
    else if (rows_ == 0 && part_ + 1 < parts_)
      start(part_ + 1);
  }
  static void look_up(const char* p) { (void)*static_cast<const volatile char*>(p); }

  const char *begin_[2] = {}, *row_ = nullptr;
  int64_t stride_ = 0, run_ = 0, depth_ = 0, rows_ = 0, at_ = 0;
  int parts_ = 0, part_ = 0;
};
}  // namespace grouped

// y = x weight^T + bias for a few rows, the weight in blocks of 32 bytes with a scale each.
//
// T rows, K inputs, N outputs, B = K / 32 blocks. A block of x becomes integers of 16 bits, as many
// as its dtype needs: one for bf16 and fp16, whose digits it holds down to 2^-16 of the block's
// largest value, two for fp32 (2^-31). Their products with bytes are exact. The bytes of 16 outputs
// are one stream in the order they are read in, which is what memory gives fastest.
#include "linear_int8.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "buffer.h"
#include "dispatch.h"
#include "kernels.h"

namespace {
constexpr float kDigit = 0x1p-15f;
constexpr int32_t kZero = 128;             // the byte that stands for 0
constexpr int kRows = kLanes > 8 ? 4 : 2;  // that share a weight's way through the registers
constexpr int kParts = kInt8Outputs / kLanes;
constexpr int64_t kUnitBytes = 1 << 17;  // that a thread takes at a time, about

// Rows of x as integers: of each four inputs the pairs (0, 2) and (1, 3), [T][D][K / 2]; what
// each block's sums start from, -128 times the sum of its integers [T][D][B]; and what they are to
// be multiplied by [T][B].
struct Digits {
  int64_t blocks, count;
  Buffer<int32_t> pairs, starts;
  Buffer<float> scales;
  Digits(int64_t tokens, int64_t in, int64_t digits)
      : blocks(in / kInt8Block),
        count(digits),
        pairs(tokens * digits * in / 2),
        starts(tokens * digits * blocks),
        scales(tokens * blocks) {}
  int32_t* row(int64_t t, int64_t digit) {
    return &pairs[(t * count + digit) * blocks * kInt8Block / 2];
  }
  int32_t* start(int64_t t, int64_t digit) { return &starts[(t * count + digit) * blocks]; }
};

// Rounds to the nearest integer of a value below 2^22.
inline vf round_near(vf v) { return v + 0x1.8p23f - 0x1.8p23f; }

void pair_up(const int32_t* digits, int32_t* pairs, int32_t* start) {
  int32_t sum = 0;
  for (int64_t i = 0; i < kInt8Block; i++) sum += digits[i];
  for (int64_t i = 0; i < kInt8Block; i += kInt8Four)
    for (int64_t j = 0; j < 2; j++)
      pairs[i / 2 + j] = static_cast<int32_t>(static_cast<uint32_t>(digits[i + j + 2]) << 16 |
                                              (static_cast<uint32_t>(digits[i + j]) & 0xffffu));
  *start = -kZero * sum;
}

template <typename T>
void make_digits(const T* x, int64_t tokens, int64_t in, Digits* out) {
  constexpr int64_t kVectors = kInt8Block / kLanes;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t b = 0; b < out->blocks; b++) {
      vf v[kVectors], most = {}, wrong = {};
      for (int64_t i = 0; i < kVectors; i++) {
        v[i] = load(x + t * in + b * kInt8Block + i * kLanes);
        vf size = v[i] < 0 ? -v[i] : v[i];
        most = most >= size ? most : size;
        wrong += v[i] - v[i];  // NaN of what is not finite
      }
      float largest = 0;
      for (int i = 0; i < kLanes; i++) largest = largest >= most[i] ? largest : most[i];
      int exponent = 0;
      bool finite = reduce_add(wrong) == 0;
      if (finite) std::frexp(largest, &exponent);
      float scale = std::ldexp(kDigit, std::max(exponent, -97)), inverse = 1 / scale;
      out->scales[t * out->blocks + b] = finite ? scale : reduce_add(wrong);
      for (int64_t d = 0; d < out->count; d++, inverse /= kDigit) {
        int32_t digits[kInt8Block];
        for (int64_t i = 0; i < kVectors; i++) {
          vf digit = round_near(finite ? v[i] * inverse : vf{});
          digit = digit < 32767.0f ? digit : splat(32767.0f);  // just below a power of two
          v[i] -= digit / inverse;
          vi lanes = __builtin_convertvector(digit, vi);
          std::memcpy(digits + i * kLanes, &lanes, sizeof(lanes));
        }
        pair_up(digits, out->row(t, d) + b * kInt8Block / 2, out->start(t, d) + b);
      }
    }
}

// sums[m] = M rows from t on times the weights of 16 outputs
template <int M, int D>
void dots(const uint8_t* weight, const f16* scales, Digits& x, int64_t t, vf (*sums)[kParts]) {
  const int32_t *rows[M][D], *starts[M][D];
  for (int m = 0; m < M; m++)
    for (int d = 0; d < D; d++) rows[m][d] = x.row(t + m, d), starts[m][d] = x.start(t + m, d);
  const float* factors = &x.scales[t * x.blocks];
  vf acc[M][kParts] = {};
  for (int64_t b = 0; b < x.blocks; b++, scales += kInt8Outputs) {
    for (int part = 0; part < kParts; part++) {
      vi dot[M][D];
      for (int m = 0; m < M; m++)
        for (int d = 0; d < D; d++) dot[m][d] = vi{} + starts[m][d][b];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kInt8Block; i += kInt8Four) {
        vu bytes = load_fours(weight + i * kInt8Outputs + part * kVectorBytes);
        vu even = even_bytes(bytes), odd = odd_bytes(bytes);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
          for (int d = 0; d < D; d++) {
            const int32_t* pair = rows[m][d] + (b * kInt8Block + i) / 2;
            dot[m][d] = add_products(add_products(dot[m][d], even, pair[0]), odd, pair[1]);
          }
      }
      vf scale = load(scales + part * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        vf sum = __builtin_convertvector(dot[m][0], vf);
        if constexpr (D == 2) sum += __builtin_convertvector(dot[m][1], vf) * kDigit;
        acc[m][part] += sum * (scale * factors[m * x.blocks + b]);
      }
    }
    weight += kInt8Block * kInt8Outputs;
  }
  for (int m = 0; m < M; m++)
    for (int part = 0; part < kParts; part++) sums[m][part] = acc[m][part];
}

// Columns [n, n + 16) of y
template <int D, typename T>
void columns(const LinearInt8& p, Digits& x, int64_t n) {
  const uint8_t* weight = p.weight.values + n * p.in;
  const f16* scales = static_cast<const f16*>(p.weight.scales) + n * x.blocks;
  auto* bias = static_cast<const T*>(p.bias);
  vf sums[kRows][kParts];
  for (int64_t t = 0, step; t < p.tokens; t += step) {
    step = t + kRows <= p.tokens ? kRows : 1;
    step == kRows ? dots<kRows, D>(weight, scales, x, t, sums)
                  : dots<1, D>(weight, scales, x, t, sums);
    for (int64_t m = 0; m < step; m++)
      for (int part = 0; part < kParts; part++) {
        int64_t at = n + part * kLanes;
        int count = static_cast<int>(std::clamp<int64_t>(p.out - at, 0, kLanes));
        if (count == 0) break;
        vf sum = sums[m][part];
        if (bias != nullptr) sum += load_partial(bias + at, count);
        store_partial(static_cast<T*>(p.y) + (t + m) * p.out + at, sum, count);
      }
  }
}
}  // namespace

void linear_int8(const LinearInt8& p) {
  int64_t units = (p.out + kInt8Outputs - 1) / kInt8Outputs;
  int64_t chunk = std::clamp<int64_t>(kUnitBytes / (kInt8Outputs * std::max<int64_t>(p.in, 1)), 1,
                                      std::max<int64_t>(1, units / 32));
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kDigits = std::is_same_v<T, float> ? 2 : 1;
    Digits x(p.tokens, p.in, kDigits);
    make_digits(static_cast<const T*>(p.x), p.tokens, p.in, &x);
#pragma omp parallel for schedule(dynamic, chunk) if (p.out * p.in > int64_t{1} << 18)
    for (int64_t i = 0; i < units; i++) columns<kDigits, T>(p, x, i * kInt8Outputs);
  });
}

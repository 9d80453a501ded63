// y = x weight^T + bias for a few rows, the weight in blocks of 32 bytes with a scale each.
//
// T rows, K inputs, N outputs, B = K / 32 blocks. A block of x becomes integers of 16 bits, as many
// as its dtype needs: one for bf16 and fp16, whose digits it holds down to 2^-16 of the block's
// largest value, two for fp32 (2^-31). Their products with bytes are exact.
#include "linear_int8.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "buffer.h"
#include "dispatch.h"
#include "dot.h"
#include "gemm.h"
#include "kernels.h"

namespace {
constexpr int64_t kUnit = 32;     // outputs that a thread takes at a time
constexpr int64_t kAhead = 4096;  // bytes
constexpr float kDigit = 0x1p-15f;
constexpr int kChains = 4;                 // as many sums of a row as hide the latency of one
constexpr int kRows = kLanes > 8 ? 4 : 2;  // that share a weight's way through the registers
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));

// Rows of x as integers [T][D][K] and what each block's are to be multiplied by [T][B].
struct Digits {
  int64_t blocks, count;
  Buffer<int16_t> values;
  Buffer<float> scales;
  Digits(int64_t tokens, int64_t in, int64_t digits)
      : blocks(in / kInt8Block),
        count(digits),
        values(tokens * digits * in),
        scales(round_up(tokens * blocks, kLanes) + kLanes) {}
  int16_t* row(int64_t t, int64_t digit) {
    return &values[(t * count + digit) * blocks * kInt8Block];
  }
};

// Rounds to the nearest integer of a value below 2^22.
inline vf round_near(vf v) { return v + 0x1.8p23f - 0x1.8p23f; }

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
      float scale = std::ldexp(kDigit, std::max(exponent, -100)), inverse = 1 / scale;
      out->scales[t * out->blocks + b] = finite ? scale : reduce_add(wrong);
      for (int64_t d = 0; d < out->count; d++, inverse /= kDigit)
        for (int64_t i = 0; i < kVectors; i++) {
          vf digit = round_near(finite ? v[i] * inverse : vf{});
          digit = digit < 32767.0f ? digit : splat(32767.0f);  // just below a power of two
          v[i] -= digit / inverse;
          auto lanes = __builtin_convertvector(__builtin_convertvector(digit, vi), Shorts);
          std::memcpy(out->row(t, d) + b * kInt8Block + i * kLanes, &lanes, sizeof(lanes));
        }
    }
}

// sums[m] = M rows from t on times one output's weights, of which there are `left` with it
template <int M, int D>
void dots(const Int8Weight& w, int64_t output, int64_t left, Digits& x, int64_t t, float* sums) {
  const int8_t* weight = w.values + output * x.blocks * kInt8Block;
  const f16* scales = static_cast<const f16*>(w.scales) + output * x.blocks;
  const int16_t* rows[M][D];
  for (int m = 0; m < M; m++)
    for (int d = 0; d < D; d++) rows[m][d] = x.row(t + m, d);
  vf acc[M][kChains] = {};
  for (int64_t first = 0; first < x.blocks; first += kLanes) {
    int64_t there = left * x.blocks - first;  // a row's last load may reach into the next one's
    vf scale = there >= kLanes ? load(scales + first)
                               : load_partial(scales + first, static_cast<int>(there));
    float factors[M][kLanes];
    for (int m = 0; m < M; m++)
      store(factors[m], scale * load(&x.scales[(t + m) * x.blocks + first]));
    auto step = [&](int64_t b, int chain) {
      int64_t at = (first + b) * kInt8Block;
      Int8Lanes lanes = widen_bytes(weight + at);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        vf sum = dot_bytes(lanes, rows[m][0] + at);
        if constexpr (D == 2) sum += dot_bytes(lanes, rows[m][1] + at) * kDigit;
        acc[m][chain] += sum * factors[m][b];
      }
    };
    int64_t count = std::min<int64_t>(kLanes, x.blocks - first), b = 0;
    for (; b + kChains <= count; b += kChains) {
      __builtin_prefetch(weight + (first + b) * kInt8Block + kAhead, 0, 2);
      __builtin_prefetch(weight + (first + b + 2) * kInt8Block + kAhead, 0, 2);
#pragma GCC unroll 4
      for (int i = 0; i < kChains; i++) step(b + i, i);
    }
    for (; b < count; b++) step(b, 0);
  }
  for (int m = 0; m < M; m++) {
    vf sum = (acc[m][0] + acc[m][1]) + (acc[m][2] + acc[m][3]);
    sums[m] = add_lanes<kLanes>(sum);
  }
}

template <int D, typename T>
void columns(const LinearInt8& p, Digits& x, int64_t n, int64_t end) {
  auto* bias = static_cast<const T*>(p.bias);
  float sums[kUnit][kRows];
  for (int64_t t = 0, step; t < p.tokens; t += step) {
    step = t + kRows <= p.tokens ? kRows : 1;
    for (int64_t i = n; i < end; i++)
      step == kRows ? dots<kRows, D>(p.weight, i, p.out - i, x, t, sums[i - n])
                    : dots<1, D>(p.weight, i, p.out - i, x, t, sums[i - n]);
    for (int64_t m = 0; m < step; m++) {
      auto* y = static_cast<T*>(p.y) + (t + m) * p.out;
      float row[kUnit + kLanes] = {};
      for (int64_t i = n; i < end; i++) row[i - n] = sums[i - n][m];
      for (int64_t i = n; i < end; i += kLanes) {
        int count = static_cast<int>(std::min<int64_t>(kLanes, end - i));
        vf sum = load(row + i - n);
        if (bias != nullptr) sum += load_partial(bias + i, count);
        store_partial(y + i, sum, count);
      }
    }
  }
}
}  // namespace

void linear_int8(const LinearInt8& p) {
  int64_t units = (p.out + kUnit - 1) / kUnit;
  int64_t chunk = std::clamp<int64_t>((1 << 17) / (kUnit * std::max<int64_t>(p.in, 1)), 1,
                                      std::max<int64_t>(1, units / 32));
  with_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kDigits = std::is_same_v<T, float> ? 2 : 1;
    Digits x(p.tokens, p.in, kDigits);
    make_digits(static_cast<const T*>(p.x), p.tokens, p.in, &x);
#pragma omp parallel for schedule(dynamic, chunk) if (p.out * p.in > int64_t{1} << 18)
    for (int64_t i = 0; i < units; i++)
      columns<kDigits, T>(p, x, i * kUnit, std::min((i + 1) * kUnit, p.out));
  });
}

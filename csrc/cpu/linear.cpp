// y = x weight^T + bias for a few rows: bound by reading the weight, once.
//
// T rows, K inputs, N outputs.
#include <omp.h>

#include <algorithm>
#include <type_traits>

#include "buffer.h"
#include "dot.h"
#include "kernels.h"

namespace {
constexpr int64_t kUnit = 32;                // rows of the weight that a thread takes at a time
constexpr int kTokens = kLanes > 8 ? 4 : 2;  // times 4 outputs: half the registers accumulate
constexpr int64_t kRun = kLanes * 256;       // a lane's sums in a row: longer ones lose digits
constexpr size_t kShort = 1024;              // bytes
constexpr int kRowColumns = 8;  // of a single row: as many sums as hide the latency of one

// sums [tokens][kUnit] of outputs [n, end)
template <typename T>
void products(const Linear& p, int64_t n, int64_t end, float* sums) {
  const T *x = static_cast<const T*>(p.x), *weight = static_cast<const T*>(p.weight);
  auto tile = [&](auto rows, auto columns, int64_t t) {
    constexpr int kM = decltype(rows)::value, kN = decltype(columns)::value;
    const T* row = weight + n * p.in;
    Ahead<T> ahead;
    // one row of the input keeps up with memory by itself, but where rows of the weight are short
    bool slow = p.tokens > 1 || p.in * sizeof(T) <= kShort;
    bool further = t == 0 && slow && n + 2 * kN <= p.out;
    for (int64_t k = 0; k < p.in; k += kRun) {
      if (further) ahead = {row + kN * p.in + k, p.in, kN};
      dot_tile<kM, kN>(x + t * p.in + k, p.in, row + k, p.in, std::min(kRun, p.in - k),
                       sums + t * kUnit, kUnit, ahead);
    }
  };
  std::integral_constant<int, 1> one;
  std::integral_constant<int, 2> two;
  std::integral_constant<int, 4> four;
  std::integral_constant<int, kRowColumns> many;
  for (int64_t step; n < end; n += step, sums += step) {
    step = end - n < 4 ? 1 : p.tokens == 1 && end - n >= kRowColumns ? kRowColumns : 4;
    int64_t t = 0;
    if (step == kRowColumns) {
      tile(one, many, t);
    } else if (step == 1) {
      for (; t < p.tokens; t++) tile(one, one, t);
    } else {
      for (; kTokens == 4 && t + 4 <= p.tokens; t += 4) tile(four, four, t);
      for (; t + 2 <= p.tokens; t += 2) tile(two, four, t);
      for (; t < p.tokens; t++) tile(one, four, t);
    }
  }
}

template <typename T>
void columns(const Linear& p, int64_t n, int64_t end) {
  const T* bias = static_cast<const T*>(p.bias);
  Buffer<float> sums(p.tokens * kUnit);
  std::fill_n(sums.get(), p.tokens * kUnit, 0.0f);
  products<T>(p, n, end, sums.get());
  for (int64_t t = 0; t < p.tokens; t++)
    for (int64_t i = n; i < end; i += kLanes) {
      int count = static_cast<int>(std::min<int64_t>(kLanes, end - i));
      vf sum = load(&sums[t * kUnit + i - n]);
      if (bias != nullptr) sum += load_partial(bias + i, count);
      store_partial(static_cast<T*>(p.y) + t * p.out + i, sum, count);
    }
}
}  // namespace

void linear(const Linear& p) {
  int64_t units = (p.out + kUnit - 1) / kUnit;
  auto run = [&](auto example) {
    using T = decltype(example);
    // a thread reads a quarter of a megabyte in one go, if there is enough for all
    int64_t chunk = std::clamp<int64_t>((1 << 18) / (kUnit * p.in * sizeof(T)), 1,
                                        std::max<int64_t>(1, units / 32));
#pragma omp parallel for schedule(dynamic, chunk) if (p.out * p.in > int64_t{1} << 18)
    for (int64_t i = 0; i < units; i++) columns<T>(p, i * kUnit, std::min((i + 1) * kUnit, p.out));
  };
  if (p.dtype == DType::kF32)
    run(float{});
  else
    run(bf16{});
}

// What routing's forward and backward share: how a token scores its experts.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"

enum class Scoring : int { kTopkSoftmax = 0, kSoftmaxTopk = 1, kSigmoid = 2 };

// Softmax over all, renormalised over the chosen, is the softmax over the chosen.
inline bool softmax_of_chosen(const RoutingProblem& p) {
  Scoring scoring = static_cast<Scoring>(p.scoring);
  return scoring == Scoring::kTopkSoftmax || (scoring == Scoring::kSoftmaxTopk && p.renormalize);
}

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

inline float largest(const float* x, int64_t n) {
  float most = x[0];
  for (int64_t i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// sum of exp(x[i] - most)
inline float exp_sum(const float* x, int64_t n, float most) {
  float sum = 0;
  for (int64_t i = 0; i < n; i++) sum += std::exp(x[i] - most);
  return sum;
}

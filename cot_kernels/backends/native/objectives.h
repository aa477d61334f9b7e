// Row formulas l(b, S) with their partials: cot_kernels/objectives.py, which has their derivation, for vectors of rows.
#pragma once

#include "jobs.h"
#include "vectors.h"

namespace cot::COT_LEVEL {

template <class T> struct RowValues {
  Vector<T> loss, d_log_odds, d_negentropy;
};

template <class T>
COT_INLINE RowValues<T> complement_entropy(T scale, T eps, Vector<T> log_odds, Vector<T> negentropy) {
  if (eps == 0) return {negentropy * scale, Vector<T>{}, splat<T>(scale)};
  // eps / (1 - p) = eps + x, so u = 1 / v. Where x would overflow u is nothing, and its limit is as good.
  const T most = -NEGLIGIBLE<T> - (eps > 1 ? log<T>(splat<T>(eps))[0] : T(0));
  Vector<T> exponent = at_most<T>(-log_odds, most);
  Vector<T> x = exp_within<T>(choose<T>(exponent < NEGLIGIBLE<T>, splat<T>(NEGLIGIBLE<T>), exponent)) * eps;
  Vector<T> v = x + (1 + eps), u = 1 / v;
  Vector<T> d_negentropy = u * scale;
  Vector<T> loss = d_negentropy * (negentropy - log<T>(v));
  return {loss, (loss + d_negentropy) * (x * u), d_negentropy};
}

template <class T>
COT_INLINE RowValues<T> guided_complement_entropy(T scale, T eps, T alpha, Vector<T> log_odds, Vector<T> negentropy) {
  RowValues<T> plain = complement_entropy<T>(1, eps, log_odds, negentropy);
  Vector<T> p = sigmoid<T>(-log_odds), miss = sigmoid<T>(log_odds);
  Vector<T> guided = p + eps;
  Mask<T> positive = guided > 0;
  guided = choose<T>(guided == 0, splat<T>(1), guided);
  Vector<T> exponent = alpha * log<T>(guided);
  // guided^alpha, which for an alpha > 0 is nothing where guided is.
  constexpr T INFINITE = sizeof(T) == 4 ? T(89) : T(710);  // exp of it is
  Vector<T> guide = choose<T>(exponent > 0, exp_within<T>(at_most<T>(exponent, INFINITE)),
                              exp_of_negative<T>(exponent)) * scale;
  if (alpha > 0) guide = choose<T>(positive | (guided != guided), guide, Vector<T>{});
  Vector<T> ratio = choose<T>(positive, p * miss / guided, miss);
  Vector<T> d_log_odds = guide * (plain.d_log_odds - alpha * ratio * plain.loss);
  return {guide * plain.loss, d_log_odds, guide * plain.d_negentropy};
}

template <class T>
COT_INLINE RowValues<T> cross_entropy(T scale, T weight, Vector<T> log_odds, Vector<T> negentropy) {
  Vector<T> loss = softplus<T>(log_odds) * scale;
  if (weight != 0) loss += negentropy * (scale * weight);
  return {loss, sigmoid<T>(log_odds) * scale, splat<T>(scale * weight)};
}

template <class T>
COT_INLINE RowValues<T> evaluate(const Objective& objective, Vector<T> log_odds, Vector<T> negentropy) {
  const T scale = T(objective.scale), eps = T(objective.eps), power = T(objective.power);
  switch (objective.kind) {
    case Kind::COMPLEMENT_ENTROPY: return complement_entropy<T>(scale, eps, log_odds, negentropy);
    case Kind::GUIDED_COMPLEMENT_ENTROPY:
      return guided_complement_entropy<T>(scale, eps, power, log_odds, negentropy);
    case Kind::CROSS_ENTROPY: return cross_entropy<T>(scale, power, log_odds, negentropy);
  }
  __builtin_unreachable();
}

}  // namespace cot::COT_LEVEL

// Vectors that fill a register, one number a lane, in the vector extensions of GCC and Clang, and functions on them.
// Compiled for several kinds of processor, each in a namespace of its own: see level.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#define COT_INLINE static inline __attribute__((always_inline))
#define COT_MEMBER inline __attribute__((always_inline))

namespace cot::COT_LEVEL {

constexpr int VECTOR_BYTES = COT_VECTOR_BYTES;

// Numbers of 16 bits, which are only stored: all arithmetic on them is in float.
struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class T> struct Lanes;
template <> struct Lanes<float> {
  typedef float Values __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Integer;
  static constexpr int MANTISSA = 23, BIAS = 127;
};
template <> struct Lanes<double> {
  typedef double Values __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Integer;
  static constexpr int MANTISSA = 52, BIAS = 1023;
};

template <class T> using Vector = typename Lanes<T>::Values;
template <class T> using Mask = typename Lanes<T>::Bits;  // a lane is 0 or all ones
template <class T> constexpr int WIDTH = VECTOR_BYTES / sizeof(T);

// What logits stored as S are computed in.
template <class S> struct Computed { typedef float type; };
template <> struct Computed<double> { typedef double type; };
template <class S> using ComputedIn = typename Computed<S>::type;

typedef uint16_t Words __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t DoubleWords __attribute__((vector_size(VECTOR_BYTES)));

template <class To, class From> COT_INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T> COT_INLINE Vector<T> splat(T value) { return Vector<T>{} + value; }
template <class T> COT_INLINE Mask<T> iota() {
  Mask<T> lanes;
  for (int i = 0; i < WIDTH<T>; ++i) lanes[i] = i;
  return lanes;
}
template <class T> COT_INLINE Vector<T> choose(Mask<T> mask, Vector<T> yes, Vector<T> no) { return mask ? yes : no; }
template <class T> COT_INLINE Vector<T> at_most(Vector<T> x, T most) { return choose<T>(x > most, splat<T>(most), x); }

// ---- between memory and lanes ----

COT_INLINE Vector<float> widen(const BFloat16*, Words words) {
  return bits_of<Vector<float>>(__builtin_convertvector(words, DoubleWords) << 16);
}
COT_INLINE Vector<float> widen(const Half*, Words words) {
  DoubleWords x = __builtin_convertvector(words, DoubleWords);
  DoubleWords magnitude = (x & 0x7fffu) << 13;
  // The exponent is rebiased by a product, which makes subnormal numbers normal as well; but for infinity and NaN.
  Vector<float> value = bits_of<Vector<float>>(magnitude) * 0x1p112f;
  DoubleWords bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : bits_of<DoubleWords>(value);
  return bits_of<Vector<float>>(bits | (x & 0x8000u) << 16);
}
// To the nearest, to even at a tie.
COT_INLINE Words narrow(const BFloat16*, Vector<float> value) {
  DoubleWords x = bits_of<DoubleWords>(value);
  DoubleWords rounded = x + 0x7fffu + ((x >> 16) & 1u);
  DoubleWords nan = x | 0x400000u;
  return __builtin_convertvector(((x & 0x7fffffffu) > 0x7f800000u ? nan : rounded) >> 16, Words);
}
COT_INLINE Words narrow(const Half*, Vector<float> value) {
  DoubleWords x = bits_of<DoubleWords>(value);
  DoubleWords sign = x & 0x80000000u, magnitude = x ^ sign;
  // Below 2^-14 a sum with a number whose last place is 2^-24 rounds to the subnormal step.
  Vector<float> step = bits_of<Vector<float>>(magnitude) + 0.5f;
  DoubleWords subnormal = bits_of<DoubleWords>(step) - 0x3f000000u;
  DoubleWords normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  DoubleWords infinite = (magnitude > 0x7f800000u) ? DoubleWords{} + 0x7e00u : DoubleWords{} + 0x7c00u;
  DoubleWords bits = magnitude >= 0x477ff000u ? infinite : magnitude < 113u << 23 ? subnormal : normal;
  return __builtin_convertvector(bits | sign >> 16, Words);
}

COT_INLINE Vector<float> load(const float* from) { Vector<float> to; memcpy(&to, from, sizeof to); return to; }
COT_INLINE Vector<double> load(const double* from) { Vector<double> to; memcpy(&to, from, sizeof to); return to; }
template <class S> COT_INLINE Vector<float> load(const S* from) {
  Words words;
  memcpy(&words, from, sizeof words);
  return widen(from, words);
}
COT_INLINE void store(float* to, Vector<float> value) { memcpy(to, &value, sizeof value); }
COT_INLINE void store(double* to, Vector<double> value) { memcpy(to, &value, sizeof value); }
template <class S> COT_INLINE void store(S* to, Vector<float> value) {
  Words words = narrow(to, value);
  memcpy(to, &words, sizeof words);
}

// The first `count` lanes, a stride apart; the others hold `fill`.
template <class S> COT_INLINE Vector<ComputedIn<S>> gather(const S* from, int64_t stride, int count, S fill) {
  S lanes[WIDTH<ComputedIn<S>>];
  for (int i = 0; i < WIDTH<ComputedIn<S>>; ++i) lanes[i] = i < count ? from[i * stride] : fill;
  return load(lanes);
}
template <class S> COT_INLINE void scatter(S* to, int64_t stride, int count, Vector<ComputedIn<S>> value) {
  S lanes[WIDTH<ComputedIn<S>>];
  store(lanes, value);
  for (int i = 0; i < count; ++i) to[i * stride] = lanes[i];
}

// ---- over the lanes: halves against each other, so that sums round alike on every machine ----

template <class T> COT_INLINE Vector<T> other_half(Vector<T> value, int half) {
#ifdef __clang__
  Vector<T> other;
  for (int i = 0; i < WIDTH<T>; ++i) other[i] = value[i ^ half];
  return other;
#else
  return __builtin_shuffle(value, iota<T>() ^ half);
#endif
}
template <class T> COT_INLINE T largest(Vector<T> value) {
  for (int half = WIDTH<T> / 2; half; half /= 2) {
    Vector<T> other = other_half<T>(value, half);
    value = choose<T>(other > value, other, value);
  }
  return value[0];
}
template <class T> COT_INLINE T sum(Vector<T> value) {
  for (int half = WIDTH<T> / 2; half; half /= 2) value += other_half<T>(value, half);
  return value[0];
}

// ---- functions ----

// 2^n by its bits, for n from 1 - BIAS to BIAS.
template <class T> COT_INLINE Vector<T> power_of_two(Mask<T> n) {
  return bits_of<Vector<T>>((n + Lanes<T>::BIAS) << Lanes<T>::MANTISSA);
}

COT_INLINE Vector<float> exp_series(Vector<float> r) {
  Vector<float> sum = splat(1.f / 5040);
  sum = sum * r + 1.f / 720;
  sum = sum * r + 1.f / 120;
  sum = sum * r + 1.f / 24;
  sum = sum * r + 1.f / 6;
  sum = sum * r + 1.f / 2;
  sum = sum * r + 1.f;
  return sum * r + 1.f;
}
COT_INLINE Vector<double> exp_series(Vector<double> r) {
  Vector<double> sum = splat(1. / 6227020800.);
  const double factorials[] = {479001600., 39916800., 3628800., 362880., 40320., 5040., 720., 120., 24., 6., 2., 1., 1.};
  for (double factorial : factorials) sum = sum * r + 1. / factorial;
  return sum;
}

template <class T> struct Exponent {
  Vector<T> fraction;  // exp(x) = fraction * 2^power
  Mask<T> power;
};

// x = n ln 2 + r with |r| <= ln(2) / 2: 2^n times the power series of exp(r).
template <class T> COT_INLINE Exponent<T> exponent(Vector<T> x) {
  // A sum whose last place is 1 rounds to whole numbers, and holds them in its lowest bits.
  constexpr T ROUND = T(3) * (int64_t(1) << (Lanes<T>::MANTISSA - 1));
  // ln 2 in two parts: the product of n and the first is exact.
  constexpr T HIGH = sizeof(T) == 4 ? T(0x1.62e4p-1) : T(0x1.62e42feep-1);
  constexpr T LOW = sizeof(T) == 4 ? T(0x1.7f7d1cf79abcap-20) : T(0x1.a39ef35793c76p-33);
  Vector<T> shifted = x * T(1.4426950408889634074) + ROUND;
  Vector<T> n = shifted - ROUND;
  return {exp_series((x - n * HIGH) - n * LOW), bits_of<Mask<T>>(shifted) - bits_of<Mask<T>>(splat<T>(ROUND))};
}

// exp(x) below this is nothing beside 1, and at it a normal number.
template <class T> constexpr T NEGLIGIBLE = sizeof(T) == 4 ? T(-87) : T(-708);

// exp(x) for NEGLIGIBLE <= x <= -NEGLIGIBLE, within 1 unit in the last place or so.
template <class T> COT_INLINE Vector<T> exp_within(Vector<T> x) {
  Exponent<T> e = exponent<T>(x);
  return e.fraction * power_of_two<T>(e.power);
}

// exp(x) for any x <= 0, in two steps where it is subnormal.
template <class T> COT_INLINE Vector<T> exp_of_negative(Vector<T> x) {
  constexpr T LEAST = 2 * NEGLIGIBLE<T>;
  Exponent<T> e = exponent<T>(choose<T>(x < LEAST, splat<T>(LEAST), x));
  Mask<T> half = e.power >> 1;
  return e.fraction * power_of_two<T>(half) * power_of_two<T>(e.power - half);
}

// ln x for x > 0, and NaN for NaN: x = 2^n f with f around 1, ln f = 2 artanh((f - 1) / (f + 1)) by its power series.
template <class T> COT_INLINE Vector<T> log(Vector<T> given) {
  constexpr int MANTISSA = Lanes<T>::MANTISSA;
  constexpr T NORMAL = T(int64_t(1) << MANTISSA);  // a subnormal number times this is normal
  Mask<T> small = given < std::numeric_limits<T>::min();
  Vector<T> x = choose<T>(small, given * NORMAL, given);
  const typename Lanes<T>::Integer root = bits_of<typename Lanes<T>::Integer>(T(0.70710678118654752440));
  Mask<T> bits = bits_of<Mask<T>>(x);
  Mask<T> power = (bits - root) >> MANTISSA;
  Vector<T> f = bits_of<Vector<T>>(bits - (power << MANTISSA));
  Vector<T> n = __builtin_convertvector(power + (small & -MANTISSA), Vector<T>);
  Vector<T> y = (f - 1) / (f + 1), square = y * y;
  constexpr int TERMS = sizeof(T) == 4 ? 5 : 11;
  Vector<T> series = splat<T>(T(2) / (2 * TERMS + 1));
  for (int k = TERMS - 1; k > 0; --k) series = series * square + T(2) / (2 * k + 1);
  series *= square * y;
  constexpr T HIGH = sizeof(T) == 4 ? T(0x1.62e4p-1) : T(0x1.62e42feep-1);
  constexpr T LOW = sizeof(T) == 4 ? T(0x1.7f7d1cf79abcap-20) : T(0x1.a39ef35793c76p-33);
  return choose<T>(given < std::numeric_limits<T>::infinity(), n * HIGH + ((series + n * LOW) + 2 * y), given);
}

// ln(1 + x) for 0 <= x <= 1: what 1 + x rounds off is made good by the quotient.
template <class T> COT_INLINE Vector<T> log1p(Vector<T> x) {
  Vector<T> sum = x + 1, rounded = sum - 1;
  return choose<T>(rounded == 0, x, log<T>(sum) * (x / choose<T>(rounded == 0, splat<T>(1), rounded)));
}

template <class T> COT_INLINE Vector<T> magnitude(Vector<T> x) { return choose<T>(x < 0, -x, x); }

// 1 / (1 + exp(-x)).
template <class T> COT_INLINE Vector<T> sigmoid(Vector<T> x) {
  Vector<T> e = exp_of_negative<T>(-magnitude<T>(x));
  return choose<T>(x < 0, e, splat<T>(1)) / (e + 1);
}

// ln(1 + exp(x)).
template <class T> COT_INLINE Vector<T> softplus(Vector<T> x) {
  return choose<T>(x > 0, x, splat<T>(0)) + log1p<T>(exp_of_negative<T>(-magnitude<T>(x)));
}

}  // namespace cot::COT_LEVEL

// exp and log in a form that compilers vectorise, of numbers and of vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "vectors.h"

namespace fasttta {

template <typename To, typename From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// exp of x = n ln 2 + r in float32, V a float or a vector of them: 1.5 * 2^23 + n, whose low bits
// are n, and e^r by Cephes' polynomial, to 2 units in the last place.
template <typename V>
inline V shifted_exponent(V x) {
  return x * 1.44269504f + 12582912.0f;
}

template <typename V>
inline V exp_of_rest(V x, V shifted) {
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

inline double exp_(double x) { return std::exp(x); }
inline double log_(double x) { return std::log(x); }

// exp of numbers up to 0, as softmax has them; nan of nan, 0 below the smallest normal number.
inline float exp_(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = shifted_exponent(clamped), p = exp_of_rest(clamped, shifted);
  const float scale = bits_as<float>((bits_as<int32_t>(shifted) + (127 - 0x4b400000)) << 23);
  return x < -87.0f ? 0.0f : p * scale;
}

// ln of numbers above 0, by Cephes' polynomial; nan of nan.
inline float log_(float x) {
  const bool tiny = x < std::numeric_limits<float>::min();
  const float scaled = tiny ? x * 8388608.0f : x;
  // mantissa in [sqrt(1/2), sqrt(2)): exponent and mantissa split at the bits of sqrt(1/2)
  const int32_t bits = bits_as<int32_t>(scaled) - 0x3f3504f3;
  const float n = static_cast<float>((bits >> 23) - (tiny ? 23 : 0));
  const float r = bits_as<float>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float square = r * r;
  float y = p * r * square - 2.12194440e-4f * n - 0.5f * square;
  y = r + y + 0.693359375f * n;
  return x != x ? x : y;
}

// The least exponent of attention: exp of smaller numbers is 0. It would be so small that no sum
// with 1 shows it, and products of it with other small numbers, denormal ones, take 40 times as long.
template <typename A>
constexpr A kLeast = std::is_same_v<A, float> ? A(-50) : A(-300);

// exp of vectors of numbers up to 0; 0 below kLeast.
inline Vector<float> exponential(Vector<float> x) {
  const Vector<float> shifted = shifted_exponent(x);
  Vector<float> p = exp_of_rest(x, shifted);
  p *= (Vector<float>)(((Vector<int32_t>)shifted + (127 - 0x4b400000)) << 23);
  return x < kLeast<float> ? Vector<float>{} : p;
}

// Taylor: |r| <= ln(2) / 2, whose 14th power over 14! is 4e-18. ln 2 in two parts, of which the
// first has 33 bits: its multiples are exact.
inline Vector<double> exponential(Vector<double> x) {
  const Vector<double> shifted = x * 1.4426950408889634 + 6755399441055744.0;
  const Vector<double> n = shifted - 6755399441055744.0;
  const Vector<double> r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  Vector<double> p = Vector<double>{} + 1.0;
  for (int i = 13; i > 0; --i) p = p * r * (1.0 / i) + 1.0;
  p *= (Vector<double>)(((Vector<int64_t>)shifted + (1023 - 0x4338000000000000)) << 52);
  return x < kLeast<double> ? Vector<double>{} : p;
}

// exp of a number up to 0; 0 below kLeast.
template <typename A>
inline A exponential_or_zero(A x) {
  return x < kLeast<A> ? A(0) : exp_(x);
}

// -ln x, and 0 at x = 0: p ln p ends there.
template <typename A>
inline A surprise(A x) {
  return x == 0 ? A(0) : -log_(x);
}

}  // namespace fasttta

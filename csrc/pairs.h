// Pairs of bf16 numbers in 32 bits, of which a product is the sum of two products, in float32.
//
// Processors with avx512_bf16 multiply and add 32 numbers in one instruction, twice as many as in
// float32. Elsewhere pairs are taken apart, which is exact.
#pragma once

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace fasttta {

using Pair = int32_t;  // the first number in the low half

// sum + x y, of numbers or of pairs.
template <typename A>
inline Vector<A> multiply_add(A x, Vector<A> y, Vector<A> sum) {
  return sum + x * y;
}

inline Vector<float> multiply_add(Pair x, Vector<Pair> y, Vector<float> sum) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)y);
#else
  const Vector<Pair> both = x - Vector<Pair>{};
  const int32_t high = static_cast<int32_t>(0xffff0000u);
  sum += (Vector<float>)(both & high) * (Vector<float>)(y & high);
  return sum + (Vector<float>)(both << 16) * (Vector<float>)(y << 16);
#endif
}

// float32 rounded to bf16, to nearest, ties to even; the numbers are the low halves of the lanes.
inline Vector<Pair> rounded(Vector<float> x) {
#if defined(__AVX512BF16__)
  return (Vector<Pair>)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  typedef uint32_t Bits __attribute__((vector_size(kBytes)));
  const Bits bits = (Bits)x, even = (bits >> 16) & 1;
  const Bits nearest = (bits + 0x7fff + even) >> 16;
  return (Vector<Pair>)(x == x ? nearest : Bits{} + 0x7fc0u);
#endif
}

// Writes a vector of float32 numbers, rounded to bf16, to any address.
inline void store_rounded(uint16_t* to, Vector<float> x) {
#if defined(__AVX512BF16__)
  const __m256i values = (__m256i)_mm512_cvtneps_pbh((__m512)x);
#else
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  const Halves values = __builtin_convertvector(rounded(x), Halves);
#endif
  std::memcpy(to, &values, sizeof values);
}

// A vector of bf16 numbers at any address, as float32.
inline Vector<float> load_halves(const uint16_t* from) {
  typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));
  typedef uint32_t Bits __attribute__((vector_size(kBytes)));
  Halves values;
  std::memcpy(&values, from, sizeof values);
  return (Vector<float>)(__builtin_convertvector(values, Bits) << 16);
}

// A pair of two numbers of a row of bf16.
inline Pair pair_at(const uint16_t* row) {
  Pair pair;
  std::memcpy(&pair, row, sizeof pair);
  return pair;
}

// Pairs of two rows: their numbers of the same place. `second` may be null: zeros.
inline void pair_rows(const uint16_t* first, const uint16_t* second, int64_t n, Pair* to) {
  if (second) {
    for (int64_t c = 0; c < n; ++c) to[c] = first[c] | static_cast<Pair>(second[c]) << 16;
  } else {
    for (int64_t c = 0; c < n; ++c) to[c] = first[c];
  }
}

}  // namespace fasttta

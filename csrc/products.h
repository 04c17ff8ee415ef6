// Products of small matrices, from vectors of one type: what attention is made of.
//
// c is computed a block of a few rows and as many vectors of columns as there are registers for.
#pragma once

#include <utility>

#include "numbers.h"

namespace fasttta {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kVectors = 4;
#elif defined(__AVX__)
constexpr int kBytes = 32, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kVectors = 4;
#else
constexpr int kBytes = 16, kVectors = 2;
#endif
constexpr int kTile = 6;  // rows of a block

template <typename A>
constexpr int kLanes = kBytes / sizeof(A);
template <typename A>
constexpr int64_t kPanel = kLanes<A> * kVectors;  // columns of a block

template <typename A>
struct Vectors {
  typedef A type __attribute__((vector_size(kBytes)));
};
template <typename A>
using Vector = typename Vectors<A>::type;

// any address
template <typename A>
inline Vector<A> load(const A* x) {
  Vector<A> values;
  std::memcpy(&values, x, sizeof values);
  return values;
}

template <typename A>
inline void store(A* x, Vector<A> values) {
  std::memcpy(x, &values, sizeof values);
}

template <typename A>
inline Vector<A> larger(Vector<A> x, Vector<A> y) {
  return x > y ? x : y;
}

// exp of numbers up to 0; 0 where it would be so small that no sum with 1 tells: denormal numbers,
// which products of it with other small ones may be, take 40 times as long.
template <typename A>
constexpr A kLeast = std::is_same_v<A, float> ? A(-50) : A(-300);

inline Vector<float> exponential(Vector<float> x) {  // numbers.h, a vector at a time
  const Vector<float> shifted = x * 1.44269504f + 12582912.0f;
  const Vector<float> n = shifted - 12582912.0f;
  const Vector<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float> p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
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

// Lanes with those at a distance of half a vector, then of a quarter, ... until all are one.
template <typename A, int H, typename F, size_t... I>
inline Vector<A> folded(Vector<A> x, F&& f, std::index_sequence<I...> lanes) {
  if constexpr (H > 0) x = folded<A, H / 2>(f(x, Vector<A>{x[I ^ H]...}), f, lanes);
  return x;
}

template <typename A, typename F>
inline A reduce(Vector<A> x, F&& f) {
  return folded<A, kLanes<A> / 2>(x, f, std::make_index_sequence<kLanes<A>>())[0];
}

// A matrix whose element (i, k) is data[i * row + k * column].
template <typename A>
struct Left {
  const A* data;
  int64_t row, column;
};

// c (+)= a b: M rows, N vectors of columns, n products each; rows of b are kPanel or `pitch` apart.
template <int M, int N, typename A>
inline void block(Left<A> a, const A* b, int64_t b_pitch, int64_t n, bool add, A* c,
                  int64_t c_pitch) {
  Vector<A> sum[M][N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      sum[i][j] = add ? load(c + i * c_pitch + j * kLanes<A>) : Vector<A>{};
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    Vector<A> y[N];
    for (int j = 0; j < N; ++j) y[j] = load(b + k * b_pitch + j * kLanes<A>);
    for (int i = 0; i < M; ++i) {
      const A x = a.data[i * a.row + k * a.column];
      for (int j = 0; j < N; ++j) sum[i][j] += x * y[j];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) store(c + i * c_pitch + j * kLanes<A>, sum[i][j]);
  }
}

template <int N, typename A>
void blocks(Left<A> a, int64_t rows, const A* b, int64_t b_pitch, int64_t n, bool add, A* c,
            int64_t c_pitch) {
  for (; rows >= kTile; rows -= kTile, a.data += kTile * a.row, c += kTile * c_pitch) {
    block<kTile, N>(a, b, b_pitch, n, add, c, c_pitch);
  }
  switch (rows) {
    case 5: return block<5, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 4: return block<4, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 3: return block<3, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 2: return block<2, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 1: return block<1, N>(a, b, b_pitch, n, add, c, c_pitch);
  }
}

// c [rows, columns] (+)= a [rows, n] times b [n, columns]; columns whole vectors. b_panel: numbers
// from one panel of b to the next (kPanel if its rows are whole).
template <typename A>
void product(Left<A> a, int64_t rows, const A* b, int64_t b_pitch, int64_t b_panel, int64_t n,
             bool add, A* c, int64_t c_pitch, int64_t columns) {
  for (; columns >= kPanel<A>; columns -= kPanel<A>, b += b_panel, c += kPanel<A>) {
    blocks<kVectors>(a, rows, b, b_pitch, n, add, c, c_pitch);
  }
  switch (columns / kLanes<A>) {
    case 3: return blocks<kVectors < 3 ? 1 : 3>(a, rows, b, b_pitch, n, add, c, c_pitch);
    case 2: return blocks<kVectors < 2 ? 1 : 2>(a, rows, b, b_pitch, n, add, c, c_pitch);
    case 1: return blocks<1>(a, rows, b, b_pitch, n, add, c, c_pitch);
  }
}

template <typename A>
inline int64_t vectors_of(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// A pitch of whole vectors whose rows do not all fall into the same few sets of a cache.
template <typename A>
inline int64_t pitch_of(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(A);
  return kLine * ((n + kLine - 1) / kLine | 1);
}

}  // namespace fasttta

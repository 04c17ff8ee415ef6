// Vectors of the processor's registers: loads, stores, reductions, and sizes in whole vectors.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// Numbers in a vector.
template <typename A>
constexpr int kLanes = kBytes / sizeof(A);

template <typename A>
struct Vectors {
  typedef A type __attribute__((vector_size(kBytes)));
};
template <typename A>
using Vector = typename Vectors<A>::type;

// From and to any address.
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

// Lanes with those at a distance of half a vector, then of a quarter, ... until all are one.
template <typename A, int H, typename F, size_t... I>
inline Vector<A> folded(Vector<A> x, F&& f, std::index_sequence<I...> lanes) {
  if constexpr (H > 0) x = folded<A, H / 2>(f(x, Vector<A>{x[I ^ H]...}), f, lanes);
  return x;
}

// All lanes of x combined by f, which must be associative and commutative.
template <typename A, typename F>
inline A reduce(Vector<A> x, F&& f) {
  return folded<A, kLanes<A> / 2>(x, f, std::make_index_sequence<kLanes<A>>())[0];
}

// n rounded up to whole vectors.
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

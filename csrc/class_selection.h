// Exact selection of the k largest logits of a row, and the entropy of the selected classes.
#pragma once

#include <limits>

#include "exponential.h"

namespace fasttta {

template <typename A>
using key_t = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

// Integers in the order of the numbers, -0 = +0; its own inverse on the bits.
template <typename A>
inline key_t<A> key_of(A x) {
  const auto bits = bits_as<key_t<A>>(x + A(0));
  return bits ^ ((bits >> (8 * sizeof(A) - 1)) & std::numeric_limits<key_t<A>>::max());
}

template <typename A>
inline A value_of(key_t<A> key) {
  return bits_as<A>(key ^ ((key >> (8 * sizeof(A) - 1)) & std::numeric_limits<key_t<A>>::max()));
}

// The selected classes: keys above the threshold, and keys equal to it up to the index `last`.
template <typename A>
struct Selection {
  key_t<A> threshold;
  key_t<A> last;

  inline bool has(key_t<A> key, key_t<A> index) const {
    return (key > threshold) | ((key == threshold) & (index <= last));
  }
};

// Selects the k largest of z, of equal ones the lowest indices, as a stable descending sort does.
//
// Bisection, between the smallest and the largest key, for the largest threshold that k keys reach.
// It first halves the interval of numbers, which takes about log2(c) steps on logits, then that of
// keys, which always ends. A threshold that exactly k keys reach ends it early.
template <typename A>
inline Selection<A> select(const A* z, key_t<A>* keys, int64_t c, int64_t k) {
  using K = key_t<A>;
  K low = std::numeric_limits<K>::max(), high = std::numeric_limits<K>::min();
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t j = 0; j < c; ++j) {
    const K key = key_of(z[j]);
    keys[j] = key;
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  if (k >= c) return {low, static_cast<K>(c)};
  for (int step = 0; low < high; ++step) {  // at least k keys reach low, fewer than k high + 1
    K middle = key_of(value_of<A>(low) / 2 + value_of<A>(high) / 2);
    if (step >= 12 || !(middle > low && middle <= high)) {
      using U = std::make_unsigned_t<K>;
      const U distance = static_cast<U>(high) - static_cast<U>(low);
      middle = static_cast<K>(static_cast<U>(low) + distance / 2 + (distance & 1));
    }
    K count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < c; ++j) count += keys[j] >= middle;
    if (count == k) return {middle, static_cast<K>(c)};
    if (count > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  K above = 0;
#pragma omp simd reduction(+ : above)
  for (int64_t j = 0; j < c; ++j) above += keys[j] > low;
  int64_t wanted = k - above, last = -1;
  while (wanted > 0) wanted -= keys[++last] == low;
  return {low, static_cast<K>(last)};
}

// Returns the principal entropy of a row of predictions. Writes p times its derivative on p to u,
// and the sum of u to *inner: the gradient on the logits is u - p * inner.
template <typename A>
inline A principal(
    const A* p, const key_t<A>* keys, Selection<A> selected, A eps, A* u, int64_t c, A* inner) {
  using K = key_t<A>;
  A value = 0, sum = 0;
#pragma omp simd reduction(+ : value, sum)
  for (K j = 0; j < static_cast<K>(c); ++j) {
    const A q = p[j] + eps;
    const bool in = selected.has(keys[j], j);
    const A s = in ? surprise(q) : A(0);
    const A share = in & (q != 0) ? p[j] / q : A(0);
    value += p[j] * s;
    u[j] = p[j] * (s - share);
    sum += u[j];
  }
  *inner = sum;
  return value;
}

}  // namespace fasttta

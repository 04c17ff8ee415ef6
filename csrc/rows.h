// Softmax and exact selection of the k largest logits of a row.
#pragma once

#include <algorithm>

#include "numbers.h"

namespace fasttta {

// Rows of one unit of parallel work, by the class count alone: sums over samples are taken in an
// order that does not depend on the number of threads.
inline int64_t rows_per_unit(int64_t classes) {
  return std::max<int64_t>(1, std::min<int64_t>(64, 4096 / std::max<int64_t>(classes, 1)));
}

// Units a thread should at least have: 16,384 logits, about what waking a thread is worth.
inline int64_t units_per_thread(int64_t classes) {
  return std::max<int64_t>(1, 16384 / (rows_per_unit(classes) * std::max<int64_t>(classes, 1)));
}

// ln p of a class = (z - top) - log_sum.
template <typename A>
struct Normaliser {
  A top, log_sum;
};

// p = softmax(z) over c classes; nan everywhere if z has a nan or no finite largest element.
template <typename A>
inline Normaliser<A> softmax(const A* z, A* p, int64_t c) {
  A top = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < c; ++j) top = z[j] > top ? z[j] : top;
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < c; ++j) {
    p[j] = exp_(z[j] - top);
    sum += p[j];
  }
  const A scale = 1 / sum;
#pragma omp simd
  for (int64_t j = 0; j < c; ++j) p[j] *= scale;
  return {top, log_(sum)};
}

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

// Which classes are selected: keys above the threshold, and equal ones up to the index `last`.
template <typename A>
struct Selection {
  key_t<A> threshold;
  key_t<A> last;

  inline bool has(key_t<A> key, key_t<A> index) const {
    return (key > threshold) | ((key == threshold) & (index <= last));
  }
};

// The k largest of z, of equal ones the lowest indices: what a stable descending sort has first.
//
// Bisection between the smallest and the largest key for the largest threshold that k keys reach.
// It first halves the interval of numbers, which takes about log2(c) steps on logits, then that of
// keys, which always ends; a threshold that exactly k keys reach ends it early.
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

// Principal entropy of a row of predictions and, in u, p times its derivative on p; *inner is the
// sum of u, so that the gradient on the logits is u - p * inner.
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

// Calls f(begin, end) on ranges of rows, in parallel.
template <typename F>
inline void over_rows(int64_t n, int64_t c, const F& f) {
  const int64_t rows = rows_per_unit(c);
  torch::stable::parallel_for(
      0, (n + rows - 1) / rows, units_per_thread(c), [&](int64_t begin, int64_t end) {
        f(begin * rows, std::min(n, end * rows));
      });
}

// Weighted sums over rows of [n, c], added up in an order that is always the same.
template <typename A>
class ColumnSums {
 public:
  ColumnSums(int64_t n, int64_t c)
      : c_(c), rows_(rows_per_unit(c)), sums_((n + rows_ - 1) / rows_ * c) {}

  void add(int64_t row, A weight, const A* values) {
    A* sum = sums_.data() + row / rows_ * c_;
#pragma omp simd
    for (int64_t j = 0; j < c_; ++j) sum[j] += weight * values[j];
  }

  A* total() {
    A* sum = sums_.data();
    for (size_t unit = c_; unit < sums_.size(); unit += c_) {
#pragma omp simd
      for (int64_t j = 0; j < c_; ++j) sum[j] += sums_[unit + j];
    }
    return sum;
  }

 private:
  const int64_t c_, rows_;
  std::vector<A> sums_;
};

}  // namespace fasttta

// Softmax of rows, rows in parallel, and sums over rows in an order that is always the same.
#pragma once

#include <algorithm>

#include "exponential.h"
#include "tensors.h"

namespace fasttta {

// Rows of a unit of parallel work. They follow from the class count alone, so that the order of sums
// over rows does not depend on the number of threads.
inline int64_t rows_per_unit(int64_t classes) {
  return std::max<int64_t>(1, std::min<int64_t>(64, 4096 / std::max<int64_t>(classes, 1)));
}

// The fewest units of a thread: 16,384 logits, about what waking a thread is worth.
inline int64_t units_per_thread(int64_t classes) {
  return std::max<int64_t>(1, 16384 / (rows_per_unit(classes) * std::max<int64_t>(classes, 1)));
}

// ln p of a class is (z - top) - log_sum.
template <typename A>
struct Normaliser {
  A top, log_sum;
};

// Writes p = softmax(z) over c classes: nan everywhere if z has a nan or no finite largest element.
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

// Calls f(begin, end) on ranges of rows, in parallel.
template <typename F>
inline void over_rows(int64_t n, int64_t c, const F& f) {
  const int64_t rows = rows_per_unit(c);
  torch::stable::parallel_for(
      0, (n + rows - 1) / rows, units_per_thread(c), [&](int64_t begin, int64_t end) {
        f(begin * rows, std::min(n, end * rows));
      });
}

// Weighted sums over the rows of [n, c], a partial sum for each unit of parallel work.
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

// Sums in an order that does not depend on the number of threads, and dot products.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace fasttta {

template <typename A>
inline A dot(const A* x, const A* y, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

template <typename A>
inline double dot_in_double(const A* x, const A* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * y[i];
  return sum;
}

// Sums parts [groups, count, n] over count, in its order, into total [groups, n].
template <typename A>
void sum_parts(const A* parts, int64_t groups, int64_t count, int64_t n, A* total) {
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(count, 1));
  torch::stable::parallel_for(0, groups * n, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t group = begin / n, first = begin % n, some = std::min(end - begin, n - first);
      A* const to = total + begin;
      std::fill_n(to, some, A(0));
      for (int64_t part = 0; part < count; ++part) {
        const A* const from = parts + (group * count + part) * n + first;
#pragma omp simd
        for (int64_t i = 0; i < some; ++i) to[i] += from[i];
      }
      begin += some;
    }
  });
}

}  // namespace fasttta

// Tokens of heads [B, H, T, d]: where they are, packed copies of them, and heads in parallel.
#pragma once

#include <algorithm>

#include "matrix_product.h"
#include "tensors.h"

namespace fasttta {

constexpr int64_t kAhead = 8;  // tokens to prefetch
constexpr int64_t kRows = 48;  // tokens, at most, whose products are taken at a time

// A tensor [B, H, T, d] of any strides but the last, which is 1. A batch of one serves every sample.
template <typename A>
struct Heads {
  A* data;
  int64_t sample, head, token;

  explicit Heads(const Tensor& x)
      : data(static_cast<A*>(x.data_ptr())),
        sample(x.size(0) == 1 ? 0 : x.stride(0)), head(x.stride(1)), token(x.stride(2)) {}

  A* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * sample + h * head + t * token;
  }
};

// Has the processor fetch a token's channels: each token may be on another page of memory, which
// processors do not foresee.
template <typename A>
inline void prefetch(const A* x, int64_t d) {
  for (int64_t c = 0; c < d; c += 64 / sizeof(A)) __builtin_prefetch(x + c);
}

// Packs n rows of d channels, times `factor`, filled up with zeros to whole vectors.
template <typename A>
inline void pack_rows(const A* x, int64_t token, int64_t n, int64_t d, A factor, A* packed) {
  const int64_t width = vectors_of<A>(d);
  for (int64_t t = 0; t < n; ++t, x += token, packed += width) {
    if (t + kAhead < n) prefetch(x + kAhead * token, d);
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) packed[c] = factor * x[c];
    for (int64_t c = d; c < width; ++c) packed[c] = 0;
  }
}

// Packs packed rows [n, width] as columns: panels [d][kPanel], with zeros after the last column.
template <typename A>
inline void pack_columns(const A* rows, int64_t n, int64_t d, A* packed) {
  const int64_t width = vectors_of<A>(d);
  for (int64_t first = 0; first < n; first += kPanel<A>) {
    const int64_t count = std::min(kPanel<A>, n - first);
    for (int64_t c = 0; c < d; ++c, packed += kPanel<A>) {
      const A* x = rows + first * width + c;
      for (int64_t j = 0; j < count; ++j) packed[j] = x[j * width];
      for (int64_t j = count; j < kPanel<A>; ++j) packed[j] = 0;
    }
  }
}

// Calls f(begin, end, take) on ranges of units of work, in parallel. take(n) gives a range n numbers
// of scratch space, `each` in all.
template <typename A, typename F>
void in_parallel(const Tensor& like, int64_t units, int64_t each, F&& f) {
  const int64_t ranges = std::min<int64_t>(units, torch::stable::get_num_threads());
  const Tensor space = empty_wide<A>(like, {ranges, each});
  A* const first = space.template mutable_data_ptr<A>();
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* next = first + i * each;
      f(units * i / ranges, units * (i + 1) / ranges, [&next](int64_t n) {
        A* const start = next;
        next += n;
        return start;
      });
    }
  });
}

// Numbers of scratch space that a struct of them takes, which is made from (sizes, take).
template <typename Space, typename Sizes>
int64_t size_of_space(const Sizes& sizes) {
  int64_t all = 0;
  Space(sizes, [&all](int64_t n) {
    all += n;
    return nullptr;
  });
  return all;
}

}  // namespace fasttta

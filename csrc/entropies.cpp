// Entropy and principal entropy of each sample, and their gradients.
#include "class_selection.h"
#include "rows.h"

namespace fasttta {
namespace {

// -p ln p, 0 where p is 0; nan stays.
template <typename A>
inline A term(A z, A p, Normaliser<A> by) {
  return p == 0 ? A(0) : -p * ((z - by.top) - by.log_sum);
}

template <typename A>
A entropy_of(const A* z, const A* p, Normaliser<A> by, int64_t c) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < c; ++j) sum += term(z[j], p[j], by);
  return sum;
}

// Calls f(i, z, p, by, keys, space) for each row: its logits and predictions, the constants of ln p,
// and room for c keys and c numbers.
template <typename A, typename F>
void each_row(const Tensor& logits, const F& f) {
  const int64_t n = logits.size(0), c = logits.size(1);
  const Rows<A> z(logits, c);
  over_rows(n, c, [&](int64_t begin, int64_t end) {
    std::vector<A> read(c), p(c), space(c);
    std::vector<key_t<A>> keys(c);
    for (int64_t i = begin; i < end; ++i) {
      const A* row = z.read(i, read.data());
      const auto by = softmax(row, p.data(), c);
      f(i, row, p.data(), by, keys.data(), space.data());
    }
  });
}

// Calls f with a value of the type of arithmetic and the logits without gaps.
template <typename F>
Tensor on_logits(const Tensor& logits, int64_t k, F&& f) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [n, C]");
  STD_TORCH_CHECK(1 <= k && k <= logits.size(1), "k must be 1 to the class count");
  const Tensor z = torch::stable::contiguous(logits);
  return by_type(z, "logits", [&](auto element) { return f(element, z); });
}

Tensor entropy(const Tensor& logits) {
  return on_logits(logits, 1, [](auto element, const Tensor& z) {
    using A = decltype(element);
    const Tensor values = empty_wide<A>(z, {z.size(0)});
    A* out = values.template mutable_data_ptr<A>();
    each_row<A>(z, [&](int64_t i, const A* row, const A* p, auto by, auto*, A*) {
      out[i] = entropy_of(row, p, by, z.size(1));
    });
    return values;
  });
}

Tensor entropy_backward(const Tensor& grad, const Tensor& logits) {
  return on_logits(logits, 1, [&](auto element, const Tensor& z) {
    using A = decltype(element);
    const int64_t c = z.size(1);
    const Tensor up = dense<A>(grad), result = torch::stable::new_empty(z, z.sizes());
    const A* scale = up.template const_data_ptr<A>();
    const Rows<A> out(result, c);
    each_row<A>(z, [&](int64_t i, const A* row, const A* p, auto by, auto*, A* space) {
      const A value = entropy_of(row, p, by, c), by_row = scale[i];
      A* target = out.slot(i, space);
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) {
        target[j] = by_row * (term(row[j], p[j], by) - p[j] * value);
      }
      out.write(i, target);
    });
    return result;
  });
}

Tensor principal_entropy(const Tensor& logits, int64_t k, double eps) {
  return on_logits(logits, k, [&](auto element, const Tensor& z) {
    using A = decltype(element);
    const int64_t c = z.size(1);
    const Tensor values = empty_wide<A>(z, {z.size(0)});
    A* out = values.template mutable_data_ptr<A>();
    each_row<A>(z, [&](int64_t i, const A* row, const A* p, auto, auto* keys, A* space) {
      const auto selected = select(row, keys, c, k);
      A inner;
      out[i] = principal(p, keys, selected, A(eps), space, c, &inner);
    });
    return values;
  });
}

Tensor principal_entropy_backward(
    const Tensor& grad, const Tensor& logits, int64_t k, double eps) {
  return on_logits(logits, k, [&](auto element, const Tensor& z) {
    using A = decltype(element);
    const int64_t c = z.size(1);
    const Tensor up = dense<A>(grad), result = torch::stable::new_empty(z, z.sizes());
    const A* scale = up.template const_data_ptr<A>();
    const Rows<A> out(result, c);
    each_row<A>(z, [&](int64_t i, const A* row, const A* p, auto, auto* keys, A* space) {
      const auto selected = select(row, keys, c, k);
      A inner;
      principal(p, keys, selected, A(eps), space, c, &inner);
      const A by_row = scale[i];
      A* target = out.slot(i, space);
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) {
        target[j] = by_row * (space[j] - p[j] * inner);
      }
      out.write(i, target);
    });
    return result;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("entropy", TORCH_BOX(&entropy));
  m.impl("entropy_backward", TORCH_BOX(&entropy_backward));
  m.impl("principal_entropy", TORCH_BOX(&principal_entropy));
  m.impl("principal_entropy_backward", TORCH_BOX(&principal_entropy_backward));
}

}  // namespace fasttta

// The loss of ABPEM and READ on logits, and its balance term alone, with their gradients.
//
// p = softmax(z); principal entropy of a sample = -sum over its k largest of p ln(p + eps);
// balance = entropy of the class distribution m, m = sum_i w_i p_i / sum w, or
// softmax(sum_i w_i p_i). Two sweeps: predictions, principal terms and the sums over samples;
// then the balance term's gradient, which needs those sums.
#include "class_selection.h"
#include "rows.h"
#include "sums.h"

namespace fasttta {
namespace {

// Returns the balance entropy of the class sums m [c], and writes h over m: the balance's gradient on
// a sample's logits is w p (h - <p, h>).
template <typename A>
A balance(A* m, A mass, bool softmax_sum, int64_t c) {
  std::vector<A> space(c);
  if (softmax_sum) {
    convert(m, space.data(), c);
    softmax(space.data(), m, c);
  } else {
    for (int64_t j = 0; j < c; ++j) m[j] /= mass;
  }
  A value = 0;
#pragma omp simd reduction(+ : value)
  for (int64_t j = 0; j < c; ++j) {
    space[j] = surprise(m[j]);
    value += m[j] * space[j];
  }
  for (int64_t j = 0; j < c; ++j) {
    m[j] = softmax_sum ? m[j] * (space[j] - value) : space[j] / mass;
  }
  return value;
}

template <typename A>
std::tuple<Tensor, Tensor, Tensor, Tensor> head(
    const Tensor& logits, int64_t k, double entropy_weight, double balance_weight,
    bool softmax_sum, double eps, const A* weight) {
  const int64_t n = logits.size(0), c = logits.size(1);
  const Tensor total = empty_wide<A>(logits, {}), entropy = empty_wide<A>(logits, {}),
               column = empty_wide<A>(logits, {}), grad = empty_wide<A>(logits, {n, c}),
               predictions = empty_wide<A>(logits, {n, c});
  const Rows<A> z(logits, c);
  A* g = grad.mutable_data_ptr<A>();
  const auto share = [&](int64_t i) { return weight ? weight[i] : A(1); };

  A* p = predictions.mutable_data_ptr<A>();
  std::vector<A> values(n), inner(n);
  ColumnSums<A> sums(n, c);
  over_rows(n, c, [&](int64_t begin, int64_t end) {
    std::vector<A> space(c);
    std::vector<key_t<A>> keys(c);
    for (int64_t i = begin; i < end; ++i) {
      A* pi = p + i * c;
      const A* row = z.read(i, space.data());
      softmax(row, pi, c);
      const auto selected = select(row, keys.data(), c, k);
      values[i] = principal(pi, keys.data(), selected, A(eps), g + i * c, c, &inner[i]);
      sums.add(i, share(i), pi);
    }
  });
  A mass = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    mass += share(i);
    sum += share(i) * values[i];
  }
  A* h = sums.total();
  const A mean = sum / mass, value = balance(h, mass, softmax_sum, c);

  over_rows(n, c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const A* pi = p + i * c;
      const A a = A(entropy_weight) * share(i) / mass, b = A(balance_weight) * share(i);
      const A constant = a * inner[i] - b * dot(pi, h, c);
      A* gi = g + i * c;  // p times the derivative on p, from the first sweep
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) gi[j] = a * gi[j] - pi[j] * (constant + b * h[j]);
    }
  });
  *entropy.mutable_data_ptr<A>() = mean;
  *column.mutable_data_ptr<A>() = value;
  *total.mutable_data_ptr<A>() = A(entropy_weight) * mean - A(balance_weight) * value;
  return {total, entropy, column, grad};
}

template <typename A>
std::tuple<Tensor, Tensor> balance_alone(
    const Tensor& logits, bool softmax_sum, const A* weight) {
  const int64_t n = logits.size(0), c = logits.size(1);
  const Tensor value = empty_wide<A>(logits, {}), grad = empty_wide<A>(logits, {n, c});
  const Rows<A> z(logits, c);
  A* g = grad.mutable_data_ptr<A>();
  const auto share = [&](int64_t i) { return weight ? weight[i] : A(1); };
  ColumnSums<A> sums(n, c);
  over_rows(n, c, [&](int64_t begin, int64_t end) {
    std::vector<A> space(c);
    for (int64_t i = begin; i < end; ++i) {
      softmax(z.read(i, space.data()), g + i * c, c);
      sums.add(i, share(i), g + i * c);
    }
  });
  A mass = 0;
  for (int64_t i = 0; i < n; ++i) mass += share(i);
  A* h = sums.total();
  *value.mutable_data_ptr<A>() = balance(h, mass, softmax_sum, c);
  over_rows(n, c, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* gi = g + i * c;
      const A constant = dot(gi, h, c), b = share(i);
#pragma omp simd
      for (int64_t j = 0; j < c; ++j) gi[j] = b * gi[j] * (h[j] - constant);
    }
  });
  return {value, grad};
}

// Calls f with the weights, in the type of arithmetic.
template <typename F>
auto with_weight(const Tensor& logits, const std::optional<Tensor>& weight, F&& f) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) > 0 && logits.size(1) > 0,
                  "logits must be [n, C], n and C at least 1");
  STD_TORCH_CHECK(!weight || weight->numel() == logits.size(0), "weight must be [n]");
  return by_type(logits, "logits", [&](auto element) {
    using A = decltype(element);
    if (!weight) return f(static_cast<const A*>(nullptr));
    const Tensor w = dense<A>(*weight);
    return f(w.const_data_ptr<A>());
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> adaptation_head(
    const Tensor& logits, int64_t k, double entropy_weight, double balance_weight,
    bool softmax_sum, double eps, std::optional<Tensor> weight) {
  const Tensor z = torch::stable::contiguous(logits);
  return with_weight(z, weight, [&](const auto* w) {
    STD_TORCH_CHECK(1 <= k && k <= z.size(1), "k must be 1 to the class count");
    return head(z, k, entropy_weight, balance_weight, softmax_sum, eps, w);
  });
}

std::tuple<Tensor, Tensor> balance_entropy(
    const Tensor& logits, bool softmax_sum, std::optional<Tensor> weight) {
  const Tensor z = torch::stable::contiguous(logits);
  return with_weight(z, weight, [&](const auto* w) {
    return balance_alone(z, softmax_sum, w);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("adaptation_head", TORCH_BOX(&adaptation_head));
  m.impl("balance_entropy", TORCH_BOX(&balance_entropy));
}

}  // namespace fasttta

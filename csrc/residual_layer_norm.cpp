// Residual + branch and the LayerNorm of the sum, and their gradients: one read, one write of each.
#include <cmath>
#include <optional>

#include "sums.h"

namespace fasttta {
namespace {

constexpr int64_t kUnit = 64;  // rows of a unit of parallel work, and of a partial sum of gradients

using Optional = std::optional<Tensor>;

Tensor dense_as_is(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

int64_t rows_of(const Tensor& x) { return x.numel() == 0 ? 0 : x.numel() / x.size(x.dim() - 1); }

ScalarType wider(ScalarType x, ScalarType y) {
  if (x == y) return x;
  return x == ScalarType::Double || y == ScalarType::Double ? ScalarType::Double
                                                            : ScalarType::Float;
}

std::vector<int64_t> shape_of(const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  return shape;
}

// The weights of the LayerNorm in the type of arithmetic, or `value` in their place.
template <typename A>
std::vector<A> affine(const Optional& x, int64_t d, A value, const char* name) {
  if (!x) return std::vector<A>(d, value);
  STD_TORCH_CHECK(x->numel() == d, name, " must be [D]");
  const Tensor wide = dense<A>(*x);
  const A* const data = wide.template const_data_ptr<A>();
  return std::vector<A>(data, data + d);
}

// Calls f(first row, end, unit) on units of rows, in parallel.
template <typename F>
void over_units(int64_t rows, int64_t d, F&& f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / (kUnit * std::max<int64_t>(d, 1)));
  torch::stable::parallel_for(
      0, (rows + kUnit - 1) / kUnit, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          f(i * kUnit, std::min(rows, (i + 1) * kUnit), i);
        }
      });
}

template <typename A>
A sum_of(const A* x, int64_t d) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < d; ++c) sum += x[c];
  return sum;
}

// Mean and 1 / standard deviation of d numbers.
template <typename A>
std::pair<A, A> moments(const A* x, int64_t d, A eps) {
  const A mean = sum_of(x, d) / d;
  A squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t c = 0; c < d; ++c) squares += (x[c] - mean) * (x[c] - mean);
  return {mean, 1 / std::sqrt(squares / d + eps)};
}

std::tuple<Tensor, Tensor, Tensor> residual_layer_norm(
    const Tensor& residual_, const Optional& branch_, const Optional& weight, const Optional& bias,
    double eps, ScalarType dtype) {
  STD_TORCH_CHECK(residual_.dim() > 0, "residual must be [..., D]");
  const Tensor residual = dense_as_is(residual_);
  const int64_t d = residual.size(residual.dim() - 1), rows = rows_of(residual);
  const Tensor branch = branch_ ? dense_as_is(*branch_) : residual;
  STD_TORCH_CHECK(branch.numel() == residual.numel(), "branch must be as residual");
  const ScalarType type = wider(residual.scalar_type(), branch.scalar_type());
  const std::vector<int64_t> shape = shape_of(residual);
  const Tensor total =
      torch::stable::new_empty(residual, branch_ ? shape : std::vector<int64_t>{0}, type);
  const Tensor normed = torch::stable::new_empty(residual, shape, dtype);
  return by_type(total, "residual", [&](auto a) {
    using A = decltype(a);
    const Tensor stats = empty_wide<A>(residual, {2, rows});
    const std::vector<A> w = affine<A>(weight, d, 1, "weight"), b = affine<A>(bias, d, 0, "bias");
    const Rows<A> xs(residual, d), ys(branch, d), sums(branch_ ? total : residual, d),
        outs(normed, d);
    A *const means = stats.template mutable_data_ptr<A>(), *const rstds = means + rows;
    over_units(rows, d, [&](int64_t first, int64_t end, int64_t) {
      std::vector<A> space(4 * d);
      for (int64_t i = first; i < end; ++i) {
        const A* x = xs.read(i, space.data());
        if (branch_) {
          const A* const y = ys.read(i, space.data() + d);
          A* const sum = sums.slot(i, space.data() + 2 * d);
#pragma omp simd
          for (int64_t c = 0; c < d; ++c) sum[c] = x[c] + y[c];
          sums.write(i, sum);
          x = sums.read(i, space.data());  // as rounded to its type
        }
        const auto [mean, rstd] = moments<A>(x, d, static_cast<A>(eps));
        means[i] = mean;
        rstds[i] = rstd;
        A* const out = outs.slot(i, space.data() + 3 * d);
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) out[c] = (x[c] - mean) * rstd * w[c] + b[c];
        outs.write(i, out);
      }
    });
    return std::make_tuple(total, normed, stats);
  });
}

std::tuple<Tensor, Tensor, Tensor> residual_layer_norm_backward(
    const Tensor& grad_normed_, const Optional& grad_total_, const Tensor& total_,
    const Tensor& stats, const Optional& weight, ScalarType branch_dtype, bool to_total,
    bool to_branch, bool to_affine) {
  STD_TORCH_CHECK(total_.dim() > 0, "total must be [..., D]");
  const Tensor total = dense_as_is(total_), grad_normed = dense_as_is(grad_normed_);
  const Tensor grad_total = grad_total_ ? dense_as_is(*grad_total_) : total;
  const int64_t d = total.size(total.dim() - 1), rows = rows_of(total);
  STD_TORCH_CHECK(grad_normed.numel() == total.numel() && grad_total.numel() == total.numel(),
                  "gradients must be as total");
  const std::vector<int64_t> shape = shape_of(total), nothing{0};
  const Tensor grad =
      torch::stable::new_empty(total, to_total ? shape : nothing, total.scalar_type());
  const Tensor branch = torch::stable::new_empty(total, to_branch ? shape : nothing, branch_dtype);
  return by_type(total, "total", [&](auto a) {
    using A = decltype(a);
    STD_TORCH_CHECK(stats.numel() == 2 * rows, "stats must be [2, rows]");
    const Tensor kept = dense<A>(stats);
    const A *const means = kept.template const_data_ptr<A>(), *const rstds = means + rows;
    const std::vector<A> w = affine<A>(weight, d, 1, "weight");
    const int64_t units = (rows + kUnit - 1) / kUnit;
    std::vector<A> parts(to_affine ? units * 2 * d : 0);
    const Rows<A> xs(total, d), ups(grad_normed, d), others(grad_total, d), grads(grad, d),
        branches(branch, d);
    over_units(rows, d, [&](int64_t first, int64_t end, int64_t unit) {
      std::vector<A> space(5 * d);
      A *const along = space.data() + 3 * d, *const out = along + d;
      for (int64_t i = first; i < end; ++i) {
        const A *const x = xs.read(i, space.data()), *const up = ups.read(i, space.data() + d);
        const A mean = means[i], rstd = rstds[i];
        if (to_affine) {
          A *const of_weight = parts.data() + unit * 2 * d, *const of_bias = of_weight + d;
#pragma omp simd
          for (int64_t c = 0; c < d; ++c) {
            of_weight[c] += up[c] * ((x[c] - mean) * rstd);
            of_bias[c] += up[c];
          }
        }
        if (!to_total && !to_branch) continue;
        A sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
        for (int64_t c = 0; c < d; ++c) {
          along[c] = up[c] * w[c];
          sum += along[c];
          product += along[c] * ((x[c] - mean) * rstd);
        }
        sum /= d;
        product /= d;
        A* const to = to_total ? grads.slot(i, out) : out;
        if (grad_total_) {
          const A* const other = others.read(i, space.data() + 2 * d);
#pragma omp simd
          for (int64_t c = 0; c < d; ++c) {
            to[c] = rstd * (along[c] - sum - (x[c] - mean) * rstd * product) + other[c];
          }
        } else {
#pragma omp simd
          for (int64_t c = 0; c < d; ++c) {
            to[c] = rstd * (along[c] - sum - (x[c] - mean) * rstd * product);
          }
        }
        if (to_total) grads.write(i, to);
        if (to_branch) {
          A* const same = branches.slot(i, to);
          if (same != to) std::copy_n(to, d, same);
          branches.write(i, to);
        }
      }
    });
    const Tensor of_affine =
        empty_wide<A>(total, to_affine ? std::vector<int64_t>{2, d} : nothing);
    if (to_affine) {
      sum_parts(parts.data(), 1, units, 2 * d, of_affine.template mutable_data_ptr<A>());
    }
    return std::make_tuple(grad, branch, of_affine);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("residual_layer_norm", TORCH_BOX(&residual_layer_norm));
  m.impl("residual_layer_norm_backward", TORCH_BOX(&residual_layer_norm_backward));
}

}  // namespace fasttta

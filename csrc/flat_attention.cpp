// RAda's attention, K softmax(all pairs of scores of a head) v, and its gradients.
//
// It is a row softmax whose rows are then weighted with K times the softmax over rows of their
// log-sum-exp. The log-sum-exp is kept as its maximum and the rest: at scores of some hundred (RAda
// with CoOp) their rounded sum would cost 4 digits of the exponentials in float32.
#include "rows.h"
#include "softmax_attention.h"
#include "sums.h"

namespace fasttta {
namespace {

// Writes n times each row's share of the sum of all n x n exponentials.
template <typename A>
void weigh(const A* top, const A* rest, int64_t n, A* share) {
  A most = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < n; ++i) most = top[i] > most ? top[i] : most;
  for (int64_t i = 0; i < n; ++i) share[i] = top[i] - most + rest[i];
  softmax(share, share, n);
  for (int64_t i = 0; i < n; ++i) share[i] *= n;
}

// The sum over a head's rows of grad * out, divided by n.
template <typename A>
double mean_of(const Heads<A>& grad, const Heads<A>& out, int64_t b, int64_t h, int64_t n,
               int64_t d) {
  double sum = 0;
  for (int64_t t = 0; t < n; ++t) {
    const A *g = grad.at(b, h, t), *o = out.at(b, h, t);
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < d; ++c) sum += static_cast<double>(g[c]) * o[c];
  }
  return sum / n;
}

// The sum over the batch of [B, H, K, d]: [1, H, K, d].
template <typename A>
Tensor sum_over_batch(const Tensor& parts) {
  const Tensor total = empty_wide<A>(parts, {1, parts.size(1), parts.size(2), parts.size(3)});
  sum_parts(parts.const_data_ptr<A>(), 1, parts.size(0), total.numel(),
            total.mutable_data_ptr<A>());
  return total;
}

template <typename A>
Tensor readable_heads(const Tensor& x, const char* name) {
  return readable_as_k<A>(x, name, 4, "[B, H, K, d]");
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.size(0) == k.size(0) || q.size(0) == 1, "q must be of k's batch, or of one");
  STD_TORCH_CHECK(k.size(2) > 0, "k needs something in every head");
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK((i == 0 || q.size(i) == k.size(i)) && v.size(i) == k.size(i),
                    "q, k and v must be [B, H, K, d] alike");
  }
}

std::tuple<Tensor, Tensor, Tensor> flat_attention(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, double scale) {
  return by_type(k_, "k", [&](auto a) {
    using A = decltype(a);
    const Tensor q = readable_heads<A>(q_, "q"), k = readable_heads<A>(k_, "k"), v = readable_heads<A>(v_, "v");
    check(q, k, v);
    const int64_t n = k.size(2), d = k.size(3), heads = k.size(0) * k.size(1);
    const std::vector<int64_t> rows{k.size(0), k.size(1), n};
    const Tensor out = empty_wide<A>(k, {k.size(0), k.size(1), n, d});
    const Tensor top = empty_wide<A>(k, rows), rest = empty_wide<A>(k, rows);
    A *tops = top.template mutable_data_ptr<A>(), *rests = rest.template mutable_data_ptr<A>();
    attend<A>(q, k, v, static_cast<A>(scale), out, [&](int64_t row, A most, A sum) {
      tops[row] = most;
      rests[row] = log_(sum);
    });
    A* x = out.template mutable_data_ptr<A>();
    torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> share(n);
      for (int64_t i = begin * n; i < end * n; ++i) {
        if (i % n == 0) weigh(tops + i, rests + i, n, share.data());
        const A factor = share[i % n];
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) x[i * d + c] *= factor;
      }
    });
    return std::tuple<Tensor, Tensor, Tensor>(in_type_of(v_, out), top, rest);
  });
}

std::tuple<Tensor, Tensor, Tensor> flat_attention_backward(
    const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& out_,
    const Tensor& top_, const Tensor& rest_, double scale) {
  return by_type(k_, "k", [&](auto a) {
    using A = decltype(a);
    const Tensor grad = readable_heads<A>(grad_, "grad"), q = readable_heads<A>(q_, "q"), k = readable_heads<A>(k_, "k"),
                 v = readable_heads<A>(v_, "v"), out = readable_heads<A>(out_, "out"), top = dense<A>(top_),
                 rest = dense<A>(rest_);
    check(q, k, v);
    const int64_t heads = k.size(1), n = k.size(2), d = k.size(3);
    for (int64_t i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(grad.size(i) == k.size(i) && out.size(i) == k.size(i),
                      "grad and out must be as k");
    }
    STD_TORCH_CHECK(top.numel() == k.size(0) * heads * n && rest.numel() == top.numel(),
                    "top and rest must be [B, H, K]");
    const std::vector<int64_t> shape{k.size(0), heads, n, d};
    const Tensor dq = empty_wide<A>(k, shape), dk = empty_wide<A>(k, shape),
                 dv = empty_wide<A>(k, shape);
    const Heads<A> grads(grad), outs(out);
    const A *tops = top.template const_data_ptr<A>(), *rests = rest.template const_data_ptr<A>();
    const auto weights = [&](int64_t b, int64_t h) {
      const A *most = tops + (b * heads + h) * n, *others = rests + (b * heads + h) * n;
      std::vector<A> factor(n);
      weigh(most, others, n, factor.data());
      for (int64_t i = 0; i < n; ++i) factor[i] *= exp_(-others[i]);
      const A mean = static_cast<A>(mean_of(grads, outs, b, h, n, d));
      return [=, factor = std::move(factor)](int64_t t, const A*) {
        return Weights<A>{most[t], factor[t], mean};
      };
    };
    attend_backward<A>(grad, q, k, v, static_cast<A>(scale), dq, dk, dv, weights);
    const bool shared = q.size(0) != k.size(0);
    return std::tuple<Tensor, Tensor, Tensor>(
        in_type_of(q_, shared ? sum_over_batch<A>(dq) : dq), in_type_of(k_, dk),
        in_type_of(v_, dv));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("flat_attention", TORCH_BOX(&flat_attention));
  m.impl("flat_attention_backward", TORCH_BOX(&flat_attention_backward));
}

}  // namespace fasttta

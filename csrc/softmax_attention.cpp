// Softmax attention, softmax(scale q k^T) v of each head, and its gradients, in float32.
#include "softmax_attention.h"
#include "sums.h"

namespace fasttta {
namespace {

Tensor checked(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float, name,
                  " must be [B, H, T, d] in float32");
  return readable<float>(x);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3) &&
                      k.size(2) > 0,
                  "q [B, H, T, d] and k [B, H, S, d] do not fit");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(k.size(i) == v.size(i), "v must be as k");
}

// [B, H, T, d] whose memory is [B, T, H, d], as the next projection reads it.
Tensor empty_heads(const Tensor& like) {
  const std::vector<int64_t> shape{like.size(0), like.size(2), like.size(1), like.size(3)};
  return torch::stable::transpose(torch::stable::new_empty(like, shape), 1, 2);
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, double scale) {
  const Tensor q = checked(q_, "q"), k = checked(k_, "k"), v = checked(v_, "v");
  check(q, k, v);
  const Tensor out = empty_heads(q);
  const Tensor lse = torch::stable::new_empty(
      q, std::vector<int64_t>{q.size(0), q.size(1), q.size(2)});
  float* log_sum = lse.mutable_data_ptr<float>();
  attend<float>(q, k, v, static_cast<float>(scale), out, [&](int64_t row, float top, float sum) {
    log_sum[row] = top + log_(sum);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& out_,
    const Tensor& lse, double scale) {
  const Tensor grad = checked(grad_, "grad"), q = checked(q_, "q"), k = checked(k_, "k"),
               v = checked(v_, "v"), out = checked(out_, "out"), log_sums = dense<float>(lse);
  check(q, k, v);
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(grad.size(i) == q.size(i) && out.size(i) == q.size(i),
                    "grad and out must be as q");
  }
  STD_TORCH_CHECK(lse.numel() == q.size(0) * q.size(1) * q.size(2), "lse must be [B, H, T]");
  const Tensor dq = empty_heads(q), dk = empty_heads(k), dv = empty_heads(v);
  const Heads<float> outs(out);
  const float* log_sum = log_sums.const_data_ptr<float>();
  const int64_t heads = q.size(1), queries = q.size(2), d = q.size(3);
  const auto weights = [&](int64_t b, int64_t h) {
    return [&, b, h](int64_t t, const float* g) {
      const float* o = outs.at(b, h, t);
      if (t + kAhead < queries) prefetch(outs.at(b, h, t + kAhead), d);
      return Weights<float>{log_sum[(b * heads + h) * queries + t], 1, dot(o, g, d)};
    };
  };
  attend_backward<float>(grad, q, k, v, static_cast<float>(scale), dq, dk, dv, weights);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace fasttta

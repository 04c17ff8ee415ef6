// Softmax attention, softmax(scale q k^T) v of each head, and its gradients, in float32 and in bf16.
#include "pair_attention.h"
#include "sums.h"

namespace fasttta {
namespace {

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

// x with the channels next to each other.
Tensor checked(const Tensor& x, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 4 && (is_bf16(x) || x.scalar_type() == ScalarType::Float), name,
                  " must be [B, H, T, d] in float32 or bfloat16");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " must be of q's type");
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3) &&
                      k.size(2) > 0,
                  "q [B, H, T, d] and k [B, H, S, d] do not fit");
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(k.size(i) == v.size(i), "v must be as k");
}

float dot_of_halves(const c10::BFloat16* x, const c10::BFloat16* y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<float>(x[i]) * static_cast<float>(y[i]);
  return sum;
}

// [B, H, T, d] whose memory is [B, T, H, d], as the next projection reads it.
Tensor empty_heads(const Tensor& like) {
  const std::vector<int64_t> shape{like.size(0), like.size(2), like.size(1), like.size(3)};
  return torch::stable::transpose(torch::stable::new_empty(like, shape), 1, 2);
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, double scale) {
  const Tensor q = checked(q_, "q", q_), k = checked(k_, "k", q_), v = checked(v_, "v", q_);
  check(q, k, v);
  const Tensor out = empty_heads(q);
  const Tensor lse = empty_wide<float>(q, {q.size(0), q.size(1), q.size(2)});
  float* log_sum = lse.mutable_data_ptr<float>();
  if (is_bf16(q)) {
    attend_pairs(q, k, v, static_cast<float>(scale), out,
                 [&](int64_t row, float exponent) { log_sum[row] = exponent; });
    return {out, lse};
  }
  attend<float>(q, k, v, static_cast<float>(scale), out, [&](int64_t row, float top, float sum) {
    log_sum[row] = top + log_(sum);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& out_,
    const Tensor& lse, double scale) {
  const Tensor grad = checked(grad_, "grad", q_), q = checked(q_, "q", q_),
               k = checked(k_, "k", q_), v = checked(v_, "v", q_), out = checked(out_, "out", q_),
               log_sums = dense<float>(lse);
  check(q, k, v);
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(grad.size(i) == q.size(i) && out.size(i) == q.size(i),
                    "grad and out must be as q");
  }
  STD_TORCH_CHECK(lse.numel() == q.size(0) * q.size(1) * q.size(2), "lse must be [B, H, T]");
  const Tensor dq = empty_heads(q), dk = empty_heads(k), dv = empty_heads(v);
  const float* log_sum = log_sums.const_data_ptr<float>();
  const int64_t heads = q.size(1), queries = q.size(2), d = q.size(3);
  if (is_bf16(q)) {
    const Heads<c10::BFloat16> outs(out), grads(grad);
    const auto rows = [&](int64_t b, int64_t h) {
      return [&, b, h](int64_t t) {
        const float power = kLog2E * log_sum[(b * heads + h) * queries + t];
        return PairRow{power, dot_of_halves(outs.at(b, h, t), grads.at(b, h, t), d)};
      };
    };
    attend_pairs_backward(grad, q, k, v, static_cast<float>(scale), dq, dk, dv, rows);
    return {dq, dk, dv};
  }
  const Heads<float> outs(out);
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

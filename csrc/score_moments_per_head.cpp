// Moments of each head's scores c q k^T in every pair of spans, and their gradients, from d x d
// covariances of its tokens: at d = 64 six times fewer operations than from the scores.
//
// With mean tokens q, k and population covariances, var = c^2 (q'C_K q + k'C_Q k + <C_Q, C_K>): no
// term is negative. A head's tokens are read once, into the cache, and centred there.
#include "heads.h"
#include "sums.h"

namespace fasttta {
namespace {

constexpr int64_t kChunk = 64;  // tokens whose products with each other are taken at a time

// Reads and writes tokens of a tensor [B, H, T, d] of any type, and any strides but the last, 1.
template <typename A>
class Tokens {
 public:
  explicit Tokens(const Tensor& x)
      : data_(static_cast<char*>(x.data_ptr())), type_(x.scalar_type()), d_(x.size(3)),
        sample_(x.stride(0)), head_(x.stride(1)), token_(x.stride(2)) {}

  void read(int64_t b, int64_t h, int64_t t, A* to) const {
    if (type_ == type_of<A>) {
      const A* x = at<A>(b, h, t);
      __builtin_memcpy(to, x, d_ * sizeof(A));
    } else if (type_ == ScalarType::BFloat16) {
      convert(at<c10::BFloat16>(b, h, t), to, d_);
    } else {
      convert(at<c10::Half>(b, h, t), to, d_);
    }
  }

  void write(int64_t b, int64_t h, int64_t t, const A* from) const {
    if (type_ == type_of<A>) {
      __builtin_memcpy(at<A>(b, h, t), from, d_ * sizeof(A));
    } else if (type_ == ScalarType::BFloat16) {
      convert(from, at<c10::BFloat16>(b, h, t), d_);
    } else {
      convert(from, at<c10::Half>(b, h, t), d_);
    }
  }

  void fetch(int64_t b, int64_t h, int64_t t) const {
    if (type_ == type_of<A>) prefetch(at<A>(b, h, t), d_);
  }

 private:
  template <typename T>
  T* at(int64_t b, int64_t h, int64_t t) const {
    return reinterpret_cast<T*>(data_) + b * sample_ + h * head_ + t * token_;
  }

  char* const data_;
  const ScalarType type_;
  const int64_t d_, sample_, head_, token_;
};

struct Shape {
  int64_t batch, heads, tokens, d, width;
  std::vector<int64_t> spans;

  template <typename A>
  static Shape of(const Tensor& q, const Tensor& k, const std::vector<int64_t>& spans, A) {
    const char* const wanted = "q and k must be [B, H, T, d] alike, channels next to each other";
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.scalar_type() == k.scalar_type(), wanted);
    for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(q.size(i) == k.size(i), wanted);
    STD_TORCH_CHECK(q.size(3) > 0 && q.stride(3) == 1 && k.stride(3) == 1, wanted);
    int64_t tokens = 0;
    for (const int64_t n : spans) {
      STD_TORCH_CHECK(n > 0, "spans must be positive");
      tokens += n;
    }
    STD_TORCH_CHECK(tokens == q.size(2), "spans must add up to T");
    return {q.size(0), q.size(1), tokens, q.size(3), vectors_of<A>(q.size(3)), spans};
  }

  int64_t count() const { return static_cast<int64_t>(spans.size()); }
  int64_t side() const { return tokens * width + count() * (d + 1) * width; }  // numbers of a Side
};

// A head's tokens less their span's mean, [T, width]; each span's mean token and covariance.
template <typename A>
struct Side {
  A *tokens, *means, *covariances;

  template <typename Take>
  Side(const Shape& s, Take&& take)
      : tokens(take(s.tokens * s.width)), means(take(s.count() * s.width)),
        covariances(take(s.count() * s.d * s.width)) {}

  A* mean(const Shape& s, int64_t i) const { return means + i * s.width; }
  A* covariance(const Shape& s, int64_t i) const { return covariances + i * s.d * s.width; }

  void fill(const Shape& s, const Tokens<A>& x, int64_t b, int64_t h) {
    int64_t first = 0;
    std::vector<double> total(s.width);
    std::vector<A> part(s.width);
    for (int64_t i = 0; i < s.count(); first += s.spans[i++]) {
      const int64_t n = s.spans[i];
      A* const rows = tokens + first * s.width;
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t t = 0; t < n; ++t) {  // sums of a few in A, those in double
        A* row = rows + t * s.width;
        if (first + t + kAhead < s.tokens) x.fetch(b, h, first + t + kAhead);
        x.read(b, h, first + t, row);
        std::fill(row + s.d, row + s.width, A(0));
        A* sum = part.data();
        if (t % 16 == 0) std::fill(part.begin(), part.end(), A(0));
#pragma omp simd
        for (int64_t c = 0; c < s.width; ++c) sum[c] += row[c];
        if (t % 16 == 15 || t + 1 == n) {
          for (int64_t c = 0; c < s.width; ++c) total[c] += sum[c];
        }
      }
      A* const centre = mean(s, i);
      for (int64_t c = 0; c < s.width; ++c) centre[c] = static_cast<A>(total[c] / n);
      A* const squares = covariance(s, i);
      for (int64_t t = 0; t < n; t += kChunk) {
        const int64_t m = std::min(kChunk, n - t);
        A* const some = rows + t * s.width;
        for (int64_t j = 0; j < m; ++j) {
          A* row = some + j * s.width;
#pragma omp simd
          for (int64_t c = 0; c < s.width; ++c) row[c] -= centre[c];
        }
        product<A>({some, 1, s.width}, s.d, some, s.width, kPanel<A>, m, t > 0, squares, s.width,
                   s.width);
      }
      const A scale = A(1) / static_cast<A>(n);
      for (int64_t c = 0; c < s.d * s.width; ++c) squares[c] *= scale;
    }
  }
};

// x'Cx
template <typename A>
double form(const A* x, const A* covariance, const Shape& s) {
  double sum = 0;
  for (int64_t c = 0; c < s.d; ++c) sum += x[c] * dot_in_double(x, covariance + c * s.width, s.d);
  return sum;
}

std::tuple<Tensor, Tensor> head_moments(
    const Tensor& q, const Tensor& k, std::vector<int64_t> spans, double scale) {
  return by_type(q, "q", [&](auto a) {
    using A = decltype(a);
    const Shape s = Shape::of(q, k, spans, a);
    const int64_t m = s.count();
    const Tensor mean = empty_wide<A>(q, {s.batch, s.heads, m, m});
    const Tensor std = empty_wide<A>(q, {s.batch, s.heads, m, m});
    A *means = mean.template mutable_data_ptr<A>(), *stds = std.template mutable_data_ptr<A>();
    const Tokens<A> queries(q), keys(k);
    const auto work = [&](int64_t begin, int64_t end, auto&& take) {
      Side<A> x(s, take), y(s, take);
      for (int64_t unit = begin; unit < end; ++unit) {
        x.fill(s, queries, unit / s.heads, unit % s.heads);
        y.fill(s, keys, unit / s.heads, unit % s.heads);
        for (int64_t i = 0; i < m; ++i) {
          for (int64_t j = 0; j < m; ++j) {
            const A *xm = x.mean(s, i), *ym = y.mean(s, j), *xc = x.covariance(s, i),
                    *yc = y.covariance(s, j);
            const double variance =
                form(xm, yc, s) + form(ym, xc, s) + dot_in_double(xc, yc, s.d * s.width);
            const double n = static_cast<double>(spans[i]) * static_cast<double>(spans[j]);
            const int64_t at = (unit * m + i) * m + j;
            means[at] = static_cast<A>(scale * dot_in_double(xm, ym, s.d));
            stds[at] = static_cast<A>(
                std::abs(scale) * std::sqrt((variance < 0 ? 0 : variance) * (n / (n - 1))));
          }
        }
      }
    };
    in_parallel<A>(q, s.batch * s.heads, 2 * s.side(), work);
    return std::tuple<Tensor, Tensor>(mean, std);
  });
}

// Writes dq_i = c n_j (alpha k + beta c (C_K q_i + ((q_i - q)'k) k)), the product of the centred
// tokens with a matrix, plus a constant; or dk, with the sides exchanged.
template <typename A, typename F>
void gradient(const Shape& s, const Side<A>& side, const Side<A>& other, bool self_blocks,
              F&& coefficients, A* matrix, A* constant, A* rows, const Tokens<A>& out, int64_t b,
              int64_t h) {
  int64_t first = 0;
  for (int64_t i = 0; i < s.count(); first += s.spans[i++]) {
    const A* centre = side.mean(s, i);
    std::fill_n(matrix, s.d * s.width, A(0));
    std::fill_n(constant, s.width, A(0));
    for (int64_t j = 0; j < s.count(); ++j) {
      if (i == j && !self_blocks) continue;
      // no structured binding: Clang's OpenMP captures none
      const std::pair<A, A> factors = coefficients(i, j);
      const A alpha = factors.first, beta = factors.second;
      const A *mean = other.mean(s, j), *covariance = other.covariance(s, j);
      for (int64_t c = 0; c < s.d; ++c) {
        const A* row = covariance + c * s.width;
        A* to = matrix + c * s.width;
        const A factor = beta * mean[c];
#pragma omp simd
        for (int64_t e = 0; e < s.width; ++e) to[e] += beta * row[e] + factor * mean[e];
        constant[c] += static_cast<A>(alpha * mean[c] + beta * dot_in_double(centre, row, s.d));
      }
    }
    if (s.count() == 1 && !self_blocks) {  // without gradient, whatever the tokens are
      for (int64_t t = 0; t < s.spans[i]; ++t) out.write(b, h, first + t, constant);
      continue;
    }
    for (int64_t t = 0; t < s.spans[i]; t += kRows) {
      const int64_t n = std::min(kRows, s.spans[i] - t);
      const A* some = side.tokens + (first + t) * s.width;
      product<A>({some, s.width, 1}, n, matrix, s.width, kPanel<A>, s.d, false, rows, s.width,
                 s.width);
      for (int64_t r = 0; r < n; ++r) {
        A* row = rows + r * s.width;
#pragma omp simd
        for (int64_t c = 0; c < s.width; ++c) row[c] += constant[c];
        out.write(b, h, first + t + r, row);
      }
    }
  }
}

// slope is the gradient on a block's std, divided by that std.
void head_moments_backward(
    const Tensor& grad_mean, const Tensor& slope, const Tensor& q, const Tensor& k,
    std::vector<int64_t> spans, double scale, bool self_blocks, const Tensor& grad_q,
    const Tensor& grad_k) {
  by_type(q, "q", [&](auto a) {
    using A = decltype(a);
    const Shape s = Shape::of(q, k, spans, a);
    Shape::of(grad_q, grad_k, spans, a);
    STD_TORCH_CHECK(grad_q.scalar_type() == q.scalar_type(), "grad_q must be of q's type");
    const int64_t m = s.count(), blocks = s.batch * s.heads * m * m;
    STD_TORCH_CHECK(grad_mean.numel() == blocks && slope.numel() == blocks,
                    "grad_mean and slope must be [B, H, M, M]");
    const Tensor to_mean = dense<A>(grad_mean), to_std = dense<A>(slope);
    const A *up_mean = to_mean.template const_data_ptr<A>(),
            *up_std = to_std.template const_data_ptr<A>();
    const Tokens<A> queries(q), keys(k), dq(grad_q), dk(grad_k);
    const int64_t each = 2 * s.side() + (s.d + 1 + kRows) * s.width;
    in_parallel<A>(
        q, s.batch * s.heads, each, [&](int64_t begin, int64_t end, auto&& take) {
          Side<A> x(s, take), y(s, take);
          A *matrix = take(s.d * s.width), *constant = take(s.width),
            *rows = take(kRows * s.width);
          for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t b = unit / s.heads, h = unit % s.heads;
            x.fill(s, queries, b, h);
            y.fill(s, keys, b, h);
            // n of the other side's span times c alpha and c^2 beta of block (i, j)
            const auto at = [&](int64_t i, int64_t j, int64_t others) {
              const int64_t block = (unit * m + i) * m + j;
              const double n = static_cast<double>(spans[i]) * static_cast<double>(spans[j]);
              return std::pair<A, A>(static_cast<A>(up_mean[block] * (others * scale / n)),
                                     static_cast<A>(up_std[block] *
                                                    (others * scale * scale / (n - 1))));
            };
            gradient<A>(s, x, y, self_blocks,
                        [&](int64_t i, int64_t j) { return at(i, j, spans[j]); }, matrix, constant,
                        rows, dq, b, h);
            gradient<A>(s, y, x, self_blocks,
                        [&](int64_t j, int64_t i) { return at(i, j, spans[i]); }, matrix, constant,
                        rows, dk, b, h);
          }
        });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("head_moments", TORCH_BOX(&head_moments));
  m.impl("head_moments_backward", TORCH_BOX(&head_moments_backward));
}

}  // namespace fasttta

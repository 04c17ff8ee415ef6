// Softmax attention, softmax(scale q k^T) v a head, and its gradients, in float32.
//
// A head's keys are packed into panels of columns; of the scores kRows query rows at a time are
// held, in the cache. All five kinds of products are the same small one, a block of a few rows and
// as many vectors of columns as there are registers for.
#include <algorithm>
#include <utility>

#include "numbers.h"

namespace fasttta {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectors = 4;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kTile = 6;                      // rows of a block
constexpr int64_t kPanel = kLanes * kVectors;  // columns of a block
constexpr int64_t kRows = 48;                 // query rows of a unit of parallel work
constexpr int64_t kAhead = 8;                 // tokens to prefetch
constexpr int64_t kHeld = 1 << 16;            // scores held at most, 256 KiB

// unaligned
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
inline void store(float* x, Vector values) { *reinterpret_cast<Vector*>(x) = values; }

inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }

// exp of numbers up to 0, of very small ones that of -87; numbers.h, a vector at a time.
inline Vector exponential(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  const Vector clamped = x < -87.0f ? Vector{} - 87.0f : x;
  const Vector shifted = clamped * 1.44269504f + 12582912.0f;
  const Vector n = shifted - 12582912.0f;
  const Vector r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Vector)(((Integers)shifted + (127 - 0x4b400000)) << 23);
}

// Lanes with those at a distance of half a vector, then of a quarter, ... until all are one.
template <int H, typename F, size_t... I>
inline Vector folded(Vector x, F&& f, std::index_sequence<I...> lanes) {
  if constexpr (H > 0) x = folded<H / 2>(f(x, Vector{x[I ^ H]...}), f, lanes);
  return x;
}

template <typename F>
inline float reduce(Vector x, F&& f) {
  return folded<kLanes / 2>(x, f, std::make_index_sequence<kLanes>())[0];
}

// A matrix whose element (i, k) is data[i * row + k * column].
struct Left {
  const float* data;
  int64_t row, column;
};

// c (+)= a b: M rows, N vectors of columns, n products each; rows of b are kPanel or `pitch` apart.
template <int M, int N>
inline void block(Left a, const float* b, int64_t b_pitch, int64_t n, bool add, float* c,
                  int64_t c_pitch) {
  Vector sum[M][N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) sum[i][j] = add ? load(c + i * c_pitch + j * kLanes) : Vector{};
  }
  for (int64_t k = 0; k < n; ++k) {
    Vector y[N];
    for (int j = 0; j < N; ++j) y[j] = load(b + k * b_pitch + j * kLanes);
    for (int i = 0; i < M; ++i) {
      const float x = a.data[i * a.row + k * a.column];
      for (int j = 0; j < N; ++j) sum[i][j] += x * y[j];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) store(c + i * c_pitch + j * kLanes, sum[i][j]);
  }
}

template <int N>
void blocks(Left a, int64_t rows, const float* b, int64_t b_pitch, int64_t n, bool add, float* c,
            int64_t c_pitch) {
  for (; rows >= kTile; rows -= kTile, a.data += kTile * a.row, c += kTile * c_pitch) {
    block<kTile, N>(a, b, b_pitch, n, add, c, c_pitch);
  }
  switch (rows) {
    case 5: return block<5, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 4: return block<4, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 3: return block<3, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 2: return block<2, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 1: return block<1, N>(a, b, b_pitch, n, add, c, c_pitch);
  }
}

// c [rows, columns] (+)= a [rows, n] times b [n, columns]; columns whole vectors. b_panel: floats
// from one panel of b to the next (kPanel if its rows are whole).
void product(Left a, int64_t rows, const float* b, int64_t b_pitch, int64_t b_panel, int64_t n,
             bool add, float* c, int64_t c_pitch, int64_t columns) {
  for (; columns >= kPanel; columns -= kPanel, b += b_panel, c += kPanel) {
    blocks<kVectors>(a, rows, b, b_pitch, n, add, c, c_pitch);
  }
  switch (columns / kLanes) {
    case 3: return blocks<kVectors < 3 ? 1 : 3>(a, rows, b, b_pitch, n, add, c, c_pitch);
    case 2: return blocks<kVectors < 2 ? 1 : 2>(a, rows, b, b_pitch, n, add, c, c_pitch);
    case 1: return blocks<1>(a, rows, b, b_pitch, n, add, c, c_pitch);
  }
}

inline int64_t vectors_of(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A pitch of whole vectors whose rows do not all fall into the same few sets of a cache.
inline int64_t pitch_of(int64_t n) {
  const int64_t lines = (vectors_of(n) + 15) / 16;
  return 16 * (lines | 1);
}

// [B, H, T, d] of any strides but the last, which is 1.
struct Heads {
  float* data;
  int64_t sample, head, token;

  explicit Heads(const Tensor& x)
      : data(static_cast<float*>(x.data_ptr())),
        sample(x.stride(0)), head(x.stride(1)), token(x.stride(2)) {}

  float* at(int64_t b, int64_t h, int64_t t) const {
    return data + b * sample + h * head + t * token;
  }
};

// A token's channels; each token may be on a page of its own, which processors do not foresee.
inline void prefetch(const float* x, int64_t d) {
  for (int64_t c = 0; c < d; c += 16) __builtin_prefetch(x + c);
}

// Rows of d channels, `factor` times, filled up with zeros to whole vectors.
inline void pack_rows(const float* x, int64_t token, int64_t n, int64_t d, float factor,
                      float* packed) {
  const int64_t width = vectors_of(d);
  for (int64_t t = 0; t < n; ++t, x += token, packed += width) {
    if (t + kAhead < n) prefetch(x + kAhead * token, d);
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) packed[c] = factor * x[c];
    for (int64_t c = d; c < width; ++c) packed[c] = 0;
  }
}

// Packed rows [n, width] as columns: panels [d][kPanel], zeros after the last.
inline void pack_columns(const float* rows, int64_t n, int64_t d, float* packed) {
  const int64_t width = vectors_of(d);
  for (int64_t first = 0; first < n; first += kPanel) {
    const int64_t count = std::min(kPanel, n - first);
    for (int64_t c = 0; c < d; ++c, packed += kPanel) {
      const float* x = rows + first * width + c;
      for (int64_t j = 0; j < count; ++j) packed[j] = x[j * width];
      for (int64_t j = count; j < kPanel; ++j) packed[j] = 0;
    }
  }
}

struct Sizes {
  int64_t batch, heads, queries, keys, d;
  int64_t width, pitch, rows;  // of packed rows, of score rows; query rows at a time

  Sizes(const Tensor& q, const Tensor& k, int64_t maps)
      : batch(q.size(0)), heads(q.size(1)), queries(q.size(2)), keys(k.size(2)), d(q.size(3)),
        width(vectors_of(d)), pitch(pitch_of(keys)) {
    const int64_t fit = kHeld / (maps * pitch) / kTile * kTile;
    rows = std::max<int64_t>(kTile, std::min<int64_t>(fit, kRows));
  }

  int64_t panels() const { return (keys + kPanel - 1) / kPanel * kPanel * d; }
};

// S = q k^T of some rows; a is packed rows [m, width].
inline void scores(const Sizes& s, const float* a, int64_t m, const float* columns, float* out) {
  product({a, s.width, 1}, m, columns, kPanel, kPanel * s.d, s.d, false, out, s.pitch,
          vectors_of(s.keys));
}

// Scores of a row, whole vectors, become exp(score - the largest); that and their sum.
inline std::pair<float, float> exponentials(float* row, int64_t n) {
  const int64_t width = vectors_of(n);
  std::fill(row + n, row + width, -std::numeric_limits<float>::infinity());
  Vector top = load(row), other = top;
  int64_t j = kLanes;
  for (; j + kLanes < width; j += 2 * kLanes) {
    top = larger(load(row + j), top);
    other = larger(load(row + j + kLanes), other);
  }
  if (j < width) top = larger(load(row + j), top);
  const float most = reduce(larger(top, other), larger);
  Vector sum{};
  for (j = 0; j < width; j += kLanes) {
    const Vector p = exponential(load(row + j) - most);
    store(row + j, p);
    sum += p;
  }
  return {most, reduce(sum, [](Vector x, Vector y) { return x + y; })};
}

void forward(const Tensor& q_, const Tensor& k_, const Tensor& v_, float scale, const Tensor& out_,
             const Tensor& lse_) {
  const Sizes s(q_, k_, 1);
  const Heads q(q_), k(k_), v(v_), out(out_);
  float* lse = lse_.mutable_data_ptr<float>();
  const int64_t units = (s.queries + s.rows - 1) / s.rows;
  torch::stable::parallel_for(
      0, s.batch * s.heads * units, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> columns(s.panels()), rows(s.keys * s.width), space(s.rows * s.pitch),
            some(s.rows * s.width), sums(s.rows * s.width);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t head = unit / units, first = unit % units * s.rows;
          const int64_t b = head / s.heads, h = head % s.heads;
          if (unit == begin || first == 0) {
            pack_rows(k.at(b, h, 0), k.token, s.keys, s.d, scale, rows.data());
            pack_columns(rows.data(), s.keys, s.d, columns.data());
            pack_rows(v.at(b, h, 0), v.token, s.keys, s.d, 1, rows.data());
          }
          const int64_t m = std::min(s.rows, s.queries - first);
          pack_rows(q.at(b, h, first), q.token, m, s.d, 1, some.data());
          scores(s, some.data(), m, columns.data(), space.data());
          float factor[kRows];
          for (int64_t i = 0; i < m; ++i) {
            const auto [top, sum] = exponentials(space.data() + i * s.pitch, s.keys);
            factor[i] = 1 / sum;
            lse[head * s.queries + first + i] = top + log_(sum);
          }
          // the keys in portions whose values stay in the first cache
          for (int64_t j = 0; j < s.keys; j += kPanel) {
            product({space.data() + j, s.pitch, 1}, m, rows.data() + j * s.width, s.width, kPanel,
                    std::min(kPanel, s.keys - j), j > 0, sums.data(), s.width, s.width);
          }
          for (int64_t i = 0; i < m; ++i) {
            float* target = out.at(b, h, first + i);
            const float* sum = sums.data() + i * s.width;
#pragma omp simd
            for (int64_t c = 0; c < s.d; ++c) target[c] = factor[i] * sum[c];
          }
        }
      });
}

void backward(const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
              const Tensor& out_, const Tensor& lse_, float scale, const Tensor& dq_,
              const Tensor& dk_, const Tensor& dv_) {
  const Sizes s(q_, k_, 2);
  const Heads grad(grad_), q(q_), k(k_), v(v_), out(out_), dq(dq_), dk(dk_), dv(dv_);
  const float* lse = lse_.const_data_ptr<float>();
  torch::stable::parallel_for(0, s.batch * s.heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> keys(s.keys * s.width), values(s.keys * s.width), k_columns(s.panels()),
        v_columns(s.panels()), p(s.rows * s.pitch), ds(s.rows * s.pitch), some(s.rows * s.width),
        up(s.rows * s.width), along(s.rows * s.width);
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / s.heads, h = head % s.heads;
      pack_rows(v.at(b, h, 0), v.token, s.keys, s.d, 1, keys.data());
      pack_columns(keys.data(), s.keys, s.d, v_columns.data());
      pack_rows(k.at(b, h, 0), k.token, s.keys, s.d, scale, keys.data());
      pack_columns(keys.data(), s.keys, s.d, k_columns.data());
      std::vector<float> to_k(s.keys * s.width), to_v(s.keys * s.width);
      for (int64_t first = 0; first < s.queries; first += s.rows) {
        const int64_t m = std::min(s.rows, s.queries - first);
        pack_rows(q.at(b, h, first), q.token, m, s.d, 1, some.data());
        pack_rows(grad.at(b, h, first), grad.token, m, s.d, 1, up.data());
        scores(s, some.data(), m, k_columns.data(), p.data());
        scores(s, up.data(), m, v_columns.data(), ds.data());
        for (int64_t i = 0; i < m; ++i) {
          float *a = p.data() + i * s.pitch, *da = ds.data() + i * s.pitch, mean = 0;
          const float *o = out.at(b, h, first + i), *g = up.data() + i * s.width;
          if (i + kAhead < m) prefetch(out.at(b, h, first + i + kAhead), s.d);
          const float log_sum = lse[head * s.queries + first + i];
#pragma omp simd reduction(+ : mean)
          for (int64_t c = 0; c < s.d; ++c) mean += o[c] * g[c];
          for (int64_t j = 0; j < s.keys; j += kLanes) {
            const Vector found = exponential(load(a + j) - log_sum);
            store(a + j, found);
            store(da + j, found * (load(da + j) - mean));
          }
        }
        product({p.data(), 1, s.pitch}, s.keys, up.data(), s.width, kPanel, m, true, to_v.data(),
                s.width, s.width);
        product({ds.data(), 1, s.pitch}, s.keys, some.data(), s.width, kPanel, m, true,
                to_k.data(), s.width, s.width);
        for (int64_t j = 0; j < s.keys; j += kPanel) {
          product({ds.data() + j, s.pitch, 1}, m, keys.data() + j * s.width, s.width, kPanel,
                  std::min(kPanel, s.keys - j), j > 0, along.data(), s.width, s.width);
        }
        for (int64_t i = 0; i < m; ++i) {
          std::copy_n(along.data() + i * s.width, s.d, dq.at(b, h, first + i));
        }
      }
      for (int64_t t = 0; t < s.keys; ++t) {
        float *to = dk.at(b, h, t);
        const float* sum = to_k.data() + t * s.width;
#pragma omp simd
        for (int64_t c = 0; c < s.d; ++c) to[c] = scale * sum[c];
        std::copy_n(to_v.data() + t * s.width, s.d, dv.at(b, h, t));
      }
    }
  });
}

// A tensor as the kernels read it: float32, channels next to each other.
Tensor readable(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float, name,
                  " must be [B, H, T, d] in float32");
  return x.stride(3) == 1 || x.size(3) == 1 ? x : torch::stable::contiguous(x);
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
  const Tensor q = readable(q_, "q"), k = readable(k_, "k"), v = readable(v_, "v");
  check(q, k, v);
  const Tensor out = empty_heads(q);
  const Tensor lse = torch::stable::new_empty(
      q, std::vector<int64_t>{q.size(0), q.size(1), q.size(2)});
  forward(q, k, v, static_cast<float>(scale), out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& out_,
    const Tensor& lse, double scale) {
  const Tensor grad = readable(grad_, "grad"), q = readable(q_, "q"), k = readable(k_, "k"),
               v = readable(v_, "v"), out = readable(out_, "out");
  check(q, k, v);
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(grad.size(i) == q.size(i) && out.size(i) == q.size(i),
                    "grad and out must be as q");
  }
  STD_TORCH_CHECK(lse.numel() == q.size(0) * q.size(1) * q.size(2), "lse must be [B, H, T]");
  const Tensor dq = empty_heads(q), dk = empty_heads(k), dv = empty_heads(v);
  backward(grad, q, k, v, out, dense<float>(lse), static_cast<float>(scale), dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace fasttta

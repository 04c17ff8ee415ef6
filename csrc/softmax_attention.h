// Attention a head, and its gradients; what becomes of rows of exponentials is the caller's.
//
// A head's keys are packed into panels of columns; of the scores kRows query rows at a time are
// held, in the cache. All five kinds of products are the same small one.
#pragma once

#include <algorithm>

#include "products.h"

namespace fasttta {

constexpr int64_t kRows = 48;  // query rows of a unit of parallel work
constexpr int64_t kAhead = 8;  // tokens to prefetch
template <typename A>  // of attention; below, it is 0 (kLeast)
constexpr A kFaintest = std::is_same_v<A, float> ? A(1e-22) : A(1e-130);
template <typename A>
constexpr int64_t kHeld = (1 << 18) / sizeof(A);  // scores to hold, 256 KiB
// Rows even where their scores are more: the sums over queries, [keys, d] twice, pass through the
// cache once for so many. Backward of 12,000 keys is 1.9 times faster than with 6 (Xeon 2.5 GHz).
constexpr int64_t kFewest = 24;

// [B, H, T, d] of any strides but the last, which is 1; a batch of one is read for every sample.
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

// A token's channels; each token may be on a page of its own, which processors do not foresee.
template <typename A>
inline void prefetch(const A* x, int64_t d) {
  for (int64_t c = 0; c < d; c += 64 / sizeof(A)) __builtin_prefetch(x + c);
}

// Rows of d channels, `factor` times, filled up with zeros to whole vectors.
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

// Packed rows [n, width] as columns: panels [d][kPanel], zeros after the last.
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

template <typename A>
struct Sizes {
  int64_t batch, heads, queries, keys, d;
  int64_t width, pitch, rows;  // of packed rows, of score rows; query rows at a time

  Sizes(const Tensor& q, const Tensor& k, int64_t maps)
      : batch(k.size(0)), heads(k.size(1)), queries(q.size(2)), keys(k.size(2)), d(q.size(3)),
        width(vectors_of<A>(d)), pitch(pitch_of<A>(keys)) {
    const int64_t fit = kHeld<A> / (maps * pitch) / kTile * kTile;
    rows = std::max<int64_t>(kFewest, std::min<int64_t>(fit, kRows));
  }

  int64_t panels() const { return (keys + kPanel<A> - 1) / kPanel<A> * kPanel<A> * d; }
};

// Calls f(begin, end, space) on ranges of units of work, in parallel; each has its own space, a
// function that gives out numbers of it, `each` in all.
template <typename A, typename F>
void in_parallel(const Tensor& like, int64_t units, int64_t each, F&& f) {
  const int64_t ranges = std::min<int64_t>(units, torch::stable::get_num_threads());
  const Tensor space = empty_wide<A>(like, {ranges, each});
  A* const first = space.template mutable_data_ptr<A>();
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* next = first + i * each;
      f(units * i / ranges, units * (i + 1) / ranges, [&next](int64_t n) {
        A* const given = next;
        next += n;
        return given;
      });
    }
  });
}

// S = q k^T of some rows; a is packed rows [m, width].
template <typename A>
inline void scores(const Sizes<A>& s, const A* a, int64_t m, const A* columns, A* out) {
  product<A>({a, s.width, 1}, m, columns, kPanel<A>, kPanel<A> * s.d, s.d, false, out, s.pitch,
          vectors_of<A>(s.keys));
}

// Scores of a row, whole vectors, become exp(score - the largest); that and their sum.
template <typename A>
inline std::pair<A, A> exponentials(A* row, int64_t n) {
  const int64_t width = vectors_of<A>(n);
  std::fill(row + n, row + width, -std::numeric_limits<A>::infinity());
  Vector<A> top = load(row), other = top;
  int64_t j = kLanes<A>;
  for (; j + kLanes<A> < width; j += 2 * kLanes<A>) {
    top = larger<A>(load(row + j), top);
    other = larger<A>(load(row + j + kLanes<A>), other);
  }
  if (j < width) top = larger<A>(load(row + j), top);
  const A most = reduce<A>(larger<A>(top, other), larger<A>);
  Vector<A> sum{};
  for (j = 0; j < width; j += kLanes<A>) {
    const Vector<A> p = exponential(load(row + j) - most);
    store(row + j, p);
    sum += p;
  }
  return {most, reduce<A>(sum, [](Vector<A> x, Vector<A> y) { return x + y; })};
}

// softmax(scale q k^T) v of every row on its own. keep(row, top, sum) learns of each the largest
// score and the sum of all exponentials less that.
template <typename A, typename F>
void attend(const Tensor& q_, const Tensor& k_, const Tensor& v_, A scale, const Tensor& out_,
            F&& keep) {
  const Sizes<A> s(q_, k_, 1);
  const Heads<A> q(q_), k(k_), v(v_), out(out_);
  const int64_t units = (s.queries + s.rows - 1) / s.rows;
  const int64_t each = s.panels() + s.keys * s.width + s.rows * (s.pitch + 2 * s.width);
  in_parallel<A>(
      out_, s.batch * s.heads * units, each, [&](int64_t begin, int64_t end, auto&& take) {
        A *columns = take(s.panels()), *rows = take(s.keys * s.width),
          *space = take(s.rows * s.pitch), *some = take(s.rows * s.width),
          *sums = take(s.rows * s.width);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t head = unit / units, first = unit % units * s.rows;
          const int64_t b = head / s.heads, h = head % s.heads;
          if (unit == begin || first == 0) {
            pack_rows(k.at(b, h, 0), k.token, s.keys, s.d, scale, rows);
            pack_columns(rows, s.keys, s.d, columns);
            pack_rows(v.at(b, h, 0), v.token, s.keys, s.d, A(1), rows);
          }
          const int64_t m = std::min(s.rows, s.queries - first);
          pack_rows(q.at(b, h, first), q.token, m, s.d, A(1), some);
          scores(s, some, m, columns, space);
          A factor[kRows];
          for (int64_t i = 0; i < m; ++i) {
            const auto [top, sum] = exponentials(space + i * s.pitch, s.keys);
            factor[i] = 1 / sum;
            keep(head * s.queries + first + i, top, sum);
          }
          // the keys in portions whose values stay in the first cache
          for (int64_t j = 0; j < s.keys; j += kPanel<A>) {
            product<A>({space + j, s.pitch, 1}, m, rows + j * s.width, s.width,
                       kPanel<A>, std::min(kPanel<A>, s.keys - j), j > 0, sums, s.width,
                       s.width);
          }
          for (int64_t i = 0; i < m; ++i) {
            A* target = out.at(b, h, first + i);
            const A* sum = sums + i * s.width;
#pragma omp simd
            for (int64_t c = 0; c < s.d; ++c) target[c] = factor[i] * sum[c];
          }
        }
      });
}

// Of a row of attention P = factor exp(scores - top) and of its gradient P * (grad v - mean).
template <typename A>
struct Weights {
  A top, factor, mean;
};

// dq, dk, dv of [B, H, T, d] each. weights(b, h) is called once a head, and what it returns with
// (t, row t of the gradient) once for each query.
template <typename A, typename F>
void attend_backward(const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                     A scale, const Tensor& dq_, const Tensor& dk_, const Tensor& dv_,
                     F&& weights) {
  const Sizes<A> s(q_, k_, 2);
  const Heads<A> grad(grad_), q(q_), k(k_), v(v_), dq(dq_), dk(dk_), dv(dv_);
  const int64_t all = s.keys * s.width, some_rows = s.rows * s.width;
  const int64_t each = 2 * s.panels() + 3 * all + 2 * s.rows * s.pitch + 3 * some_rows;
  in_parallel<A>(grad_, s.batch * s.heads, each, [&](int64_t begin, int64_t end, auto&& take) {
    A *k_columns = take(s.panels()), *v_columns = take(s.panels()), *keys = take(all),
      *to_k = take(all), *to_v = take(all), *p = take(s.rows * s.pitch),
      *ds = take(s.rows * s.pitch), *some = take(some_rows), *up = take(some_rows),
      *along = take(some_rows);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.heads, h = unit % s.heads;
      pack_rows(v.at(b, h, 0), v.token, s.keys, s.d, A(1), keys);
      pack_columns(keys, s.keys, s.d, v_columns);
      pack_rows(k.at(b, h, 0), k.token, s.keys, s.d, scale, keys);
      pack_columns(keys, s.keys, s.d, k_columns);
      std::fill_n(to_k, all, A(0));
      std::fill_n(to_v, all, A(0));
      const auto of_row = weights(b, h);
      for (int64_t first = 0; first < s.queries; first += s.rows) {
        const int64_t m = std::min(s.rows, s.queries - first);
        pack_rows(q.at(b, h, first), q.token, m, s.d, A(1), some);
        pack_rows(grad.at(b, h, first), grad.token, m, s.d, A(1), up);
        scores(s, some, m, k_columns, p);
        scores(s, up, m, v_columns, ds);
        for (int64_t i = 0; i < m; ++i) {
          A *a = p + i * s.pitch, *da = ds + i * s.pitch;
          const Weights<A> row = of_row(first + i, up + i * s.width);
          for (int64_t j = 0; j < s.keys; j += kLanes<A>) {
            Vector<A> found = row.factor * exponential(load(a + j) - row.top);
            found = found < kFaintest<A> ? Vector<A>{} : found;
            store(a + j, found);
            store(da + j, found * (load(da + j) - row.mean));
          }
        }
        product<A>({p, 1, s.pitch}, s.keys, up, s.width, kPanel<A>, m, true,
                   to_v, s.width, s.width);
        product<A>({ds, 1, s.pitch}, s.keys, some, s.width, kPanel<A>, m, true,
                   to_k, s.width, s.width);
        for (int64_t j = 0; j < s.keys; j += kPanel<A>) {
          product<A>({ds + j, s.pitch, 1}, m, keys + j * s.width, s.width, kPanel<A>,
                     std::min(kPanel<A>, s.keys - j), j > 0, along, s.width, s.width);
        }
        for (int64_t i = 0; i < m; ++i) {
          std::copy_n(along + i * s.width, s.d, dq.at(b, h, first + i));
        }
      }
      for (int64_t t = 0; t < s.keys; ++t) {
        A* to = dk.at(b, h, t);
        const A* sum = to_k + t * s.width;
#pragma omp simd
        for (int64_t c = 0; c < s.d; ++c) to[c] = scale * sum[c];
        std::copy_n(to_v + t * s.width, s.d, dv.at(b, h, t));
      }
    }
  });
}

// A tensor as the kernels read it: of their type, channels next to each other.
template <typename A>
Tensor readable(const Tensor& x) {
  const Tensor y = x.scalar_type() == type_of<A>
                       ? x : torch::stable::to(x, std::make_optional(type_of<A>));
  const int64_t last = y.dim() - 1;
  return y.stride(last) == 1 || y.size(last) == 1 ? y : torch::stable::contiguous(y);
}

}  // namespace fasttta

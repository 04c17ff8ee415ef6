// Attention of each head, forward and backward. The caller decides how rows are normalised.
//
// A head's keys are packed into panels of columns. The scores of kRows query rows at a time are
// held, in the cache. All five kinds of products are the same small one.
#pragma once

#include "exponential.h"
#include "heads.h"

namespace fasttta {

// The least weight of attention; smaller ones are 0 (see kLeast).
template <typename A>
constexpr A kFaintest = std::is_same_v<A, float> ? A(1e-22) : A(1e-130);
template <typename A>
constexpr int64_t kHeld = (1 << 18) / sizeof(A);  // scores to hold, 256 KiB
// The fewest query rows, even if their scores are more: the sums over queries, [keys, d] twice, pass
// through the cache once for so many. Backward of 12,000 keys is 1.9 times faster than with 6 rows
// (Xeon 2.5 GHz).
constexpr int64_t kFewest = 24;

// Sizes of attention with so many score maps held at once.
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

// Writes q k^T of m rows; a is packed rows [m, width].
template <typename A>
inline void scores(const Sizes<A>& s, const A* a, int64_t m, const A* columns, A* out) {
  product<A>({a, s.width, 1}, m, columns, kPanel<A>, kPanel<A> * s.d, s.d, false, out, s.pitch,
          vectors_of<A>(s.keys));
}

// Replaces a row of scores, in whole vectors, by exp(score - largest). Returns the largest score and
// the sum of the exponentials.
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

// Scratch space of `attend`.
template <typename A>
struct ForwardSpace {
  A *columns;           // keys, as panels
  A *rows;              // keys, then values [keys, width]
  A *scores;            // [rows, pitch]
  A *queries, *sums;    // [rows, width] each

  template <typename Take>
  ForwardSpace(const Sizes<A>& s, Take&& take)
      : columns(take(s.panels())), rows(take(s.keys * s.width)), scores(take(s.rows * s.pitch)),
        queries(take(s.rows * s.width)), sums(take(s.rows * s.width)) {}
};

// Writes softmax(scale q k^T) v, every row with its own softmax, to `out`. Calls keep(row, top, sum)
// with the largest score of each row and the sum of the exponentials of its scores less that.
template <typename A, typename F>
void attend(const Tensor& q_, const Tensor& k_, const Tensor& v_, A scale, const Tensor& out_,
            F&& keep) {
  const Sizes<A> s(q_, k_, 1);
  const Heads<A> q(q_), k(k_), v(v_), out(out_);
  const int64_t units = (s.queries + s.rows - 1) / s.rows;
  const int64_t each = size_of_space<ForwardSpace<A>>(s);
  in_parallel<A>(
      out_, s.batch * s.heads * units, each, [&](int64_t begin, int64_t end, auto&& take) {
        const ForwardSpace<A> space(s, take);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t head = unit / units, first = unit % units * s.rows;
          const int64_t b = head / s.heads, h = head % s.heads;
          if (unit == begin || first == 0) {
            pack_rows(k.at(b, h, 0), k.token, s.keys, s.d, scale, space.rows);
            pack_columns(space.rows, s.keys, s.d, space.columns);
            pack_rows(v.at(b, h, 0), v.token, s.keys, s.d, A(1), space.rows);
          }
          const int64_t m = std::min(s.rows, s.queries - first);
          pack_rows(q.at(b, h, first), q.token, m, s.d, A(1), space.queries);
          scores(s, space.queries, m, space.columns, space.scores);
          A factor[kRows];
          for (int64_t i = 0; i < m; ++i) {
            const auto [top, sum] = exponentials(space.scores + i * s.pitch, s.keys);
            factor[i] = 1 / sum;
            keep(head * s.queries + first + i, top, sum);
          }
          // the keys in portions whose values stay in the first cache
          for (int64_t j = 0; j < s.keys; j += kPanel<A>) {
            product<A>({space.scores + j, s.pitch, 1}, m, space.rows + j * s.width, s.width,
                       kPanel<A>, std::min(kPanel<A>, s.keys - j), j > 0, space.sums, s.width,
                       s.width);
          }
          for (int64_t i = 0; i < m; ++i) {
            A* target = out.at(b, h, first + i);
            const A* sum = space.sums + i * s.width;
#pragma omp simd
            for (int64_t c = 0; c < s.d; ++c) target[c] = factor[i] * sum[c];
          }
        }
      });
}

// A row of attention is P = factor exp(scores - top), and its gradient P * (grad v - mean).
template <typename A>
struct Weights {
  A top, factor, mean;
};

// Scratch space of `attend_backward`, of one head.
template <typename A>
struct BackwardSpace {
  A *k_columns, *v_columns;  // keys and values, as panels
  A *keys;                   // [keys, width], as are the next two
  A *dk, *dv;
  A *p, *ds;                 // attention and the gradient of scores [rows, pitch] each
  A *queries, *grads, *dq;   // [rows, width] each

  template <typename Take>
  BackwardSpace(const Sizes<A>& s, Take&& take)
      : k_columns(take(s.panels())), v_columns(take(s.panels())), keys(take(s.keys * s.width)),
        dk(take(s.keys * s.width)), dv(take(s.keys * s.width)), p(take(s.rows * s.pitch)),
        ds(take(s.rows * s.pitch)), queries(take(s.rows * s.width)),
        grads(take(s.rows * s.width)), dq(take(s.rows * s.width)) {}
};

// Writes dq, dk, dv [B, H, T, d]. Calls weights(b, h) once a head, and the function that it returns
// with (t, row t of the gradient) once for each query: that gives the row's `Weights`.
template <typename A, typename F>
void attend_backward(const Tensor& grad_, const Tensor& q_, const Tensor& k_, const Tensor& v_,
                     A scale, const Tensor& dq_, const Tensor& dk_, const Tensor& dv_,
                     F&& weights) {
  const Sizes<A> s(q_, k_, 2);
  const Heads<A> grad(grad_), q(q_), k(k_), v(v_), dq(dq_), dk(dk_), dv(dv_);
  const int64_t all = s.keys * s.width, each = size_of_space<BackwardSpace<A>>(s);
  in_parallel<A>(grad_, s.batch * s.heads, each, [&](int64_t begin, int64_t end, auto&& take) {
    const BackwardSpace<A> space(s, take);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.heads, h = unit % s.heads;
      pack_rows(v.at(b, h, 0), v.token, s.keys, s.d, A(1), space.keys);
      pack_columns(space.keys, s.keys, s.d, space.v_columns);
      pack_rows(k.at(b, h, 0), k.token, s.keys, s.d, scale, space.keys);
      pack_columns(space.keys, s.keys, s.d, space.k_columns);
      std::fill_n(space.dk, all, A(0));
      std::fill_n(space.dv, all, A(0));
      const auto of_row = weights(b, h);
      for (int64_t first = 0; first < s.queries; first += s.rows) {
        const int64_t m = std::min(s.rows, s.queries - first);
        pack_rows(q.at(b, h, first), q.token, m, s.d, A(1), space.queries);
        pack_rows(grad.at(b, h, first), grad.token, m, s.d, A(1), space.grads);
        scores(s, space.queries, m, space.k_columns, space.p);
        scores(s, space.grads, m, space.v_columns, space.ds);
        for (int64_t i = 0; i < m; ++i) {
          A *p = space.p + i * s.pitch, *ds = space.ds + i * s.pitch;
          const Weights<A> row = of_row(first + i, space.grads + i * s.width);
          for (int64_t j = 0; j < s.keys; j += kLanes<A>) {
            Vector<A> weight = row.factor * exponential(load(p + j) - row.top);
            weight = weight < kFaintest<A> ? Vector<A>{} : weight;
            store(p + j, weight);
            store(ds + j, weight * (load(ds + j) - row.mean));
          }
        }
        product<A>({space.p, 1, s.pitch}, s.keys, space.grads, s.width, kPanel<A>, m, true,
                   space.dv, s.width, s.width);
        product<A>({space.ds, 1, s.pitch}, s.keys, space.queries, s.width, kPanel<A>, m, true,
                   space.dk, s.width, s.width);
        for (int64_t j = 0; j < s.keys; j += kPanel<A>) {
          product<A>({space.ds + j, s.pitch, 1}, m, space.keys + j * s.width, s.width, kPanel<A>,
                     std::min(kPanel<A>, s.keys - j), j > 0, space.dq, s.width, s.width);
        }
        for (int64_t i = 0; i < m; ++i) {
          std::copy_n(space.dq + i * s.width, s.d, dq.at(b, h, first + i));
        }
      }
      for (int64_t t = 0; t < s.keys; ++t) {
        A* to = dk.at(b, h, t);
        const A* sum = space.dk + t * s.width;
#pragma omp simd
        for (int64_t c = 0; c < s.d; ++c) to[c] = scale * sum[c];
        std::copy_n(space.dv + t * s.width, s.d, dv.at(b, h, t));
      }
    }
  });
}

}  // namespace fasttta

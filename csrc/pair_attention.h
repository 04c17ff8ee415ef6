// Softmax attention of bf16 heads, forward and backward: products of pairs, everything else float32.
//
// As in softmax_attention.h, rows of scores of a few queries are held in the cache. Attention and the
// gradients of scores are rounded to bf16 for their products, as PyTorch's kernels round them.
#pragma once

#include "softmax_attention.h"

namespace fasttta {

constexpr float kLog2E = 1.44269504f;
// The least exponents of 2: weights below are 0, as in softmax_attention.h.
constexpr float kLeastPower = -72.0f;
constexpr int64_t kPortion = 2 * kPanel<Pair>;  // keys whose values stay in the first cache

// 2^x of numbers up to 0, to 3e-6; 0 below kLeastPower. bf16 has 8 bits, so degree 4 is enough.
inline Vector<float> power_of_two(Vector<float> x) {
  const Vector<float> shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
  Vector<float> p = r * 9.57008172e-3f + 5.59178591e-2f;
  p = p * r + 0.240247458f;
  p = p * r + 0.693121791f;
  p = p * r + 0.999999285f;
  p *= (Vector<float>)(((Vector<int32_t>)shifted + (127 - 0x4b400000)) << 23);
  return x < kLeastPower ? Vector<float>{} : p;
}

// Sizes of attention over pairs of channels or of keys.
struct PairSizes : Sizes<float> {
  int64_t channel_pairs, key_pairs;

  PairSizes(const Tensor& q, const Tensor& k, int64_t maps)
      : Sizes<float>(q, k, maps), channel_pairs((d + 1) / 2), key_pairs((keys + 1) / 2) {}

  int64_t pair_panels() const {
    return (keys + kPanel<Pair> - 1) / kPanel<Pair> * kPanel<Pair> * channel_pairs;
  }
  int64_t halves() const { return rows * pitch / 2; }  // rows of bf16, counted in pairs
};

// Packs n rows of d channels as pairs of channels [n, pairs].
inline void pack_channel_pairs(const uint16_t* x, int64_t token, int64_t n, int64_t d,
                               Pair* packed) {
  const int64_t pairs = (d + 1) / 2;
  for (int64_t t = 0; t < n; ++t, x += token, packed += pairs) {
    if (t + kAhead < n) prefetch(x + kAhead * token, d);
    if (d % 2) packed[pairs - 1] = x[d - 1];
    std::memcpy(packed, x, d / 2 * sizeof(Pair));
  }
}

// Packs n rows of d channels as pairs of rows [(n + 1) / 2, width], filled up with zeros.
inline void pack_row_pairs(const uint16_t* x, int64_t token, int64_t n, int64_t d, Pair* packed) {
  const int64_t width = vectors_of<Pair>(d);
  for (int64_t t = 0; t < n; t += 2, x += 2 * token, packed += width) {
    if (t + kAhead + 1 < n) {
      prefetch(x + kAhead * token, d);
      prefetch(x + (kAhead + 1) * token, d);
    }
    pair_rows(x, t + 1 < n ? x + token : nullptr, d, packed);
    for (int64_t c = d; c < width; ++c) packed[c] = 0;
  }
}

// Packs n rows of d channels as panels [channel pairs][kPanel] of columns, with zeros after the last.
inline void pack_pair_columns(const uint16_t* x, int64_t token, int64_t n, int64_t d,
                              Pair* packed) {
  const int64_t pairs = (d + 1) / 2;
  for (int64_t first = 0; first < n; first += kPanel<Pair>, packed += pairs * kPanel<Pair>) {
    const int64_t count = std::min(kPanel<Pair>, n - first);
    for (int64_t j = 0; j < kPanel<Pair>; ++j) {
      const uint16_t* const row = x + (first + j) * token;
      if (j + kAhead < count) prefetch(row + kAhead * token, d);
      for (int64_t c = 0; c < pairs; ++c) {
        Pair& to = packed[c * kPanel<Pair> + j];
        to = j >= count ? 0 : 2 * c + 1 < d ? pair_at(row + 2 * c) : Pair(row[2 * c]);
      }
    }
  }
}

// Writes factor * values, rounded, to n places.
inline void write_rounded(uint16_t* to, const float* values, float factor, int64_t n) {
  int64_t c = 0;
  for (; c + kLanes<float> <= n; c += kLanes<float>) {
    store_rounded(to + c, factor * load(values + c));
  }
  if (c == n) return;
  uint16_t rest[kLanes<float>];
  store_rounded(rest, factor * load(values + c));
  std::copy_n(rest, n - c, to + c);
}

// Writes a row of attention, 2^(scale s - largest) of n scores s, rounded, in whole vectors. Returns
// the largest exponent and the sum of the powers.
inline std::pair<float, float> powers(const float* row, int64_t n, float scale, uint16_t* to) {
  const int64_t last = vectors_of<float>(n) - kLanes<float>;
  Vector<float> end = scale * load(row + last);
  for (int64_t i = n - last; i < kLanes<float>; ++i) {
    end[i] = -std::numeric_limits<float>::infinity();
  }
  Vector<float> top = end, other = end;
  int64_t j = 0;
  for (; j + kLanes<float> < last; j += 2 * kLanes<float>) {
    top = larger<float>(scale * load(row + j), top);
    other = larger<float>(scale * load(row + j + kLanes<float>), other);
  }
  if (j < last) top = larger<float>(scale * load(row + j), top);
  const float most = reduce<float>(larger<float>(top, other), larger<float>);
  Vector<float> sum{};
  for (j = 0; j < last; j += kLanes<float>) {
    const Vector<float> p = power_of_two(scale * load(row + j) - most);
    store_rounded(to + j, p);
    sum += p;
  }
  const Vector<float> p = power_of_two(end - most);
  store_rounded(to + last, p);
  sum += p;
  return {most, reduce<float>(sum, [](Vector<float> x, Vector<float> y) { return x + y; })};
}

// Scratch space of `attend_pairs`.
struct PairForwardSpace {
  Pair *columns, *values;    // keys as panels, pairs of values' rows
  float* scores;             // [rows, pitch]
  Pair *weights, *queries;   // bf16 [rows, pitch], pairs [rows, channel pairs]
  float* sums;               // [rows, width]

  template <typename Take>
  PairForwardSpace(const PairSizes& s, Take&& take)
      : columns((Pair*)take(s.pair_panels())), values((Pair*)take(s.key_pairs * s.width)),
        scores(take(s.rows * s.pitch)), weights((Pair*)take(s.halves())),
        queries((Pair*)take(s.rows * s.channel_pairs)), sums(take(s.rows * s.width)) {}
};

// As `attend`, of bf16. Calls keep(row, log-sum-exp).
template <typename F>
void attend_pairs(const Tensor& q_, const Tensor& k_, const Tensor& v_, float scale,
                  const Tensor& out_, F&& keep) {
  const PairSizes s(q_, k_, 1);
  const Heads<uint16_t> q(q_), k(k_), v(v_), out(out_);
  const int64_t units = (s.queries + s.rows - 1) / s.rows;
  const int64_t each = size_of_space<PairForwardSpace>(s);
  in_parallel<float>(
      out_, s.batch * s.heads * units, each, [&](int64_t begin, int64_t end, auto&& take) {
        const PairForwardSpace space(s, take);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t head = unit / units, first = unit % units * s.rows;
          const int64_t b = head / s.heads, h = head % s.heads;
          if (unit == begin || first == 0) {
            pack_pair_columns(k.at(b, h, 0), k.token, s.keys, s.d, space.columns);
            pack_row_pairs(v.at(b, h, 0), v.token, s.keys, s.d, space.values);
          }
          const int64_t m = std::min(s.rows, s.queries - first);
          pack_channel_pairs(q.at(b, h, first), q.token, m, s.d, space.queries);
          product<Pair>({space.queries, s.channel_pairs, 1}, m, space.columns, kPanel<Pair>,
                        kPanel<Pair> * s.channel_pairs, s.channel_pairs, false, space.scores,
                        s.pitch, vectors_of<float>(s.keys));
          float factor[kRows];
          for (int64_t i = 0; i < m; ++i) {
            const auto [top, sum] = powers(space.scores + i * s.pitch, s.keys, scale * kLog2E,
                                           (uint16_t*)(space.weights + i * s.pitch / 2));
            factor[i] = 1 / sum;
            keep(head * s.queries + first + i, top / kLog2E + log_(sum));
          }
          for (int64_t j = 0; j < s.keys; j += kPortion) {
            product<Pair>({space.weights + j / 2, s.pitch / 2, 1}, m,
                          space.values + j / 2 * s.width, s.width, kPanel<Pair>,
                          (std::min(kPortion, s.keys - j) + 1) / 2, j > 0, space.sums, s.width,
                          s.width);
          }
          for (int64_t i = 0; i < m; ++i) {
            write_rounded(out.at(b, h, first + i), space.sums + i * s.width, factor[i], s.d);
          }
        }
      });
}

// Scratch space of `attend_pairs_backward`, of one head.
struct PairBackwardSpace {
  Pair *k_columns, *v_columns, *keys;  // panels, pairs of keys' rows
  float *dk, *dv;                      // [keys, width] each
  float *p, *ds;                       // scores and the gradient of attention [rows, pitch] each
  Pair *p_rows, *ds_rows, *ds_keys;    // attention and gradient of scores, pairs of rows, of keys
  Pair *queries, *grads;               // pairs of channels [rows, channel pairs] each
  Pair *q_rows, *g_rows;               // pairs of rows
  float* dq;                           // [rows, width]

  template <typename Take>
  PairBackwardSpace(const PairSizes& s, Take&& take)
      : k_columns((Pair*)take(s.pair_panels())), v_columns((Pair*)take(s.pair_panels())),
        keys((Pair*)take(s.key_pairs * s.width)), dk(take(s.keys * s.width)),
        dv(take(s.keys * s.width)), p(take(s.rows * s.pitch)), ds(take(s.rows * s.pitch)),
        p_rows((Pair*)take(s.halves())), ds_rows((Pair*)take(s.halves())),
        ds_keys((Pair*)take(s.halves())), queries((Pair*)take(s.rows * s.channel_pairs)),
        grads((Pair*)take(s.rows * s.channel_pairs)),
        q_rows((Pair*)take(s.rows / 2 * s.width)), g_rows((Pair*)take(s.rows / 2 * s.width)),
        dq(take(s.rows * s.width)) {}
};

// Exponents of 2 of a row's largest score and sum, and the mean of its gradient of attention.
struct PairRow {
  float power, mean;
};

// Turns scores p and gradients ds of two rows into pairs of rows: attention and the gradient of
// scores. Writes the latter also as pairs of keys, a row after the other.
inline void pair_weights(const PairSizes& s, float scale, const PairRow* row, const float* p,
                         const float* ds, Pair* p_rows, Pair* ds_rows, Pair* ds_keys) {
  for (int64_t j = 0; j < s.keys; j += kLanes<float>) {
    Vector<Pair> weights[2], grads[2];
    for (int64_t i = 0; i < 2; ++i) {
      Vector<float> w = power_of_two(scale * load(p + i * s.pitch + j) - row[i].power);
      const Vector<float> g = w * (load(ds + i * s.pitch + j) - row[i].mean);
      store_rounded((uint16_t*)(ds_keys + i * s.pitch / 2) + j, g);
      weights[i] = rounded(w);
      grads[i] = rounded(g);
    }
    store(p_rows + j, weights[0] | weights[1] << 16);
    store(ds_rows + j, grads[0] | grads[1] << 16);
  }
  if (s.keys % 2 == 0) return;
  const uint16_t zero = 0;  // of the key that the last one is paired with
  for (int64_t i = 0; i < 2; ++i) {
    std::memcpy((uint16_t*)(ds_keys + i * s.pitch / 2) + s.keys, &zero, sizeof zero);
  }
}

// As `attend_backward`, of bf16. rows(b, h) returns a function that gives the `PairRow` of query t.
template <typename F>
void attend_pairs_backward(const Tensor& grad_, const Tensor& q_, const Tensor& k_,
                           const Tensor& v_, float scale, const Tensor& dq_, const Tensor& dk_,
                           const Tensor& dv_, F&& rows) {
  const PairSizes s(q_, k_, 3);
  const Heads<uint16_t> grad(grad_), q(q_), k(k_), v(v_), dq(dq_), dk(dk_), dv(dv_);
  const int64_t all = s.keys * s.width, each = size_of_space<PairBackwardSpace>(s);
  in_parallel<float>(grad_, s.batch * s.heads, each, [&](int64_t begin, int64_t end, auto&& take) {
    const PairBackwardSpace space(s, take);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.heads, h = unit % s.heads;
      pack_pair_columns(k.at(b, h, 0), k.token, s.keys, s.d, space.k_columns);
      pack_pair_columns(v.at(b, h, 0), v.token, s.keys, s.d, space.v_columns);
      pack_row_pairs(k.at(b, h, 0), k.token, s.keys, s.d, space.keys);
      std::fill_n(space.dk, all, 0.0f);
      std::fill_n(space.dv, all, 0.0f);
      const auto of_row = rows(b, h);
      for (int64_t first = 0; first < s.queries; first += s.rows) {
        const int64_t m = std::min(s.rows, s.queries - first), row_pairs = (m + 1) / 2;
        pack_channel_pairs(q.at(b, h, first), q.token, m, s.d, space.queries);
        pack_channel_pairs(grad.at(b, h, first), grad.token, m, s.d, space.grads);
        pack_row_pairs(q.at(b, h, first), q.token, m, s.d, space.q_rows);
        pack_row_pairs(grad.at(b, h, first), grad.token, m, s.d, space.g_rows);
        const auto scores = [&](const Pair* left, const Pair* columns, float* to) {
          product<Pair>({left, s.channel_pairs, 1}, m, columns, kPanel<Pair>,
                        kPanel<Pair> * s.channel_pairs, s.channel_pairs, false, to, s.pitch,
                        vectors_of<float>(s.keys));
        };
        scores(space.queries, space.k_columns, space.p);
        scores(space.grads, space.v_columns, space.ds);
        if (m % 2) {  // the row that the last one is paired with
          std::fill_n(space.p + m * s.pitch, s.pitch, 0.0f);
          std::fill_n(space.ds + m * s.pitch, s.pitch, 0.0f);
        }
        for (int64_t i = 0; i < m; i += 2) {
          const PairRow none{0, 0};
          const PairRow two[2] = {of_row(first + i), i + 1 < m ? of_row(first + i + 1) : none};
          const int64_t at = i / 2 * s.pitch;
          pair_weights(s, scale * kLog2E, two, space.p + i * s.pitch, space.ds + i * s.pitch,
                       space.p_rows + at, space.ds_rows + at, space.ds_keys + at);
        }
        product<Pair>({space.p_rows, 1, s.pitch}, s.keys, space.g_rows, s.width, kPanel<Pair>,
                      row_pairs, true, space.dv, s.width, s.width);
        product<Pair>({space.ds_rows, 1, s.pitch}, s.keys, space.q_rows, s.width, kPanel<Pair>,
                      row_pairs, true, space.dk, s.width, s.width);
        for (int64_t j = 0; j < s.keys; j += kPortion) {
          product<Pair>({space.ds_keys + j / 2, s.pitch / 2, 1}, m, space.keys + j / 2 * s.width,
                        s.width, kPanel<Pair>, (std::min(kPortion, s.keys - j) + 1) / 2, j > 0,
                        space.dq, s.width, s.width);
        }
        for (int64_t i = 0; i < m; ++i) {
          write_rounded(dq.at(b, h, first + i), space.dq + i * s.width, scale, s.d);
        }
      }
      for (int64_t t = 0; t < s.keys; ++t) {
        write_rounded(dk.at(b, h, t), space.dk + t * s.width, scale, s.d);
        write_rounded(dv.at(b, h, t), space.dv + t * s.width, 1, s.d);
      }
    }
  });
}

}  // namespace fasttta

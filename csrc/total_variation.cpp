// Anisotropic total variation of maps, sum |x[i+1, j] - x[i, j]| + |x[i, j+1] - x[i, j]|, and the
// ensemble of predictions weighted by softmax(-variation / temperature).
#include "products.h"
#include "rows.h"

namespace fasttta {
namespace {

constexpr int64_t kStrip = 32;         // rows of one unit of parallel work
constexpr int64_t kPerThread = 32768;  // elements a thread should at least have

inline int64_t units_per_thread(int64_t width) {
  return std::max<int64_t>(1, kPerThread / (kStrip * std::max<int64_t>(width, 1)));
}

// Sums of |b - a|, a vector of them. What is left at the end is the last whole vector, less what
// was counted: compilers would take it one by one, for as long as all the others together.
template <typename A>
inline Vector<A> distance(const A* a, const A* b, int64_t n) {
  const auto difference = [](const A* from, const A* to) {
    const Vector<A> x = load(to) - load(from);
    return larger<A>(x, -x);
  };
  Vector<A> sum{};
  int64_t j = 0;
  for (; j + kLanes<A> <= n; j += kLanes<A>) sum += difference(a + j, b + j);
  if (j == n) return sum;
  if (n < kLanes<A>) {
    A few[2][kLanes<A>] = {};
    std::copy_n(a, n, few[0]);
    std::copy_n(b, n, few[1]);
    return difference(few[0], few[1]);
  }
  Vector<A> rest = difference(a + n - kLanes<A>, b + n - kLanes<A>);
  for (int64_t i = 0; i < kLanes<A> - (n - j); ++i) rest[i] = 0;
  return sum + rest;
}

template <typename A>
Tensor forward(const Tensor& maps) {
  const int64_t n = maps.size(0), height = maps.size(1), width = maps.size(2);
  const Tensor tv = empty_wide<A>(maps, {n});
  const Rows<A> x(maps, width);
  A* out = tv.mutable_data_ptr<A>();
  const int64_t strips = (height + kStrip - 1) / kStrip;
  std::vector<double> parts(n * strips);
  torch::stable::parallel_for(
      0, n * strips, units_per_thread(width), [&](int64_t begin, int64_t end) {
        std::vector<A> space(2 * width);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t map = unit / strips * height, first = unit % strips * kStrip;
          Vector<A> sum{};
          A *now = space.data(), *next = now + width;
          const A* here = x.read(map + first, now);
          for (int64_t i = first; i < std::min(height, first + kStrip); ++i) {
            sum += distance(here, here + 1, width - 1);
            if (i + 1 == height) break;
            const A* below = x.read(map + i + 1, next);
            sum += distance(here, below, width);
            here = below;
            std::swap(now, next);
          }
          for (int j = 0; j < kLanes<A>; ++j) parts[unit] += sum[j];
        }
      });
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t s = 0; s < strips; ++s) sum += parts[i * strips + s];
    out[i] = static_cast<A>(sum);
  }
  return tv;
}

// Whether to > from less whether to < from: the sign of a step, 0 at ties. Of vectors, lanes of
// integers that are the other way round, as comparisons give -1.
template <typename T>
inline auto step(T from, T to) {
  return (to > from) - (to < from);
}

// A row's gradient from it and its neighbours, which may be the row itself.
template <typename A>
inline void gradient(const A* above, const A* here, const A* below, A scale, A* out,
                     int64_t width) {
  const auto vector_at = [&](int64_t j) {
    const Vector<A> x = load(here + j);
    const auto falls = step(load(above + j), x) + step(load(below + j), x) +
                       step(load(here + j - 1), x) + step(load(here + j + 1), x);
    store(out + j, -scale * __builtin_convertvector(falls, Vector<A>));
  };
  const auto at = [&](int64_t j) {
    const A x = here[j], left = here[std::max<int64_t>(j - 1, 0)],
            right = here[std::min(j + 1, width - 1)];
    out[j] = scale * (step(above[j], x) + step(below[j], x) + step(left, x) + step(right, x));
  };
  const int64_t inner = width - 2;
  if (inner < kLanes<A>) {
    for (int64_t j = 0; j < width; ++j) at(j);
    return;
  }
  at(0);
  for (int64_t j = 1; j + kLanes<A> <= 1 + inner; j += kLanes<A>) vector_at(j);
  vector_at(1 + inner - kLanes<A>);  // some once more
  at(width - 1);
}

template <typename A>
Tensor backward(const Tensor& grad, const Tensor& maps) {
  const int64_t n = maps.size(0), height = maps.size(1), width = maps.size(2);
  const Tensor result = torch::stable::new_empty(maps, std::vector<int64_t>{n, height, width});
  const Rows<A> x(maps, width);
  const A* up = grad.const_data_ptr<A>();
  const Rows<A> out(result, width);
  const int64_t strips = (height + kStrip - 1) / kStrip;
  torch::stable::parallel_for(
      0, n * strips, units_per_thread(width), [&](int64_t begin, int64_t end) {
        std::vector<A> space(4 * width);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t map = unit / strips * height, first = unit % strips * kStrip;
          A *last = space.data(), *now = last + width, *next = now + width, *written = next + width;
          const A* here = x.read(map + first, now);
          const A* above = first == 0 ? here : x.read(map + first - 1, last);
          for (int64_t i = first; i < std::min(height, first + kStrip); ++i) {
            const A* below = i + 1 == height ? here : x.read(map + i + 1, next);
            A* target = out.slot(map + i, written);
            gradient(above, here, below, up[unit / strips], target, width);
            out.written(map + i, target);
            above = here;
            here = below;
            A* const free = last;
            last = now, now = next, next = free;
          }
        }
      });
  return result;
}

// softmax(-tv / temperature) into weights, and the predictions' mean by it.
template <typename A, typename W>
Tensor ensemble(const Tensor& logits, const Tensor& tv, const Tensor& weights, double temperature) {
  const int64_t n = logits.size(0), c = logits.size(1);
  const W* variation = tv.const_data_ptr<W>();
  W* w = weights.mutable_data_ptr<W>();
  std::vector<W> scores(n);
  for (int64_t i = 0; i < n; ++i) scores[i] = variation[i] / static_cast<W>(-temperature);
  softmax(scores.data(), w, n);
  const Rows<A> z(logits, c);
  ColumnSums<A> sums(n, c);
  over_rows(n, c, [&](int64_t begin, int64_t end) {
    std::vector<A> space(c), p(c);
    for (int64_t i = begin; i < end; ++i) {
      softmax(z.read(i, space.data()), p.data(), c);
      sums.add(i, static_cast<A>(w[i]), p.data());
    }
  });
  const Tensor probability = empty_wide<A>(logits, {c});
  convert(sums.total(), probability.mutable_data_ptr<A>(), c);
  return probability;
}

Tensor checked(const Tensor& maps) {
  STD_TORCH_CHECK(maps.dim() == 3 && maps.size(1) > 0 && maps.size(2) > 0,
                  "maps must be [N, H, W], H and W at least 1");
  return torch::stable::contiguous(maps);
}

Tensor total_variation(const Tensor& maps) {
  const Tensor x = checked(maps);
  return by_type(x, "maps", [&](auto element) { return forward<decltype(element)>(x); });
}

Tensor total_variation_backward(const Tensor& grad, const Tensor& maps) {
  const Tensor x = checked(maps);
  STD_TORCH_CHECK(grad.numel() == x.size(0), "grad must be [N]");
  return by_type(x, "maps", [&](auto element) {
    using A = decltype(element);
    return backward<A>(dense<A>(grad), x);
  });
}

std::tuple<Tensor, Tensor, Tensor> reliability_ensemble(
    const Tensor& maps, const Tensor& logits, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) > 0 && logits.size(0) == maps.size(0),
                  "needed maps [N, H, W] and logits [N, C], N at least 1");
  const Tensor tv = total_variation(maps), z = torch::stable::contiguous(logits);
  const Tensor weights = torch::stable::new_empty(tv, tv.sizes());
  const Tensor probability = by_type(z, "logits", [&](auto element) {
    using A = decltype(element);
    return tv.scalar_type() == ScalarType::Double
        ? ensemble<A, double>(z, tv, weights, temperature)
        : ensemble<A, float>(z, tv, weights, temperature);
  });
  return {probability, tv, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("reliability_ensemble", TORCH_BOX(&reliability_ensemble));
  m.impl("total_variation", TORCH_BOX(&total_variation));
  m.impl("total_variation_backward", TORCH_BOX(&total_variation_backward));
}

}  // namespace fasttta

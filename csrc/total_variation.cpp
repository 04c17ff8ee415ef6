// Anisotropic total variation of maps, sum |x[i+1, j] - x[i, j]| + |x[i, j+1] - x[i, j]|, and the
// ensemble of predictions weighted by softmax(-variation / temperature).
#include "rows.h"

namespace fasttta {
namespace {

constexpr int64_t kStrip = 32;         // rows of one unit of parallel work
constexpr int64_t kPerThread = 32768;  // elements a thread should at least have

inline int64_t units_per_thread(int64_t width) {
  return std::max<int64_t>(1, kPerThread / (kStrip * std::max<int64_t>(width, 1)));
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
          double sum = 0;
          A *now = space.data(), *next = now + width;
          const A* here = x.read(map + first, now);
          for (int64_t i = first; i < std::min(height, first + kStrip); ++i) {
            // below the last row: the row itself, no difference
            const A* below = i + 1 == height ? here : x.read(map + i + 1, next);
            A down = std::abs(below[0] - here[0]), along = 0;
#pragma omp simd reduction(+ : down, along)
            for (int64_t j = 1; j < width; ++j) {
              down += std::abs(below[j] - here[j]);
              along += std::abs(here[j] - here[j - 1]);
            }
            sum += down + along;
            here = below;
            std::swap(now, next);
          }
          parts[unit] = sum;
        }
      });
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t s = 0; s < strips; ++s) sum += parts[i * strips + s];
    out[i] = static_cast<A>(sum);
  }
  return tv;
}

// Signs of to - from, 0 at ties.
template <typename A>
inline void step(const A* from, const A* to, A* signs, int64_t width) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    signs[j] = static_cast<A>(to[j] > from[j]) - static_cast<A>(to[j] < from[j]);
  }
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
        // signs of the steps down to the next row, from the row above, and along the row
        std::vector<A> space(3 * width), down(width), from_above(width), along(width + 1);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t map = unit / strips * height, first = unit % strips * kStrip;
          const A scale = up[unit / strips];
          A *now = space.data(), *next = now + width, *written = next + width;
          const A* here = x.read(map + first, now);
          step(first == 0 ? here : x.read(map + first - 1, next), here, from_above.data(), width);
          for (int64_t i = first; i < std::min(height, first + kStrip); ++i) {
            const A* below = i + 1 == height ? here : x.read(map + i + 1, next);
            step(here, below, down.data(), width);
            step(here, here + 1, along.data() + 1, width - 1);  // its ends stay 0
            A* target = out.slot(map + i, written);
#pragma omp simd
            for (int64_t j = 0; j < width; ++j) {
              target[j] = scale * ((from_above[j] - down[j]) + (along[j] - along[j + 1]));
            }
            out.written(map + i, target);
            from_above.swap(down);
            here = below;
            std::swap(now, next);
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

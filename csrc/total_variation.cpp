// Anisotropic total variation of maps, sum |x[i+1, j] - x[i, j]| + |x[i, j+1] - x[i, j]|, and the
// ensemble of predictions weighted by softmax(-variation / temperature).
#include "rows.h"
#include "vectors.h"

namespace fasttta {
namespace {

constexpr int64_t kStrip = 32;         // rows of one unit of parallel work
constexpr int64_t kAhead = 3;          // rows to prefetch
constexpr int64_t kPerThread = 32768;  // elements a thread should at least have

inline int64_t units_per_thread(int64_t width) {
  return std::max<int64_t>(1, kPerThread / (kStrip * std::max<int64_t>(width, 1)));
}

// Each number's left neighbour; the first number itself, which has none.
template <typename A, size_t... I>
inline Vector<A> after_first(Vector<A> x, std::index_sequence<I...>) {
  return Vector<A>{x[0], x[I]...};
}

// Each number's right neighbour; the last number itself, which has none.
template <typename A, size_t... I>
inline Vector<A> before_last(Vector<A> x, std::index_sequence<I...>) {
  return Vector<A>{x[I + 1]..., x[sizeof...(I)]};
}

template <typename A>
constexpr std::make_index_sequence<kLanes<A> - 1> kOthers{};

// Loads a row of fewer numbers than a vector has, with zeros after it.
template <typename A>
inline Vector<A> load_first(const A* x, int64_t width) {
  Vector<A> row{};
  std::memcpy(&row, x, width * sizeof(A));
  return row;
}

template <typename A>
inline Vector<A> magnitude(Vector<A> x) {
  using Bits = decltype(x < x);
  return (Vector<A>)((Bits)x & ~(Bits)(-Vector<A>{}));
}

// Lanes of x from first to end, those of y elsewhere.
template <typename A, size_t... I>
inline Vector<A> between(Vector<A> x, Vector<A> y, int64_t first, int64_t end,
                         std::index_sequence<I...>) {
  using Bits = decltype(x < x);
  using Lane = std::remove_reference_t<decltype(Bits{}[0])>;
  const Bits lane{I...};
  return (lane >= static_cast<Lane>(first)) & (lane < static_cast<Lane>(end)) ? x : y;
}

// A vector of sums of the steps to the right and, if there is a row below, down.
template <bool kBelow, typename A>
inline Vector<A> distance(const A* here, const A* below, int64_t width) {
  Vector<A> across{}, down{};
  const auto some = [&](Vector<A> x, Vector<A> y, Vector<A> right) {
    across += magnitude<A>(right - x);
    if (kBelow) down += magnitude<A>(y - x);
  };
  int64_t j = 0;
  for (; j + kLanes<A> < width; j += kLanes<A>) {
    some(load(here + j), kBelow ? load(below + j) : Vector<A>{}, load(here + j + 1));
  }
  // the rest: the last whole vector, without the lanes that were counted
  const Vector<A> all = across + down;
  const int64_t last = width - kLanes<A>;
  const Vector<A> x = last < 0 ? load_first(here, width) : load(here + last);
  const Vector<A> y = !kBelow ? x : last < 0 ? load_first(below, width) : load(below + last);
  across = down = Vector<A>{};
  some(x, y, before_last<A>(x, kOthers<A>));
  const int64_t first = last < 0 ? 0 : j - last, end = last < 0 ? width : kLanes<A>;
  constexpr std::make_index_sequence<kLanes<A>> lanes{};
  return all + (between<A>(across, Vector<A>{}, first, end - 1, lanes) +
                between<A>(down, Vector<A>{}, first, end, lanes));
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
            if (i + 1 == height) {
              sum += distance<false>(here, here, width);
              break;
            }
            if (i + kAhead < height) x.fetch(map + i + kAhead);
            const A* below = x.read(map + i + 1, next);
            sum += distance<true>(here, below, width);
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

// The sign of a step between numbers, 0 at ties and at nan.
template <typename A>
inline Vector<A> step(Vector<A> from, Vector<A> to) {
  using Bits = decltype(from < to);
  const Vector<A> d = to - from, one = Vector<A>{} + A(1), minus = -Vector<A>{};
  const Bits signed_one = (Bits)one | ((Bits)d & (Bits)minus);
  return (d < 0) | (d > 0) ? (Vector<A>)signed_one : Vector<A>{};
}

// Writes a row's gradient from the row and its neighbours, which may be the row itself.
template <typename A>
void gradient(const A* above, const A* here, const A* below, A scale, A* out, int64_t width) {
  const auto falls = [](Vector<A> up, Vector<A> left, Vector<A> x, Vector<A> right,
                        Vector<A> down) {
    return (step<A>(up, x) + step<A>(down, x)) + (step<A>(left, x) + step<A>(right, x));
  };
  if (width < kLanes<A>) {
    constexpr std::make_index_sequence<kLanes<A>> lanes{};
    const Vector<A> x = load_first(here, width), next = before_last<A>(x, kOthers<A>);
    const Vector<A> sum =
        scale * falls(load_first(above, width), after_first<A>(x, kOthers<A>), x,
                      between<A>(next, x, 0, width - 1, lanes), load_first(below, width));
    std::memcpy(out, &sum, width * sizeof(A));
    return;
  }
  const auto put = [&](int64_t j, Vector<A> left, Vector<A> x, Vector<A> right) {
    store(out + j, scale * falls(load(above + j), left, x, right, load(below + j)));
  };
  const int64_t last = width - kLanes<A>;
  const Vector<A> x = load(here), y = load(here + last);
  put(0, after_first<A>(x, kOthers<A>), x,
      last == 0 ? before_last<A>(x, kOthers<A>) : load(here + 1));
  for (int64_t j = kLanes<A>; j < last; j += kLanes<A>) {
    put(j, load(here + j - 1), load(here + j), load(here + j + 1));
  }
  if (last > 0) {  // some lanes are computed twice
    put(last, load(here + last - 1), y, before_last<A>(y, kOthers<A>));
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
        std::vector<A> space(4 * width);
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t map = unit / strips * height, first = unit % strips * kStrip;
          A *last = space.data(), *now = last + width, *next = now + width, *result = next + width;
          const A* here = x.read(map + first, now);
          const A* above = first == 0 ? here : x.read(map + first - 1, last);
          for (int64_t i = first; i < std::min(height, first + kStrip); ++i) {
            if (i + kAhead < height) x.fetch(map + i + kAhead);
            const A* below = i + 1 == height ? here : x.read(map + i + 1, next);
            A* target = out.slot(map + i, result);
            gradient(above, here, below, up[unit / strips], target, width);
            out.write(map + i, target);
            above = here;
            here = below;
            A* const free = last;
            last = now, now = next, next = free;
          }
        }
      });
  return result;
}

// Writes softmax(-tv / temperature) to weights. Returns the mean of the predictions by these weights.
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

// Moments of each block of a tile of scores, and the gradient of the scores from that of the moments,
// which is written over the scores. PyTorch takes the products before and after.
//
// A chunk of a row is centred while it is in the first cache, and chunks are merged by their means
// (Chan, Golub & LeVeque 1979): memory is read once and nothing cancels. Which numbers are summed
// together, and in which order, is a matter of sizes alone, not of threads.
#include <algorithm>
#include <cmath>

#include "tensors.h"

namespace fasttta {
namespace {

constexpr int64_t kChunk = 512;        // numbers summed in their own type
constexpr int64_t kStrip = 16;         // rows of one unit of parallel work
constexpr int64_t kPerThread = 32768;  // elements a thread should at least have

// Count, mean and sum of squared deviations.
struct Moments {
  double n = 0, mean = 0, squares = 0;

  void merge(const Moments& other) {
    const double all = n + other.n, step = other.mean - mean, share = other.n / all;
    squares += other.squares + step * step * n * share;
    mean += std::isfinite(step) ? step * share : other.mean;  // infinity stays infinity
    n = all;
  }
};

template <typename A>
inline A sum(const A* x, int64_t n) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += x[j];
  return total;
}

template <typename A>
inline Moments moments(const A* x, int64_t n) {
  const A centre = sum(x, n) / static_cast<A>(n);
  A rest = 0, squares = 0;
#pragma omp simd reduction(+ : rest, squares)
  for (int64_t j = 0; j < n; ++j) {
    const A d = x[j] - centre;
    rest += d;
    squares += d * d;
  }
  // the centre is rounded: correct the sums for the rest
  const double left = std::isfinite(centre) ? static_cast<double>(rest) / n : 0;
  const double exact = squares - left * rest;
  return {static_cast<double>(n), centre + left, exact < 0 ? 0 : exact};
}

// A tile [b, R, C] without gaps, its rows and its columns in spans.
class Tile {
 public:
  Tile(const Tensor& scores, const std::vector<int64_t>& rows, const std::vector<int64_t>& columns)
      : batch(scores.dim() == 3 ? scores.size(0) : 0), columns(columns) {
    STD_TORCH_CHECK(scores.dim() == 3 && scores.is_contiguous(),
                    "scores must be [B, R, C] without gaps");
    STD_TORCH_CHECK(
        scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double,
        "scores must be float32 or float64");
    height = total(rows, scores.size(1), "rows must be positive and add up to R");
    width = total(columns, scores.size(2), "columns must be positive and add up to C");
    blocks = static_cast<int64_t>(rows.size() * columns.size());
    int64_t first = 0;
    for (size_t i = 0; i < rows.size(); first += rows[i++]) {
      for (int64_t r = 0; r < rows[i]; r += kStrip) {
        strips_.push_back({static_cast<int64_t>(i * columns.size()), first + r,
                           std::min(kStrip, rows[i] - r)});
      }
      for (const int64_t n : columns) counts.push_back(static_cast<double>(rows[i]) * n);
    }
  }

  int64_t batch, height, width, blocks;
  std::vector<int64_t> columns;
  std::vector<double> counts;  // scores of each block

  int64_t strips() const { return batch * static_cast<int64_t>(strips_.size()); }

  // Calls f(part, block of the batch, first number, numbers of a row, rows) for the part of each
  // block that lies in each strip.
  template <typename F>
  void in_parallel(F&& f) const {
    const int64_t each = static_cast<int64_t>(strips_.size());
    const int64_t grain = std::max<int64_t>(1, kPerThread / (kStrip * width));
    torch::stable::parallel_for(0, strips(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const Strip& strip = strips_[unit % each];
        const int64_t b = unit / each;
        int64_t at = (b * height + strip.first) * width;
        for (size_t j = 0; j < columns.size(); at += columns[j++]) {
          f(unit * columns.size() + j, b * blocks + strip.block + j, at, columns[j], strip.rows);
        }
      }
    });
  }

  // Returns one value for every block of the batch: those of its parts, added in their order.
  template <typename T, typename F>
  std::vector<T> gathered(const std::vector<T>& parts, F&& add) const {
    std::vector<T> values(batch * blocks);
    for (int64_t unit = 0; unit < strips(); ++unit) {
      const int64_t each = static_cast<int64_t>(strips_.size());
      const int64_t block = unit / each * blocks + strips_[unit % each].block;
      for (size_t j = 0; j < columns.size(); ++j) {
        add(values[block + j], parts[unit * columns.size() + j]);
      }
    }
    return values;
  }

 private:
  struct Strip {
    int64_t block, first, rows;  // the first of its blocks
  };

  static int64_t total(const std::vector<int64_t>& spans, int64_t wanted, const char* message) {
    int64_t sum = 0;
    for (const int64_t n : spans) {
      STD_TORCH_CHECK(n > 0, message);
      sum += n;
    }
    STD_TORCH_CHECK(sum == wanted && sum > 0, message);
    return sum;
  }

  std::vector<Strip> strips_;
};

std::tuple<Tensor, Tensor> block_moments(
    const Tensor& scores, std::vector<int64_t> rows, std::vector<int64_t> columns, double scale) {
  const Tile tile(scores, rows, columns);
  return by_type(scores, "scores", [&](auto a) {
    using A = decltype(a);
    const A* x = scores.const_data_ptr<A>();
    std::vector<Moments> parts(tile.strips() * columns.size());
    tile.in_parallel([&](int64_t part, int64_t, int64_t at, int64_t n, int64_t strip) {
      for (int64_t r = 0; r < strip; ++r) {
        for (int64_t j = 0; j < n; j += kChunk) {
          parts[part].merge(moments(x + at + r * tile.width + j, std::min(kChunk, n - j)));
        }
      }
    });
    const std::vector<Moments> of_blocks =
        tile.gathered(parts, [](Moments& all, const Moments& part) { all.merge(part); });
    const std::vector<int64_t> shape{tile.batch, static_cast<int64_t>(rows.size()),
                                     static_cast<int64_t>(columns.size())};
    const Tensor mean = empty_wide<A>(scores, shape), std = empty_wide<A>(scores, shape);
    A *means = mean.template mutable_data_ptr<A>(), *stds = std.template mutable_data_ptr<A>();
    for (size_t i = 0; i < of_blocks.size(); ++i) {
      means[i] = static_cast<A>(scale * of_blocks[i].mean);
      stds[i] =
          static_cast<A>(std::abs(scale) * std::sqrt(of_blocks[i].squares / (of_blocks[i].n - 1)));
    }
    return std::tuple<Tensor, Tensor>(mean, std);
  });
}

// slope is the gradient on a block's std, divided by that std.
void block_moments_backward(
    const Tensor& grad_mean, const Tensor& slope, std::vector<int64_t> rows,
    std::vector<int64_t> columns, double scale, const Tensor& scores) {
  const Tile tile(scores, rows, columns);
  for (const Tensor* x : {&grad_mean, &slope}) {
    STD_TORCH_CHECK(x->dim() == 3 && x->size(0) == tile.batch &&
                        x->size(1) == static_cast<int64_t>(rows.size()) &&
                        x->size(2) == static_cast<int64_t>(columns.size()),
                    "grad_mean and slope must be [B, M, N], one each for every block");
  }
  by_type(scores, "scores", [&](auto a) {
    using A = decltype(a);
    A* x = scores.mutable_data_ptr<A>();
    const Tensor to_mean = dense<A>(grad_mean), to_std = dense<A>(slope);
    const A *up_mean = to_mean.template const_data_ptr<A>(),
            *up_std = to_std.template const_data_ptr<A>();
    std::vector<double> parts(tile.strips() * columns.size());
    tile.in_parallel([&](int64_t part, int64_t, int64_t at, int64_t n, int64_t strip) {
      for (int64_t r = 0; r < strip; ++r) {
        for (int64_t j = 0; j < n; j += kChunk) {
          parts[part] += sum(x + at + r * tile.width + j, std::min(kChunk, n - j));
        }
      }
    });
    const std::vector<double> sums =
        tile.gathered(parts, [](double& all, double part) { all += part; });
    tile.in_parallel([&](int64_t, int64_t block, int64_t at, int64_t n, int64_t strip) {
      const double count = tile.counts[block % tile.blocks];
      const A mean = static_cast<A>(sums[block] / count);
      const A alpha = static_cast<A>(up_mean[block] * (scale / count));
      const A beta = static_cast<A>(up_std[block] * (scale * scale / (count - 1)));
      for (int64_t r = 0; r < strip; ++r) {
        A* const row = x + at + r * tile.width;
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) row[j] = beta * (row[j] - mean) + alpha;
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("block_moments", TORCH_BOX(&block_moments));
  m.impl("block_moments_backward", TORCH_BOX(&block_moments_backward));
}

}  // namespace fasttta

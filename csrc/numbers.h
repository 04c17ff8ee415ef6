// Types of the kernels, and exp and log in a form that compilers vectorise.
//
// A is the type of arithmetic: double for double tensors, else float. Tensors of half types are
// read and written through Rows, so that kernels are compiled for two types and not for four.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace fasttta {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename A>
constexpr ScalarType type_of = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// Calls f with a value of the type that arithmetic on the tensor has.
template <typename F>
auto by_type(const Tensor& x, const char* name, F&& f) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Double) return f(double());
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  name, " must be float64, float32, bfloat16 or float16");
  return f(float());
}

template <typename To, typename From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

inline double exp_(double x) { return std::exp(x); }
inline double log_(double x) { return std::log(x); }

// Cephes' polynomials, 2 units in the last place; nan in, nan out. exp is 0 below the smallest
// normal number, for arguments up to 0 as softmax has them.
inline float exp_(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float scale = bits_as<float>((bits_as<int32_t>(shifted) + (127 - 0x4b400000)) << 23);
  return x < -87.0f ? 0.0f : p * scale;
}

inline float log_(float x) {  // x > 0
  const bool tiny = x < std::numeric_limits<float>::min();
  const float scaled = tiny ? x * 8388608.0f : x;
  // mantissa in [sqrt(1/2), sqrt(2)): exponent and mantissa split at the bits of sqrt(1/2)
  const int32_t bits = bits_as<int32_t>(scaled) - 0x3f3504f3;
  const float n = static_cast<float>((bits >> 23) - (tiny ? 23 : 0));
  const float r = bits_as<float>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
  float p = 7.0376836292e-2f;
  p = p * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  const float square = r * r;
  float y = p * r * square - 2.12194440e-4f * n - 0.5f * square;
  y = r + y + 0.693359375f * n;
  return x != x ? x : y;
}

// -ln x, and 0 at x = 0: p ln p ends there.
template <typename A>
inline A surprise(A x) {
  return x == 0 ? A(0) : -log_(x);
}

template <typename To, typename From>
inline void convert(const From* from, To* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = static_cast<To>(from[j]);
}

// Rows of a tensor without gaps in the type of arithmetic: themselves where they have it, else by
// way of `space`, which must hold a row.
template <typename A>
class Rows {
 public:
  Rows(const Tensor& x, int64_t width)
      : data_(static_cast<char*>(x.data_ptr())), type_(x.scalar_type()), width_(width) {}

  const A* read(int64_t row, A* space) const {
    if (type_ == type_of<A>) return at<A>(row);
    if (type_ == ScalarType::BFloat16) {
      convert(at<c10::BFloat16>(row), space, width_);
    } else {
      convert(at<c10::Half>(row), space, width_);
    }
    return space;
  }

  // Has the processor fetch a row.
  void ahead(int64_t row) const {
    const int64_t size = type_ == ScalarType::Double ? 8 : type_ == ScalarType::Float ? 4 : 2;
    const char* const x = data_ + row * width_ * size;
    for (int64_t i = 0; i < width_ * size; i += 64) __builtin_prefetch(x + i);
  }

  // Where to write a row; `written` puts it into the tensor.
  A* slot(int64_t row, A* space) const { return type_ == type_of<A> ? at<A>(row) : space; }

  void written(int64_t row, const A* values) const {
    if (type_ == ScalarType::BFloat16) {
      convert(values, at<c10::BFloat16>(row), width_);
    } else if (type_ == ScalarType::Half) {
      convert(values, at<c10::Half>(row), width_);
    }
  }

 private:
  template <typename T>
  T* at(int64_t row) const {
    return reinterpret_cast<T*>(data_) + row * width_;
  }

  char* const data_;
  const ScalarType type_;
  const int64_t width_;
};

template <typename A>
Tensor empty_wide(const Tensor& x, std::vector<int64_t> shape) {
  return torch::stable::new_empty(x, shape, type_of<A>);
}

// x in the type of arithmetic, without gaps.
template <typename A>
Tensor dense(const Tensor& x) {
  if (x.scalar_type() == type_of<A> && x.is_contiguous()) return x;
  return torch::stable::contiguous(torch::stable::to(x, std::make_optional(type_of<A>)));
}

}  // namespace fasttta

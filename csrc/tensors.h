// Tensors as the kernels read and write them: types, rows, and copies in the type of arithmetic.
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

#include <cstdint>
#include <type_traits>
#include <vector>

#include "pairs.h"

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
inline void convert(const From* from, To* to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) to[j] = static_cast<To>(from[j]);
}

inline void convert(const c10::BFloat16* from, float* to, int64_t n) {
  const auto* const bits = reinterpret_cast<const uint16_t*>(from);
  int64_t j = 0;
  for (; j + kLanes<float> <= n; j += kLanes<float>) store(to + j, load_halves(bits + j));
  for (; j < n; ++j) to[j] = static_cast<float>(from[j]);
}

// PyTorch's conversion tells nan apart with a branch, which stays scalar.
inline void convert(const float* from, c10::BFloat16* to, int64_t n) {
  auto* const bits = reinterpret_cast<uint16_t*>(to);
  int64_t j = 0;
  for (; j + kLanes<float> <= n; j += kLanes<float>) store_rounded(bits + j, load(from + j));
  for (; j < n; ++j) to[j] = static_cast<c10::BFloat16>(from[j]);
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
    } else if (type_ == ScalarType::Half) {
      convert(at<c10::Half>(row), space, width_);
    } else {  // float32 among float64
      convert(at<float>(row), space, width_);
    }
    return space;
  }

  // Has the processor fetch a row.
  void fetch(int64_t row) const {
    const int64_t size = type_ == ScalarType::Double ? 8 : type_ == ScalarType::Float ? 4 : 2;
    const char* const x = data_ + row * width_ * size;
    for (int64_t i = 0; i < width_ * size; i += 64) __builtin_prefetch(x + i);
  }

  // Where to compute a row that is to be written; `write` then puts it into the tensor.
  A* slot(int64_t row, A* space) const { return type_ == type_of<A> ? at<A>(row) : space; }

  void write(int64_t row, const A* values) const {
    if (type_ == ScalarType::BFloat16) {
      convert(values, at<c10::BFloat16>(row), width_);
    } else if (type_ == ScalarType::Half) {
      convert(values, at<c10::Half>(row), width_);
    } else if (type_ != type_of<A>) {
      convert(values, at<float>(row), width_);
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

// A new tensor on x's device in the type of arithmetic.
template <typename A>
Tensor empty_wide(const Tensor& x, std::vector<int64_t> shape) {
  return torch::stable::new_empty(x, shape, type_of<A>);
}

// x in the type of arithmetic, without gaps; x itself where it is that.
template <typename A>
Tensor dense(const Tensor& x) {
  if (x.scalar_type() == type_of<A> && x.is_contiguous()) return x;
  return torch::stable::contiguous(torch::stable::to(x, std::make_optional(type_of<A>)));
}

// x in the type of arithmetic, with the last dimension's elements next to each other.
template <typename A>
Tensor readable(const Tensor& x) {
  const Tensor y = x.scalar_type() == type_of<A>
                       ? x : torch::stable::to(x, std::make_optional(type_of<A>));
  const int64_t last = y.dim() - 1;
  return y.stride(last) == 1 || y.size(last) == 1 ? y : torch::stable::contiguous(y);
}

// `readable`, of a tensor that must have so many dimensions and k's type of arithmetic.
template <typename A>
Tensor readable_as_k(const Tensor& x, const char* name, int64_t dimensions, const char* shape) {
  STD_TORCH_CHECK(x.dim() == dimensions, name, " must be ", shape);
  by_type(x, name, [&](auto a) {
    STD_TORCH_CHECK((std::is_same_v<decltype(a), A>), name, " must be of k's precision");
  });
  return readable<A>(x);
}

// x in the type of another tensor.
inline Tensor in_type_of(const Tensor& like, const Tensor& x) {
  return torch::stable::to(x, std::make_optional(like.scalar_type()));
}

}  // namespace fasttta

// CLIP's activation, x sigmoid(1.702 x), and its gradient, in one pass over memory each.
#include <algorithm>

#include "exponential.h"
#include "tensors.h"

namespace fasttta {
namespace {

constexpr int64_t kChunk = 4096;  // numbers that are read, computed and written together

// Returns sigmoid(1.702 x). exp_ is for arguments up to 0.
template <typename A>
inline A sigmoid(A x) {
  const A z = A(1.702) * x;
  const A e = exp_(z < 0 ? z : -z);
  return (z < 0 ? e : A(1)) / (1 + e);
}

void check(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, " must have no gaps");
}

// Calls f(first, count) on chunks of n numbers, in parallel.
template <typename F>
void over_chunks(int64_t n, F&& f) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * kChunk, std::min(kChunk, n - i * kChunk));
  });
}

// Reads n numbers from `first` on in the type of arithmetic: converted into `space` where x has
// another type.
template <typename A>
const A* read(const Tensor& x, int64_t first, int64_t n, A* space) {
  const char* const data = static_cast<const char*>(x.data_ptr());
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      convert(reinterpret_cast<const c10::BFloat16*>(data) + first, space, n);
      return space;
    case ScalarType::Half:
      convert(reinterpret_cast<const c10::Half*>(data) + first, space, n);
      return space;
    default:
      return reinterpret_cast<const A*>(data) + first;
  }
}

// Writes n numbers in the type of x.
template <typename A>
void write(const A* values, const Tensor& x, int64_t first, int64_t n) {
  char* const data = static_cast<char*>(x.data_ptr());
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      return convert(values, reinterpret_cast<c10::BFloat16*>(data) + first, n);
    case ScalarType::Half:
      return convert(values, reinterpret_cast<c10::Half*>(data) + first, n);
    default:
      std::copy(values, values + n, reinterpret_cast<A*>(data) + first);
  }
}

Tensor quick_gelu(const Tensor& x) {
  check(x, "x");
  const Tensor y = torch::stable::empty_like(x);
  by_type(x, "x", [&](auto a) {
    using A = decltype(a);
    over_chunks(x.numel(), [&](int64_t first, int64_t n) {
      A space[kChunk], values[kChunk];
      const A* const from = read<A>(x, first, n, space);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) values[i] = from[i] * sigmoid(from[i]);
      write<A>(values, y, first, n);
    });
  });
  return y;
}

Tensor quick_gelu_backward(const Tensor& grad, const Tensor& x) {
  check(x, "x");
  check(grad, "grad");
  STD_TORCH_CHECK(grad.numel() == x.numel() && grad.scalar_type() == x.scalar_type(),
                  "grad must be as x");
  const Tensor y = torch::stable::empty_like(x);
  by_type(x, "x", [&](auto a) {
    using A = decltype(a);
    over_chunks(x.numel(), [&](int64_t first, int64_t n) {
      A space[kChunk], more[kChunk], values[kChunk];
      const A *const from = read<A>(x, first, n, space), *const up = read<A>(grad, first, n, more);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const A s = sigmoid(from[i]);
        values[i] = up[i] * (s + A(1.702) * from[i] * s * (1 - s));
      }
      write<A>(values, y, first, n);
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) {
  m.impl("quick_gelu", TORCH_BOX(&quick_gelu));
  m.impl("quick_gelu_backward", TORCH_BOX(&quick_gelu_backward));
}

}  // namespace fasttta

// Checksums of a tensor's bytes, as fast as memory can be read. The computation and what it notices
// are described in fasttta/ops/byte_sums.py, whose PyTorch calls give the same numbers.
#include <cstring>

#include "tensors.h"

namespace fasttta {
namespace {

constexpr int64_t kWords = 1024;  // 64-bit words in a chunk, which has two sums
constexpr int64_t kBytes = 8 * kWords;

// Sums over words of (low + low key) (high + high key), halves modulo 2^32, sums modulo 2^64; the
// second with the keys moved by one word.
void sums_of(const char* from, const uint64_t* keys, int64_t* sums) {
  constexpr uint64_t half = 0xffffffff;
  uint64_t first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < kWords; ++i) {
    uint64_t word;
    std::memcpy(&word, from + 8 * i, 8);  // rows of a tensor need not begin at a whole word
    const uint64_t a = keys[i], b = keys[i + 1];
    first += ((word + a) & half) * (((word >> 32) + (a >> 32)) & half);
    second += ((word + b) & half) * (((word >> 32) + (b >> 32)) & half);
  }
  sums[0] = static_cast<int64_t>(first);
  sums[1] = static_cast<int64_t>(second);
}

Tensor byte_sums(const Tensor& data, const Tensor& keys) {
  STD_TORCH_CHECK(data.scalar_type() == ScalarType::Byte && data.dim() == 1 && data.is_contiguous(),
                  "data must be uint8 [n] without gaps");
  STD_TORCH_CHECK(keys.scalar_type() == ScalarType::Long && keys.numel() == kWords + 1 &&
                      keys.is_contiguous(),
                  "keys must be int64 [1025] without gaps");
  const int64_t n = data.numel(), chunks = (n + kBytes - 1) / kBytes;
  const Tensor sums = torch::stable::new_empty(keys, {chunks, 2});
  const char* const from = static_cast<const char*>(data.data_ptr());
  const uint64_t* const key = static_cast<const uint64_t*>(keys.data_ptr());
  int64_t* const to = static_cast<int64_t*>(sums.data_ptr());
  // one thread: it reads at the rate of memory, and waking others for each of a model's 500 tensors
  // costs more than they save, a hundred times more where the cores are busy
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t left = n - i * kBytes;
    if (left >= kBytes) {
      sums_of(from + i * kBytes, key, to + 2 * i);
    } else {
      char space[kBytes] = {};  // the last chunk is filled up with zeros
      std::memcpy(space, from + i * kBytes, left);
      sums_of(space, key, to + 2 * i);
    }
  }
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasttta, CPU, m) { m.impl("byte_sums", TORCH_BOX(&byte_sums)); }

}  // namespace fasttta

// Products of small matrices, from vectors of one type: most of the work of attention.
//
// c is computed a block of a few rows and as many vectors of columns as there are registers for.
// a and b are of c's type S, or pairs of bf16 (A is Pair, S float).
#pragma once

#include "pairs.h"

namespace fasttta {

constexpr int kTile = 6;  // rows of a block
template <typename A>
constexpr int64_t kPanel = kLanes<A> * kVectors;  // columns of a block

// A matrix whose element (i, k) is data[i * row + k * column].
template <typename A>
struct Left {
  const A* data;
  int64_t row, column;
};

// c (+)= a b: M rows, N vectors of columns, sums of n products; rows of b are b_pitch apart.
template <int M, int N, typename A, typename S>
inline void block(Left<A> a, const A* b, int64_t b_pitch, int64_t n, bool add, S* c,
                  int64_t c_pitch) {
  Vector<S> sum[M][N];
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) {
      sum[i][j] = add ? load(c + i * c_pitch + j * kLanes<S>) : Vector<S>{};
    }
  }
  for (int64_t k = 0; k < n; ++k) {
    Vector<A> y[N];
    for (int j = 0; j < N; ++j) y[j] = load(b + k * b_pitch + j * kLanes<A>);
    for (int i = 0; i < M; ++i) {
      const A x = a.data[i * a.row + k * a.column];
      for (int j = 0; j < N; ++j) sum[i][j] = multiply_add(x, y[j], sum[i][j]);
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int j = 0; j < N; ++j) store(c + i * c_pitch + j * kLanes<S>, sum[i][j]);
  }
}

// The same for any number of rows, kTile at a time.
template <int N, typename A, typename S>
void blocks(Left<A> a, int64_t rows, const A* b, int64_t b_pitch, int64_t n, bool add, S* c,
            int64_t c_pitch) {
  for (; rows >= kTile; rows -= kTile, a.data += kTile * a.row, c += kTile * c_pitch) {
    block<kTile, N>(a, b, b_pitch, n, add, c, c_pitch);
  }
  switch (rows) {
    case 5: return block<5, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 4: return block<4, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 3: return block<3, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 2: return block<2, N>(a, b, b_pitch, n, add, c, c_pitch);
    case 1: return block<1, N>(a, b, b_pitch, n, add, c, c_pitch);
  }
}

// c [rows, columns] (+)= a [rows, n] times b [n, columns]; columns whole vectors. b_panel: numbers
// from one panel of b to the next (kPanel if its rows are whole).
template <typename A, typename S>
void product(Left<A> a, int64_t rows, const A* b, int64_t b_pitch, int64_t b_panel, int64_t n,
             bool add, S* c, int64_t c_pitch, int64_t columns) {
  for (; columns >= kPanel<A>; columns -= kPanel<A>, b += b_panel, c += kPanel<A>) {
    blocks<kVectors>(a, rows, b, b_pitch, n, add, c, c_pitch);
  }
  switch (columns / kLanes<A>) {
    case 3: return blocks<kVectors < 3 ? 1 : 3>(a, rows, b, b_pitch, n, add, c, c_pitch);
    case 2: return blocks<kVectors < 2 ? 1 : 2>(a, rows, b, b_pitch, n, add, c, c_pitch);
    case 1: return blocks<1>(a, rows, b, b_pitch, n, add, c, c_pitch);
  }
}

}  // namespace fasttta

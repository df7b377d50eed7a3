// c = a * b, or c += a * b, for the small row-major matrices of one attention tile.
//
// A cell is what one multiplication step takes from a row of `a` and a column of `b`: a float, or
// (with bfloat16 arithmetic) two values that follow each other along the summed dimension.
#pragma once

#include "prefetch.h"
#include "vector.h"

namespace tessera {
namespace {

struct FloatCell {
  using Type = float;
  static constexpr int VALUES = 1;
  static Floats multiply_add(Floats sum, float a, const float* b) { return all(a) * load(b) + sum; }
};

#if defined(__AVX512BF16__)
struct PairCell {
  using Type = uint32_t;
  static constexpr int VALUES = 2;
  static Floats multiply_add(Floats sum, uint32_t a, const uint32_t* b) {
    auto a_pairs = bits<__m512bh>(_mm512_set1_epi32(static_cast<int>(a)));
    return bits<Floats>(
        _mm512_dpbf16_ps(bits<__m512>(sum), a_pairs, bits<__m512bh>(_mm512_loadu_si512(b))));
  }
};
#endif

// Sums are kept in ROWS * VECTORS registers, of which AVX-512 has 32 and the others 16.
constexpr int ROWS = 6;
constexpr int VECTORS = LANES == 16 ? 4 : 2;

template <typename Cell>
struct Operands {
  const typename Cell::Type* a;
  int64_t a_stride;
  const typename Cell::Type* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int64_t depth;  // cells of a row of a
  bool add;       // c += a * b
};

template <typename Cell, int rows, int vectors>
inline void multiply_block(const Operands<Cell>& x, Prefetcher& ahead) {
  Floats sums[rows][vectors] = {};
  if (x.add) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) sums[r][v] = load(x.c + r * x.c_stride + v * LANES);
  }
  for (int64_t d = 0; d < x.depth; d++) {
    ahead.fetch(2);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) {
        sums[r][v] = Cell::multiply_add(sums[r][v], x.a[r * x.a_stride + d],
                                        x.b + d * x.b_stride + v * LANES);
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) store(x.c + r * x.c_stride + v * LANES, sums[r][v]);
}

template <typename Cell, int vectors, int rows = ROWS>
inline void multiply_rows(const Operands<Cell>& x, int64_t count, Prefetcher& ahead) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<Cell, vectors, rows - 1>(x, count, ahead);
  }
  multiply_block<Cell, rows, vectors>(x, ahead);
}

// `rows` and `columns` are the sizes of c; columns must be a multiple of LANES.
template <typename Cell>
void multiply(const Operands<Cell>& x, int64_t rows, int64_t columns, Prefetcher& ahead) {
  int64_t blocks = (rows + ROWS - 1) / ROWS;
  int64_t block_rows = blocks ? (rows + blocks - 1) / blocks : 0;  // 8 rows: 4 and 4, not 6 and 2
  for (int64_t column = 0; column < columns;) {
    bool wide = column + VECTORS * LANES <= columns;
    for (int64_t row = 0; row < rows; row += block_rows) {
      Operands<Cell> part = x;
      part.a += row * x.a_stride;
      part.b += column;
      part.c += row * x.c_stride + column;
      int64_t count = row + block_rows <= rows ? block_rows : rows - row;
      if (wide) {
        multiply_rows<Cell, VECTORS>(part, count, ahead);
      } else {
        multiply_rows<Cell, 1>(part, count, ahead);
      }
    }
    column += wide ? VECTORS * LANES : LANES;
  }
}

}  // namespace
}  // namespace tessera

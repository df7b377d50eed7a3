// c = a * b, or c += a * b, for the small row-major matrices of one attention tile.
//
// A cell is what one multiplication step takes from a row of `a` and a column of `b`: a float, or
// (with bfloat16 arithmetic) two values that follow each other along the summed dimension.
#pragma once

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

// Where b lies: at(d, column) is LANES cells of its row d. One row after the other:
template <typename Type>
struct Strided {
  const Type* first;
  int64_t stride;

  const Type* at(int64_t d, int64_t column) const { return first + d * stride + column; }
};

// Rows anywhere.
template <typename Type>
struct Scattered {
  const Type* const* rows;

  const Type* at(int64_t d, int64_t column) const { return rows[d] + column; }
};

// Every LANES columns in a place of their own.
template <typename Type>
struct Columns {
  const Type* const* parts;
  int64_t stride;

  const Type* at(int64_t d, int64_t column) const { return parts[column / LANES] + d * stride; }
};

template <typename Cell, typename B>
struct Operands {
  const typename Cell::Type* a;
  int64_t a_stride;
  B b;
  float* c;
  int64_t c_stride;
  int64_t depth;  // cells of a row of a
  bool add;       // c += a * b
};

// `rows` rows of c from its first on, and `vectors` times LANES columns from `column` on.
template <typename Cell, int rows, int vectors, typename B, typename Ahead>
inline void multiply_block(const Operands<Cell, B>& x, int64_t column, Ahead& ahead) {
  float* c = x.c + column;
  Floats sums[rows][vectors] = {};
  if (x.add) {
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) sums[r][v] = load(c + r * x.c_stride + v * LANES);
  }
  for (int64_t d = 0; d < x.depth; d++) {
    ahead.step();
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) {
        sums[r][v] = Cell::multiply_add(sums[r][v], x.a[r * x.a_stride + d],
                                        x.b.at(d, column + v * LANES));
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) store(c + r * x.c_stride + v * LANES, sums[r][v]);
}

template <typename Cell, int vectors, int rows = ROWS, typename B, typename Ahead>
inline void multiply_rows(const Operands<Cell, B>& x, int64_t count, int64_t column,
                          Ahead& ahead) {
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rows<Cell, vectors, rows - 1>(x, count, column, ahead);
  }
  multiply_block<Cell, rows, vectors>(x, column, ahead);
}

// `rows` and `columns` are the sizes of c; columns must be a multiple of LANES. `ahead` prefetches
// while this multiplies.
template <typename Cell, typename B, typename Ahead>
void multiply(const Operands<Cell, B>& x, int64_t rows, int64_t columns, Ahead& ahead) {
  int64_t blocks = (rows + ROWS - 1) / ROWS;
  int64_t block_rows = blocks ? (rows + blocks - 1) / blocks : 0;  // 8 rows: 4 and 4, not 6 and 2
  for (int64_t column = 0; column < columns;) {
    bool wide = column + VECTORS * LANES <= columns;
    for (int64_t row = 0; row < rows; row += block_rows) {
      Operands<Cell, B> part = x;
      part.a += row * x.a_stride;
      part.c += row * x.c_stride;
      int64_t count = row + block_rows <= rows ? block_rows : rows - row;
      if (wide) {
        multiply_rows<Cell, VECTORS>(part, count, column, ahead);
      } else {
        multiply_rows<Cell, 1>(part, count, column, ahead);
      }
    }
    column += wide ? VECTORS * LANES : LANES;
  }
}

}  // namespace
}  // namespace tessera

// Products with bfloat16 weights. Local to kernels.cpp, compiled once per instruction set.
//
// A row's sums are always taken in the same order: its result has the same bits whatever rows are
// beside it.
#pragma once

#include "matmul.h"
#include "prefetch.h"

namespace tessera {
namespace {

#if defined(__AVX512BF16__)
// Asks for weights before they are needed, so many cache lines at every step of the product.
template <int LINES>
class WeightsAhead {
 public:
  WeightsAhead(const uint32_t* from, int64_t cells)
      : at(reinterpret_cast<const char*>(from)), end(reinterpret_cast<const char*>(from + cells)) {}

  void fetch(int64_t) {
    if (at >= end) return;
#pragma GCC unroll 4
    for (int line = 0; line < LINES; line++) __builtin_prefetch(at + line * LINE);
    at += LINES * LINE;
  }

 private:
  const char *at, *end;
};

// The weight is taken in parts of DEPTH pairs of columns, which stay in the caches until all rows
// are multiplied with them; meanwhile as much is fetched from DISTANCE pairs further on.
template <int LINES, int64_t DEPTH, int64_t DISTANCE>
void multiply_pairs(const PairedArgs& args, const uint32_t* x, const uint32_t* weight,
                    int64_t num_rows, float* sums) {
  const int64_t pairs = args.width / 2;
  for (int64_t first = 0; first < pairs; first += DEPTH) {
    const int64_t depth = pairs - first < DEPTH ? pairs - first : DEPTH;
    const uint32_t* part = weight + first * PAIRED_OUT;
    WeightsAhead<LINES> ahead(part + DISTANCE * PAIRED_OUT, depth * PAIRED_OUT);
    multiply<PairCell>({x + first, pairs, part, PAIRED_OUT, sums, PAIRED_OUT, depth, first > 0},
                       num_rows, PAIRED_OUT, ahead);
  }
}

// Up to PAIRED_ROWS rows of the input against one block of the weight.
void multiply_paired(const PairedArgs& args, int64_t block, int64_t first_row, int64_t num_rows) {
  const uint32_t* x = reinterpret_cast<const uint32_t*>(args.x_TI + first_row * args.width);
  const uint32_t* weight =
      reinterpret_cast<const uint32_t*>(args.weight) + block * args.width / 2 * PAIRED_OUT;
  float sums[PAIRED_ROWS * PAIRED_OUT];
  if (num_rows <= ROWS) {  // the weight is passed over once: all of it is fetched on the way
    multiply_pairs<PAIRED_OUT / LANES, 64, 64>(args, x, weight, num_rows, sums);
  } else if (num_rows <= 2 * ROWS) {
    multiply_pairs<PAIRED_OUT / LANES / 2, 64, 64>(args, x, weight, num_rows, sums);
  } else {
    multiply_pairs<1, 256, 256>(args, x, weight, num_rows, sums);
  }
  const int64_t first = block * PAIRED_OUT;
  const int64_t left = args.out_features - first, count = left < PAIRED_OUT ? left : PAIRED_OUT;
  for (int64_t row = 0; row < num_rows; row++) {
    bf16* out = args.out_TO + (first_row + row) * args.out_features + first;
    for_each_span(count, [&](Span span) {
      Floats sum = span.load(sums + row * PAIRED_OUT);
      if (args.bias_O) sum += span.load(args.bias_O + first);
      span.store(out, sum);
    });
  }
}
constexpr Kernels::MultiplyPaired PAIRED = multiply_paired;
#else
constexpr Kernels::MultiplyPaired PAIRED = nullptr;
#endif

}  // namespace
}  // namespace tessera

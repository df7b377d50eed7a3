// Products with bfloat16 weights. Local to kernels.cpp, compiled once per instruction set.
//
// A row's sums are always taken in the same order: its result has the same bits whatever rows are
// beside it.
#pragma once

#include "attention.h"
#include "matmul.h"
#include "prefetch.h"

namespace tessera {
namespace {

#if defined(__AVX512BF16__)
// Weights are read from front to back, which processors foresee: asking for them early cost a fifth
// of the rate at which one row read them.
struct NothingAhead {
  void step() {}
};

// Asks for what lies behind a part of the weight, two cache lines with each step.
class NextPart {
 public:
  NextPart(const uint32_t* part, int64_t cells)
      : line(reinterpret_cast<const char*>(part + cells)), end(line + cells * sizeof(uint32_t)) {}

  void step() {
    for (int i = 0; i < 2 && line < end; i++, line += LINE) __builtin_prefetch(line, 0, IN_L2);
  }

 private:
  const char *line, *end;
};

// What rows that pass a part of the weight once, or many times, take at once; it stays in the L2 cache.
constexpr int64_t DEPTH = 2048;  // pairs of columns of 256 bytes
// For two or three passes arithmetic takes about as long as reading: the next part is read meanwhile.
constexpr int64_t SHORT_DEPTH = 512;

// Up to PAIRED_ROWS rows of the input against one block of the weight.
void multiply_paired(const PairedArgs& args, int64_t block, int64_t first_row, int64_t num_rows) {
  const int64_t pairs = args.width / 2;
  const uint32_t* x = reinterpret_cast<const uint32_t*>(args.x_TI) + first_row * pairs;
  const uint32_t* weight =
      reinterpret_cast<const uint32_t*>(args.weight) + block * pairs * PAIRED_OUT;
  float sums[PAIRED_ROWS * PAIRED_OUT];
  const bool reads_ahead = num_rows > ROWS && num_rows <= 3 * ROWS;
  const int64_t most = reads_ahead ? SHORT_DEPTH : DEPTH;
  for (int64_t first = 0; first < pairs; first += most) {
    const int64_t depth = pairs - first < most ? pairs - first : most;
    const Strided<uint32_t> part{weight + first * PAIRED_OUT, PAIRED_OUT};
    const Operands<PairCell, Strided<uint32_t>> product{x + first,  pairs, part,     sums,
                                                        PAIRED_OUT, depth, first > 0};
    if (reads_ahead) {
      NextPart ahead(part.first, depth * PAIRED_OUT);
      multiply(product, num_rows, PAIRED_OUT, ahead);
    } else {
      NothingAhead ahead;
      multiply(product, num_rows, PAIRED_OUT, ahead);
    }
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

// One block of a weight from `count` of its rows; outputs beyond them become zero.
void pack_paired(const bf16* rows, int64_t width, int64_t count, bf16* block) {
  const int64_t pairs = width / 2;
  for_each_span(pairs, [&](Span span) {
    for (int64_t out = 0; out < PAIRED_OUT; out += LANES) {
      Floats cells[LANES];
      for (int64_t i = 0; i < LANES; i++) {
        const bf16* row = rows + (out + i) * width;
        cells[i] = out + i < count ? load_cells(row, span.at, span.count, PairCell{}) : Floats{};
      }
      transpose(cells);
      for (int64_t i = 0; i < span.count; i++) {
        store(reinterpret_cast<float*>(block) + (span.at + i) * PAIRED_OUT + out, cells[i]);
      }
    }
  });
}

constexpr Kernels::MultiplyPaired MULTIPLY_PAIRED = multiply_paired;
constexpr Kernels::PackPaired PACK_PAIRED = pack_paired;
#else
constexpr Kernels::MultiplyPaired MULTIPLY_PAIRED = nullptr;
constexpr Kernels::PackPaired PACK_PAIRED = nullptr;
#endif

}  // namespace
}  // namespace tessera

// Asks for memory that is worked on next, a few cache lines at a time between other instructions:
// a burst would fill the processor's queue of outstanding reads and stop it until memory answers.
#pragma once

#include <cstdint>

namespace tessera {
namespace {

constexpr int64_t LINE = 64;  // bytes that come together
// The first cache is full of what is worked on: what comes there early drives that out.
constexpr int IN_L2 = 2;  // of __builtin_prefetch

class Prefetcher {
 public:
  // Rows of `row_bytes` at offsets[i] of one pool, then of the next.
  Prefetcher(const uint8_t* pool, const uint8_t* next_pool, const int64_t* offsets,
             int64_t num_rows, int64_t row_bytes)
      : pool(pool), next_pool(next_pool), offsets(offsets), num_rows(num_rows),
        row_bytes(row_bytes) {}

  // With each step of a product, which reads as much for a single row.
  void step() { fetch(4); }

  void fetch(int64_t lines) {
    for (int64_t i = 0; i < lines && row < num_rows; i++) {
      __builtin_prefetch(pool + offsets[row] + at, 0, IN_L2);
      at += LINE;
      if (at >= row_bytes) next_row();
    }
  }

 private:
  const uint8_t *pool, *next_pool;
  const int64_t* offsets;
  int64_t num_rows, row_bytes;
  int64_t row = 0, at = 0;

  void next_row() {
    at = 0;
    if (++row == num_rows && next_pool) {
      pool = next_pool;
      next_pool = nullptr;
      row = 0;
    }
  }
};

}  // namespace
}  // namespace tessera

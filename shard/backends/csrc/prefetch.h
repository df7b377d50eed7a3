// Asks for memory that is worked on next, a few cache lines at a time between other instructions:
// a burst would fill the processor's queue of outstanding reads and stop it until memory answers.
#pragma once

#include <cstdint>

namespace tessera {
namespace {

constexpr int64_t LINE = 64;  // bytes that come together

class Prefetcher {
 public:
  // Rows at base + offsets[i] (bytes) of two pools; every row of the first comes first.
  Prefetcher(const void* first_base, const void* second_base, const int64_t* offsets,
             int64_t num_rows, int64_t row_bytes)
      : base(static_cast<const char*>(first_base)),
        second_base(static_cast<const char*>(second_base)), offsets(offsets),
        num_rows(num_rows), row_bytes(row_bytes) {}

  void fetch(int lines) {
    for (int i = 0; i < lines && row < num_rows; i++) {
      __builtin_prefetch(base + offsets[row] + at);
      at += LINE;
      if (at >= row_bytes) next_row();
    }
  }

 private:
  const char *base, *second_base;
  const int64_t* offsets;
  int64_t num_rows, row_bytes;
  int64_t row = 0, at = 0;

  void next_row() {
    at = 0;
    if (++row == num_rows && second_base) {
      base = second_base;
      second_base = nullptr;
      row = 0;
    }
  }
};

}  // namespace
}  // namespace tessera

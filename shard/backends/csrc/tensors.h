// What the drivers share: tensors checked and read as plain arrays, rows dealt out to threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "crew.h"
#include "kernels.h"
#include "variants.h"

namespace tessera {

constexpr int64_t ELEMENTS_PER_PIECE = 1 << 15;   // of a cheap operation on rows
constexpr int64_t PRODUCTS_PER_PIECE = 1 << 17;   // of a matrix product
constexpr int64_t PIECES_PER_THREAD = 8;          // keep all busy to the end, whoever is held up

inline const Kernels& kernels_of(int64_t variant) {
  TORCH_CHECK(variant >= 0 && variant < static_cast<int64_t>(variants().size()),
              "no kernel variant ", variant);
  return *variants()[variant].kernels;
}

inline const TypedKernels<float>& typed(const Kernels& kernels, float) { return kernels.of_float; }
inline const TypedKernels<bf16>& typed(const Kernels& kernels, bf16) { return kernels.of_bf16; }

// Calls body with a value of the element type; both types of the CPU backend.
template <typename Body>
void with_type(const at::Tensor& x, Body body) {
  if (x.scalar_type() == at::kFloat) return body(float{});
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "dtype must be float32 or bfloat16, not ",
              x.scalar_type());
  body(bf16{});
}

template <typename T>
T* data(const at::Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

inline void check_rows(const at::Tensor& x, const char* name, at::ScalarType type) {
  TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == type, name,
              " must be a contiguous CPU tensor of ", type, ", not ", x.scalar_type());
}

template <typename Body>
void for_rows(int64_t rows, int64_t width, Body body) {
  const int64_t piece = std::max<int64_t>(1, ELEMENTS_PER_PIECE / width);
  share_out(crew_size(), rows, piece, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) body(row);
  });
}

// Blocks of a weight that are a piece of its product: small, but worth being shared out.
inline int64_t piece_of(int64_t blocks, int64_t products_of_a_block) {
  const int64_t least = (PRODUCTS_PER_PIECE + products_of_a_block) / (products_of_a_block + 1);
  return std::max<int64_t>({1, least, blocks / (PIECES_PER_THREAD * crew_size())});
}

}  // namespace tessera

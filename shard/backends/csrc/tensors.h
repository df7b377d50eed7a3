// What the drivers share: tensors checked and read as plain arrays, rows dealt out to threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "variants.h"

namespace tessera {

constexpr int64_t ELEMENTS_PER_THREAD = 1 << 15;  // of a cheap operation on rows

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
  at::parallel_for(0, rows, std::max<int64_t>(1, ELEMENTS_PER_THREAD / width),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; row++) body(row);
                   });
}

}  // namespace tessera

// Linear layers in bfloat16: what shard/backends/paired_linear.py calls of torch.ops.tessera_cpu.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "crew.h"
#include "tensors.h"

namespace tessera {
namespace {

using at::Tensor;

constexpr char NO_PRODUCT[] = "these kernels have no product with bfloat16";

// Matrix units (AMX) are several times faster at prompts than the vectors these kernels use.
bool has_matrix_unit() {
#if defined(TESSERA_X86)
  return __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

bool paired_linear_pays(int64_t variant) {
  return kernels_of(variant).multiply_paired && !has_matrix_unit();
}

Tensor paired_linear(const Tensor& x_TI, const Tensor& weight, const std::optional<Tensor>& bias,
                     int64_t out_features, int64_t variant) {
  Kernels::MultiplyPaired multiply = kernels_of(variant).multiply_paired;
  TORCH_CHECK(multiply, NO_PRODUCT);
  Tensor x = x_TI.contiguous();
  check_rows(x, "x", at::kBFloat16);
  check_rows(weight, "the weight", at::kBFloat16);
  const int64_t width = x.size(-1), blocks = (out_features + PAIRED_OUT - 1) / PAIRED_OUT;
  TORCH_CHECK(width > 0 && width % 2 == 0 && weight.numel() == blocks * width * PAIRED_OUT,
              "the weight is not laid out for ", width, " inputs and ", out_features, " outputs");
  if (bias) {
    check_rows(*bias, "bias", at::kBFloat16);
    TORCH_CHECK(bias->numel() == out_features, "bias must have ", out_features, " values");
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor out = at::empty(shape, x.options());
  const int64_t rows = x.numel() / width;
  const bf16* added = bias ? data<bf16>(*bias) : nullptr;
  const PairedArgs args{data<bf16>(x),   data<bf16>(weight), added,
                        data<bf16>(out), width,              out_features};
  const int64_t piece = piece_of(blocks, rows * width * PAIRED_OUT);
  share_out(crew_size(), blocks, piece, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      for (int64_t row = 0; row < rows; row += PAIRED_ROWS) {
        multiply(args, block, row, std::min(PAIRED_ROWS, rows - row));
      }
    }
  });
  return out;
}

// Writes the blocks of a weight [O, I], with zeros for outputs beyond the last. `packed`: [ceil(O /
// PAIRED_OUT), I / 2, PAIRED_OUT, 2].
void pack_paired(const Tensor& weight_OI, const Tensor& packed, int64_t variant) {
  check_rows(weight_OI, "the weight", at::kBFloat16);
  check_rows(packed, "packed", at::kBFloat16);
  const int64_t rows = weight_OI.size(0), width = weight_OI.size(1);
  const int64_t blocks = (rows + PAIRED_OUT - 1) / PAIRED_OUT;
  TORCH_CHECK(width % 2 == 0 && packed.numel() == blocks * width * PAIRED_OUT,
              "packed must have room for ", blocks, " blocks of ", width, " columns");
  const auto* from = data<bf16>(weight_OI);
  auto* to = data<bf16>(packed);
  auto pack = kernels_of(variant).pack_paired;
  TORCH_CHECK(pack, NO_PRODUCT);
  const int64_t piece = piece_of(blocks, width * PAIRED_OUT);
  share_out(crew_size(), blocks, piece, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t first = block * PAIRED_OUT;
      pack(from + first * width, width, std::min(PAIRED_OUT, rows - first), to + first * width);
    }
  });
}

TORCH_LIBRARY_FRAGMENT(tessera_cpu, library) {
  library.def("paired_linear_pays(int variant) -> bool", &paired_linear_pays);
  library.def(
      "paired_linear(Tensor x, Tensor weight, Tensor? bias, int out_features, int variant) -> "
      "Tensor");
  library.def("pack_paired(Tensor weight, Tensor(a!) packed, int variant) -> ()");
}

TORCH_LIBRARY_IMPL(tessera_cpu, CPU, library) {
  library.impl("paired_linear", &paired_linear);
  library.impl("pack_paired", &pack_paired);
}

}  // namespace
}  // namespace tessera

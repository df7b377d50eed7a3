// torch.ops.tessera_cpu: what shard/backends/cpu.py calls. Checks arguments, finds the kernels.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>

#include "attend.h"
#include "cache.h"
#include "crew.h"
#include "tensors.h"

namespace tessera {
namespace {

using at::Tensor;

constexpr int64_t ROWS_AT_ONCE = 64;              // of an input, against quantized weights

float as_float(float x) { return x; }
float as_float(bf16 x) { return c10::detail::f32_from_bits(x.bits); }
void set(float& to, float x) { to = x; }
void set(bf16& to, float x) { to.bits = c10::detail::round_to_nearest_even(x); }

template <typename T>
void write_row(T* to, const float* from, const T* bias, int64_t count) {
  for (int64_t i = 0; i < count; i++) set(to[i], from[i] + (bias ? as_float(bias[i]) : 0.0f));
}

std::vector<std::string> variant_names() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) names.push_back(variant.name);
  return names;
}

// The residual, where there is one, becomes x + residual.
Tensor add_rms_norm(const Tensor& x, const std::optional<Tensor>& residual_TD,
                    const Tensor& weight_D, double eps, int64_t variant) {
  Tensor x_TD = x.contiguous();
  int64_t width = weight_D.numel();
  check_rows(x_TD, "x", x_TD.scalar_type());
  check_rows(weight_D, "weight", x_TD.scalar_type());
  TORCH_CHECK(x_TD.size(-1) == width, "x and weight differ in width");
  if (residual_TD) {
    check_rows(*residual_TD, "residual", x_TD.scalar_type());
    TORCH_CHECK(residual_TD->sizes() == x_TD.sizes(), "x and residual differ in shape");
  }
  Tensor out_TD = at::empty_like(x_TD);
  with_type(x_TD, [&](auto type) {
    using T = decltype(type);
    auto kernel = typed(kernels_of(variant), type).add_rms_norm;
    const T *x = data<T>(x_TD), *weight = data<T>(weight_D);
    T *residual = residual_TD ? data<T>(*residual_TD) : nullptr, *out = data<T>(out_TD);
    for_rows(x_TD.numel() / width, width, [&](int64_t row) {
      int64_t at = row * width;
      kernel(x + at, residual ? residual + at : nullptr, weight, out + at, width,
             static_cast<float>(eps));
    });
  });
  return out_TD;
}

Tensor silu_mul(const Tensor& gate_up, int64_t variant) {
  Tensor gate_up_TF = gate_up.contiguous();
  check_rows(gate_up_TF, "gate_up", gate_up_TF.scalar_type());
  TORCH_CHECK(gate_up_TF.dim() == 2 && gate_up_TF.size(1) % 2 == 0, "gate_up must be [T, 2 * n]");
  int64_t rows = gate_up_TF.size(0), width = gate_up_TF.size(1) / 2;
  Tensor out = at::empty({rows, width}, gate_up_TF.options());
  with_type(gate_up_TF, [&](auto type) {
    using T = decltype(type);
    auto kernel = typed(kernels_of(variant), type).silu_mul;
    const T* from = data<T>(gate_up_TF);
    T* to = data<T>(out);
    for_rows(rows, 2 * width,
             [&](int64_t row) { kernel(from + row * 2 * width, to + row * width, width); });
  });
  return out;
}

void check_step(const StepShape& step, const Tensor& q_TNH, const Tensor& tables_SM,
                int64_t num_blocks, int64_t block_size) {
  bool ordered = step.query_start[0] == 0 && step.query_start[step.num_sequences] == q_TNH.size(0);
  bool inside = true;
  for (int64_t s = 0; s < step.num_sequences; s++) {
    int64_t tokens = step.query_start[s + 1] - step.query_start[s], context = step.context_lens[s];
    ordered &= tokens >= 0 && context >= tokens && context <= tables_SM.size(1) * block_size;
    const int32_t* block = data<int32_t>(tables_SM) + s * tables_SM.size(1);
    for (int64_t i = 0; ordered && i * block_size < context; i++) {
      inside &= block[i] >= 0 && block[i] < num_blocks;
    }
  }
  TORCH_CHECK(ordered, "query_start, context_lens and block_tables contradict each other");
  TORCH_CHECK_INDEX(inside, "block ids must lie in [0, ", num_blocks, ")");
}

// The arguments but for strides, block table and mask, which are the caller's to fill in.
template <typename T>
AttendArgs<T> attend_args(T, const Tensor& q_TNH, const PagedCache& cache, const Tensor& out_TNH) {
  AttendArgs<T> args{};
  args.q_TNH = data<T>(q_TNH);
  args.k_BKPH = cache.k;
  args.v_BKPH = cache.v;
  args.out_TNH = data<T>(out_TNH);
  args.storage = cache.storage;
  args.num_kv_heads = cache.num_kv_heads;
  args.group = q_TNH.size(1) / args.num_kv_heads;
  args.block_size = cache.block_size;
  args.head_size = cache.head_size;
  args.scale = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(args.head_size)));
  return args;
}

// window 0: no window.
Tensor attend_paged(const Tensor& q, const Tensor& keys, const Tensor& values,
                    const Tensor& query_start_S1, const Tensor& context_lens_S,
                    const Tensor& block_tables_SM, int64_t window, int64_t variant) {
  Tensor q_TNH = q.contiguous();
  check_rows(q_TNH, "q", q_TNH.scalar_type());
  const Kernels& kernels = kernels_of(variant);
  const PagedCache cache = paged_cache(keys, values, q_TNH.scalar_type(), kernels);
  check_rows(query_start_S1, "query_start", at::kInt);
  check_rows(context_lens_S, "context_lens", at::kInt);
  check_rows(block_tables_SM, "block_tables", at::kInt);
  int64_t sequences = context_lens_S.numel(), kv_heads = cache.num_kv_heads;
  TORCH_CHECK(query_start_S1.numel() == sequences + 1 && block_tables_SM.dim() == 2 &&
                  block_tables_SM.size(0) == sequences,
              "query_start must be [S + 1], context_lens [S], block_tables [S, M]");
  TORCH_CHECK(q_TNH.dim() == 3 && q_TNH.size(2) == cache.head_size && q_TNH.size(1) % kv_heads == 0,
              "q must be [T, a multiple of ", kv_heads, ", ", cache.head_size, "]");
  TORCH_CHECK(window >= 0, "window must not be negative");
  StepShape step{data<int32_t>(query_start_S1), data<int32_t>(context_lens_S), sequences};
  check_step(step, q_TNH, block_tables_SM, cache.num_blocks, cache.block_size);
  Tensor out_TNH = at::empty_like(q_TNH);
  with_type(q_TNH, [&](auto type) {
    auto args = attend_args(type, q_TNH, cache, out_TNH);
    args.position_stride = cache.head_size;  // in pairs too, as PAIRED_KEYS of them lie together
    args.head_stride = cache.block_size * args.position_stride;
    args.block_stride = kv_heads * args.head_stride;
    args.block_tables_SM = data<int32_t>(block_tables_SM);
    args.table_stride = block_tables_SM.size(1);
    args.window = window;
    args.causal = true;
    attend(kernels, args, step);
  });
  return out_TNH;
}

// Each row of S is a sequence whose keys lie in one block of Q positions, where they are.
Tensor attend_dense(const Tensor& q, const Tensor& k, const Tensor& v, int64_t variant) {
  Tensor q_SQNH = q.contiguous(), k_SQNH = k.contiguous(), v_SQNH = v.contiguous();
  check_rows(q_SQNH, "q", q_SQNH.scalar_type());
  check_rows(k_SQNH, "k", q_SQNH.scalar_type());
  check_rows(v_SQNH, "v", q_SQNH.scalar_type());
  TORCH_CHECK(q_SQNH.dim() == 4 && k_SQNH.sizes() == q_SQNH.sizes() &&
                  v_SQNH.sizes() == q_SQNH.sizes(),
              "q, k and v must be [S, Q, N, H]");
  int64_t length = q_SQNH.size(1), heads = q_SQNH.size(2), head_size = q_SQNH.size(3);
  check_head_size(head_size);
  int32_t rows = static_cast<int32_t>(q_SQNH.size(0));
  std::vector<int32_t> query_start(rows + 1), lengths(rows, static_cast<int32_t>(length));
  std::vector<int32_t> blocks(rows);
  for (int32_t s = 0; s <= rows; s++) query_start[s] = s * static_cast<int32_t>(length);
  std::iota(blocks.begin(), blocks.end(), 0);
  const PagedCache cache{data<uint8_t>(k_SQNH), data<uint8_t>(v_SQNH), Storage::PLAIN,
                         rows, heads, length, head_size};
  Tensor out_SQNH = at::empty_like(q_SQNH);
  with_type(q_SQNH, [&](auto type) {
    auto args = attend_args(type, q_SQNH.flatten(0, 1), cache, out_SQNH);
    args.head_stride = head_size;
    args.position_stride = heads * args.head_stride;
    args.block_stride = length * args.position_stride;
    args.block_tables_SM = blocks.data();
    args.table_stride = 1;
    attend(kernels_of(variant), args, StepShape{query_start.data(), lengths.data(), rows});
  });
  return out_SQNH;
}

// Of each row of logits [R, V]: the first place of the largest, the logarithm of the sum of e^logit,
// and whether all are finite.
std::tuple<Tensor, Tensor, Tensor> survey(const Tensor& logits, int64_t variant) {
  Tensor logits_RV = logits.contiguous();
  check_rows(logits_RV, "logits", at::kFloat);
  TORCH_CHECK(logits_RV.dim() == 2 && logits_RV.size(1) > 0, "logits must be [R, V]");
  const int64_t rows = logits_RV.size(0), width = logits_RV.size(1);
  Tensor ids_R = at::empty({rows}, logits_RV.options().dtype(at::kLong));
  Tensor log_sums_R = at::empty({rows}, logits_RV.options());
  Tensor finite_R = at::empty({rows}, logits_RV.options().dtype(at::kBool));
  const auto look = kernels_of(variant).survey;
  for_rows(rows, width, [&](int64_t row) {
    RowSurvey found;
    look(data<float>(logits_RV) + row * width, width, &found);
    data<int64_t>(ids_R)[row] = found.index;
    data<float>(log_sums_R)[row] = found.max + std::log(found.sum_of_powers);
    data<bool>(finite_R)[row] = std::isfinite(found.sum);
  });
  return {ids_R, log_sums_R, finite_R};
}

// Whether a cache of bfloat16 may be in pairs.
bool pairs_work(int64_t variant) { return kernels_of(variant).multiply_paired; }

// x [.., I] with a weight in the layout of kernels.h: [.., out_features], in the type of x.
Tensor quantized_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        int64_t out_features, int64_t bits, int64_t variant) {
  const Kernels& kernels = kernels_of(variant);
  Tensor x_TI = x.reshape({-1, x.size(-1)}).contiguous();
  const int64_t rows = x_TI.size(0), width = x_TI.size(1), groups = width / QUANTIZED_GROUP;
  const int64_t blocks = (out_features + QUANTIZED_OUT - 1) / QUANTIZED_OUT;
  check_rows(weight, "weight", at::kByte);
  TORCH_CHECK(bits == 4 || bits == 8, "weights have 4 or 8 bits, not ", bits);
  TORCH_CHECK(width % QUANTIZED_GROUP == 0 &&
                  weight.numel() == blocks * groups * quantized_group_bytes(bits),
              "the weight is not laid out for ", width, " inputs and ", out_features, " outputs");
  Tensor codes = at::empty({rows, width}, x_TI.options().dtype(at::kChar));
  Tensor scales = at::empty({2, rows, groups}, x_TI.options().dtype(at::kFloat));
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  Tensor out = at::empty(shape, x_TI.options());
  QuantizedArgs args{data<uint8_t>(weight), data<int8_t>(codes), data<float>(scales),
                     data<float>(scales) + rows * groups, width, groups};
  with_type(x_TI, [&](auto type) {
    using T = decltype(type);
    if (bias) check_rows(*bias, "bias", x_TI.scalar_type());
    for_rows(rows, width, [&](int64_t row) {
      typed(kernels, type).quantize_row(data<T>(x_TI) + row * width, width,
                                        data<int8_t>(codes) + row * width,
                                        data<float>(scales) + row * groups,
                                        data<float>(scales) + (rows + row) * groups);
    });
    auto multiply = bits == 4 ? kernels.multiply_int4 : kernels.multiply_int8;
    const T* added = bias ? data<T>(*bias) : nullptr;
    const int64_t piece = piece_of(blocks, rows * width * QUANTIZED_OUT);
    share_out(crew_size(), blocks, piece, [&](int64_t, int64_t begin, int64_t end) {
      float tile[ROWS_AT_ONCE * QUANTIZED_OUT];
      for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * QUANTIZED_OUT;
        const int64_t count = std::min(QUANTIZED_OUT, out_features - first);
        for (int64_t row = 0; row < rows; row += ROWS_AT_ONCE) {
          const int64_t some = std::min(ROWS_AT_ONCE, rows - row);
          multiply(args, block, row, some, tile);
          for (int64_t r = 0; r < some; r++) {
            T* to = data<T>(out) + (row + r) * out_features + first;
            write_row(to, tile + r * QUANTIZED_OUT, added ? added + first : nullptr, count);
          }
        }
      }
    });
  });
  return out;
}

TORCH_LIBRARY(tessera_cpu, library) {
  library.def("variants() -> str[]", &variant_names);
  library.def("pairs_work(int variant) -> bool", &pairs_work);
  library.def(
      "add_rms_norm(Tensor x, Tensor(a!)? residual, Tensor weight, float eps, int variant) -> Tensor");
  library.def("silu_mul(Tensor gate_up, int variant) -> Tensor");
  library.def(
      "rotate_and_store(Tensor qkv, Tensor cos_sin, Tensor(a!) keys, Tensor(b!) values,"
      " Tensor positions, Tensor slots, int variant) -> Tensor");
  library.def(
      "attend(Tensor q, Tensor keys, Tensor values, Tensor query_start, Tensor context_lens,"
      " Tensor block_tables, int window, int variant) -> Tensor");
  library.def(
      "quantized_linear(Tensor x, Tensor weight, Tensor? bias, int out_features, int bits,"
      " int variant) -> Tensor");
  library.def("survey(Tensor logits, int variant) -> (Tensor, Tensor, Tensor)");
  library.def("attend_dense(Tensor q, Tensor k, Tensor v, int variant) -> Tensor");
}

TORCH_LIBRARY_IMPL(tessera_cpu, CPU, library) {
  library.impl("add_rms_norm", &add_rms_norm);
  library.impl("silu_mul", &silu_mul);
  library.impl("rotate_and_store", &rotate_and_store);
  library.impl("attend", &attend_paged);
  library.impl("survey", &survey);
  library.impl("attend_dense", &attend_dense);
  library.impl("quantized_linear", &quantized_linear);
}

}  // namespace
}  // namespace tessera

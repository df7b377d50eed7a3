#include "cache.h"

#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>

#include <cmath>
#include <cstring>

#include "tensors.h"

namespace tessera {
namespace {

using at::Tensor;

float as_float(float x) { return x; }
float as_float(bf16 x) { return c10::detail::f32_from_bits(x.bits); }

// To the nearest, ties to even. Too large is the largest; what is not finite is NaN.
uint8_t to_float8(float x, Storage storage) {
  const bool is_e4m3 = storage == Storage::E4M3;
  const float top = is_e4m3 ? 448.0f : 57344.0f;
  x = std::isfinite(x) ? std::clamp(x, -top, top) : std::nanf("");
  return is_e4m3 ? c10::detail::fp8e4m3fn_from_fp32_value(x)
                 : c10::detail::fp8e5m2_from_fp32_value(x);
}

// Writes a head to row `row` of a pool.
template <typename T>
void store_head(const T* from, uint8_t* pool, int64_t row, int64_t head_size, Storage storage) {
  if (storage == Storage::PLAIN) {
    std::memcpy(pool + row * head_size * sizeof(T), from, head_size * sizeof(T));
    return;
  }
  uint8_t* to = pool + row * head_size;
  for (int64_t i = 0; i < head_size; i++) to[i] = to_float8(as_float(from[i]), storage);
}

void check_range(const Tensor& indices, int64_t limit, const char* name) {
  const int64_t* index = data<int64_t>(indices);
  bool inside = true;
  for (int64_t i = 0; i < indices.numel(); i++) inside &= index[i] >= 0 && index[i] < limit;
  TORCH_CHECK_INDEX(inside, name, " must lie in [0, ", limit, ")");
}

}  // namespace

void check_head_size(int64_t head_size) {
  TORCH_CHECK(head_size % 8 == 0 && head_size <= MAX_HEAD_SIZE,
              "head size must be a multiple of 8 up to ", MAX_HEAD_SIZE, ", not ", head_size);
}

Storage storage_of(const Tensor& pool) {
  switch (pool.scalar_type()) {
    case at::kFloat8_e4m3fn: return Storage::E4M3;
    case at::kFloat8_e5m2: return Storage::E5M2;
    default: return Storage::PLAIN;
  }
}

void check_cache(const Tensor& k_BKPH, const Tensor& v_BKPH, at::ScalarType type) {
  if (storage_of(k_BKPH) != Storage::PLAIN) type = k_BKPH.scalar_type();
  check_rows(k_BKPH, "keys", type);
  check_rows(v_BKPH, "values", type);
  TORCH_CHECK(k_BKPH.dim() == 4 && v_BKPH.sizes() == k_BKPH.sizes(), "the cache must be [B, K, P, H]");
  check_head_size(k_BKPH.size(3));
}

Tensor rotate_and_store(const Tensor& qkv, const Tensor& cos_sin_LH, const Tensor& k_BKPH,
                        const Tensor& v_BKPH, const Tensor& positions_T, const Tensor& slots_T,
                        int64_t variant) {
  Tensor qkv_TF = qkv.contiguous();
  check_rows(qkv_TF, "qkv", qkv_TF.scalar_type());
  check_cache(k_BKPH, v_BKPH, qkv_TF.scalar_type());
  check_rows(cos_sin_LH, "cos_sin", at::kFloat);
  check_rows(positions_T, "positions", at::kLong);
  check_rows(slots_T, "slots", at::kLong);
  int64_t tokens = qkv_TF.size(0), kv_heads = k_BKPH.size(1), block_size = k_BKPH.size(2);
  int64_t head_size = k_BKPH.size(3), heads = qkv_TF.size(1) / head_size - 2 * kv_heads;
  TORCH_CHECK(heads > 0 && (heads + 2 * kv_heads) * head_size == qkv_TF.size(1),
              "qkv must be [T, (N + 2K) * H], not [", tokens, ", ", qkv_TF.size(1), "]");
  TORCH_CHECK(cos_sin_LH.size(1) == head_size, "cos_sin must be [L, H]");
  TORCH_CHECK(positions_T.numel() == tokens && slots_T.numel() == tokens,
              "positions and slots must be [T]");
  check_range(positions_T, cos_sin_LH.size(0), "positions");
  check_range(slots_T, k_BKPH.size(0) * block_size, "slots");
  Tensor q_TNH = at::empty({tokens, heads, head_size}, qkv_TF.options());
  with_type(qkv_TF, [&](auto type) {
    using T = decltype(type);
    auto rotate = typed(kernels_of(variant), type).rotate;
    const Storage storage = storage_of(k_BKPH);
    const float* cos_sin = data<float>(cos_sin_LH);
    const int64_t *position = data<int64_t>(positions_T), *slot = data<int64_t>(slots_T);
    T* q = data<T>(q_TNH);
    uint8_t *k = data<uint8_t>(k_BKPH), *v = data<uint8_t>(v_BKPH);
    const T* tokens_of_qkv = data<T>(qkv_TF);
    for_rows(tokens, qkv_TF.size(1), [&](int64_t t) {
      const T* from = tokens_of_qkv + t * (heads + 2 * kv_heads) * head_size;
      const float* angles = cos_sin + position[t] * head_size;
      for (int64_t head = 0; head < heads; head++, from += head_size) {
        rotate(from, angles, q + (t * heads + head) * head_size, head_size);
      }
      T rotated[MAX_HEAD_SIZE];
      for (int64_t head = 0; head < kv_heads; head++, from += head_size) {
        int64_t row = (slot[t] / block_size * kv_heads + head) * block_size + slot[t] % block_size;
        rotate(from, angles, rotated, head_size);
        store_head(rotated, k, row, head_size, storage);
        store_head(from + kv_heads * head_size, v, row, head_size, storage);
      }
    });
  });
  return q_TNH;
}

}  // namespace tessera

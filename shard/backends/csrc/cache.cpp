#include "cache.h"

#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Float8_e5m2.h>

#include <cmath>
#include <cstring>
#include <type_traits>

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

// Writes a head of a position to row `row` of a pool that is not in pairs.
template <typename T>
void store_head(const T* from, uint8_t* pool, int64_t row, int64_t head_size, Storage storage) {
  if (storage == Storage::PLAIN) {
    std::memcpy(pool + row * head_size * sizeof(T), from, head_size * sizeof(T));
    return;
  }
  uint8_t* to = pool + row * head_size;
  for (int64_t i = 0; i < head_size; i++) to[i] = to_float8(as_float(from[i]), storage);
}

void store_in_pairs(const PagedCache& cache, int64_t row, const bf16* key, const bf16* value) {
  const int64_t part = row / PAIRED_KEYS * PAIRED_KEYS * cache.head_size, at = row % PAIRED_KEYS;
  bf16* keys = reinterpret_cast<bf16*>(cache.k) + part + 2 * at;
  for (int64_t i = 0; i < cache.head_size; i += 2) {
    std::memcpy(keys + i * PAIRED_KEYS, key + i, 2 * sizeof(bf16));
  }
  bf16* values = reinterpret_cast<bf16*>(cache.v) + part + at / 2 * 2 * cache.head_size + at % 2;
  for (int64_t i = 0; i < cache.head_size; i++) values[2 * i] = value[i];
}

// Writes key and value of a position and head, which are row `row` of the pools.
template <typename T>
void store(const PagedCache& cache, int64_t row, const T* key, const T* value) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (cache.storage == Storage::PAIRED) return store_in_pairs(cache, row, key, value);
  }
  store_head(key, cache.k, row, cache.head_size, cache.storage);
  store_head(value, cache.v, row, cache.head_size, cache.storage);
}

Storage storage_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat8_e4m3fn: return Storage::E4M3;
    case at::kFloat8_e5m2: return Storage::E5M2;
    default: return Storage::PLAIN;
  }
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

PagedCache paged_cache(const Tensor& keys, const Tensor& values, at::ScalarType type,
                       const Kernels& kernels) {
  const bool paired = keys.dim() == 6;
  const Storage storage = paired ? Storage::PAIRED : storage_of(keys.scalar_type());
  check_rows(keys, "keys", in_8_bits(storage) ? keys.scalar_type() : type);
  check_rows(values, "values", keys.scalar_type());
  TORCH_CHECK(paired || (keys.dim() == 4 && values.sizes() == keys.sizes()),
              "keys and values must both be [B, K, P, H]");
  const int64_t blocks = keys.size(0), heads = keys.size(1);
  const int64_t positions = paired ? keys.size(2) * PAIRED_KEYS : keys.size(2);
  const int64_t head_size = paired ? 2 * keys.size(3) : keys.size(3);
  check_head_size(head_size);
  if (paired) {
    TORCH_CHECK(type == at::kBFloat16 && kernels.multiply_paired && head_size % PADDING == 0,
                "these kernels have no pairs of ", type, " in heads of ", head_size);
    const int64_t parts = keys.size(2), half = head_size / 2;
    TORCH_CHECK(keys.sizes() == at::IntArrayRef({blocks, heads, parts, half, PAIRED_KEYS, 2}) &&
                    values.sizes() ==
                        at::IntArrayRef({blocks, heads, parts, PAIRED_KEYS / 2, head_size, 2}),
                "keys and values must be in pairs of the same sizes");
  }
  return {data<uint8_t>(keys), data<uint8_t>(values), storage, blocks, heads, positions, head_size};
}

Tensor rotate_and_store(const Tensor& qkv, const Tensor& cos_sin_LH, const Tensor& keys,
                        const Tensor& values, const Tensor& positions_T, const Tensor& slots_T,
                        int64_t variant) {
  Tensor qkv_TF = qkv.contiguous();
  check_rows(qkv_TF, "qkv", qkv_TF.scalar_type());
  const Kernels& kernels = kernels_of(variant);
  const PagedCache cache = paged_cache(keys, values, qkv_TF.scalar_type(), kernels);
  check_rows(cos_sin_LH, "cos_sin", at::kFloat);
  check_rows(positions_T, "positions", at::kLong);
  check_rows(slots_T, "slots", at::kLong);
  const int64_t kv_heads = cache.num_kv_heads, block_size = cache.block_size;
  const int64_t tokens = qkv_TF.size(0), head_size = cache.head_size;
  const int64_t heads = qkv_TF.size(1) / head_size - 2 * kv_heads;
  TORCH_CHECK(heads > 0 && (heads + 2 * kv_heads) * head_size == qkv_TF.size(1),
              "qkv must be [T, (N + 2K) * H], not [", tokens, ", ", qkv_TF.size(1), "]");
  TORCH_CHECK(cos_sin_LH.size(1) == head_size, "cos_sin must be [L, H]");
  TORCH_CHECK(positions_T.numel() == tokens && slots_T.numel() == tokens,
              "positions and slots must be [T]");
  check_range(positions_T, cos_sin_LH.size(0), "positions");
  check_range(slots_T, cache.num_blocks * block_size, "slots");
  Tensor q_TNH = at::empty({tokens, heads, head_size}, qkv_TF.options());
  with_type(qkv_TF, [&](auto type) {
    using T = decltype(type);
    auto rotate = typed(kernels, type).rotate;
    const float* cos_sin = data<float>(cos_sin_LH);
    const int64_t *position = data<int64_t>(positions_T), *slot = data<int64_t>(slots_T);
    T* q = data<T>(q_TNH);
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
        store(cache, row, rotated, from + kv_heads * head_size);
      }
    });
  });
  return q_TNH;
}

}  // namespace tessera

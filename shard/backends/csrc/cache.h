// The paged cache as the drivers see it: its checks, and writing to it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels.h"

namespace tessera {

// Raises unless keys of this size can be computed with.
void check_head_size(int64_t head_size);

// Keys and values of a layer: [B, K, P, H], or in pairs (kernels.h) keys [B, K, P / 16, H / 2, 16, 2]
// and values [B, K, P / 16, 8, H, 2].
struct PagedCache {
  uint8_t* k;
  uint8_t* v;
  Storage storage;
  int64_t num_blocks;
  int64_t num_kv_heads;
  int64_t block_size;
  int64_t head_size;
};

// Raises unless both have such a shape and one type: `type`, or numbers of 8 bits; and for pairs that
// these kernels multiply them.
PagedCache paged_cache(const at::Tensor& keys, const at::Tensor& values, at::ScalarType type,
                       const Kernels& kernels);

// torch.ops.tessera_cpu.rotate_and_store; see shard/backends/base.py.
at::Tensor rotate_and_store(const at::Tensor& qkv, const at::Tensor& cos_sin_LH,
                            const at::Tensor& keys, const at::Tensor& values,
                            const at::Tensor& positions_T, const at::Tensor& slots_T,
                            int64_t variant);

}  // namespace tessera

// The paged cache as the drivers see it: its checks, and writing to it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels.h"

namespace tessera {

// Raises unless keys of this size can be computed with.
void check_head_size(int64_t head_size);

// Raises unless both are [B, K, P, H] of one type: `type`, or numbers of 8 bits.
void check_cache(const at::Tensor& k_BKPH, const at::Tensor& v_BKPH, at::ScalarType type);

Storage storage_of(const at::Tensor& pool);

// torch.ops.tessera_cpu.rotate_and_store; see shard/backends/base.py.
at::Tensor rotate_and_store(const at::Tensor& qkv, const at::Tensor& cos_sin_LH,
                            const at::Tensor& k_BKPH, const at::Tensor& v_BKPH,
                            const at::Tensor& positions_T, const at::Tensor& slots_T,
                            int64_t variant);

}  // namespace tessera

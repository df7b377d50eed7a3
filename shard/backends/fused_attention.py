"""Attention over a paged cache with torch's fused attention, for devices without own kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.backends.base import LayerCache, StepLayout
from tessera.shard.backends.reference import ReferenceBackend, gather, visible


class FusedAttentionBackend(ReferenceBackend):
    """The reference operations, but scores never leave the fused attention kernel."""

    def attend(
        self, q_TNH: Tensor, cache: LayerCache, layout: StepLayout, window: int | None
    ) -> Tensor:
        """See `Backend.attend`: gathers one sequence after the other."""
        out_TNH = torch.empty_like(q_TNH)
        for s, context_len in enumerate(layout.context_lens):
            first, last = layout.query_start[s], layout.query_start[s + 1]
            if first < last:
                k_CKH, v_CKH = gather(cache, layout.block_tables_SM[s], context_len)
                mask_QC = visible(last - first, context_len, window, self.device)
                out_TNH[first:last] = _fused(q_TNH[first:last], k_CKH, v_CKH, mask_QC)
        return out_TNH


def _fused(q_QNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, mask_QC: Tensor) -> Tensor:
    """One sequence. Query heads of a group follow each other on the query axis (G * Q rows).

    That spares copies of keys and values, and torch's slow path for `enable_gqa`.
    """
    query_len, num_heads, head_size = q_QNH.shape
    group = num_heads // k_CKH.shape[1]
    q_KRH = q_QNH.transpose(0, 1).reshape(-1, group * query_len, head_size)
    k_KCH, v_KCH = k_CKH.transpose(0, 1), v_CKH.transpose(0, 1)
    mask_RC = mask_QC.repeat(group, 1)
    out_KRH = F.scaled_dot_product_attention(q_KRH[None], k_KCH[None], v_KCH[None], mask_RC)[0]
    return out_KRH.reshape(num_heads, query_len, head_size).transpose(0, 1)

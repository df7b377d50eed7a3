"""Attention over a paged cache with torch's fused attention, for devices without own kernels."""

import torch.nn.functional as F
from torch import Tensor

from tessera.shard.backends.reference import ReferenceBackend


class FusedAttentionBackend(ReferenceBackend):
    """The reference operations, but scores never leave the fused attention kernel."""

    def attend_one(self, q_QNH: Tensor, k_CKH: Tensor, v_CKH: Tensor, visible_QC: Tensor) -> Tensor:
        """One sequence. Query heads of a group follow each other on the query axis (G * Q rows).

        That spares copies of keys and values, and torch's slow path for `enable_gqa`.
        """
        query_len, num_heads, head_size = q_QNH.shape
        group = num_heads // k_CKH.shape[1]
        q_KRH = q_QNH.transpose(0, 1).reshape(-1, group * query_len, head_size)
        k_KCH, v_KCH = k_CKH.transpose(0, 1), v_CKH.transpose(0, 1)
        mask_RC = visible_QC.repeat(group, 1)
        out_KRH = F.scaled_dot_product_attention(q_KRH[None], k_KCH[None], v_KCH[None], mask_RC)[0]
        return out_KRH.reshape(num_heads, query_len, head_size).transpose(0, 1)

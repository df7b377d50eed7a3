"""torch's fused operations, for devices without own kernels: attention, 4-bit weights."""

import logging
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor

from tessera.shard.backends.base import Linear
from tessera.shard.backends.int4_linear import Int4Linear, fits, int4_works
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.quantized import QuantizedWeight

logger = logging.getLogger(__name__)


class FusedAttentionBackend(ReferenceBackend):
    """The reference operations, but scores never leave the fused attention kernel."""

    @cached_property
    def _int4_works(self) -> bool:
        works = int4_works(self.device)
        if not works:
            logger.warning(
                "torch has no product with 4-bit weights for %s: they are made floats at each "
                "call, which saves memory but no time",
                self.device,
            )
        return works

    def quantized_linear(self, weight: QuantizedWeight, bias_O: Tensor | None) -> Linear:
        """See `Backend.quantized_linear`. torch has nothing for 8 bits in groups of 32."""
        if fits(weight) and self._int4_works:
            return Int4Linear(weight, bias_O)
        return super().quantized_linear(weight, bias_O)

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

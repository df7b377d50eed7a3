"""torch's own FlashAttention-2 for long prompt chunks, over keys and values copied together.

`_flash_attention_forward` is an operation that torch does not promise to keep, so it is tried on
the device before it is used.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tessera.shard.backends.base import LayerCache, StepLayout


def flash_fits(q_TNH: Tensor) -> bool:
    """Whether the operation takes such queries."""
    head_size = q_TNH.shape[-1]
    return (
        q_TNH.dtype in (torch.float16, torch.bfloat16) and head_size % 8 == 0 and head_size <= 256
    )


@dataclass(frozen=True, slots=True)
class PackedContexts:
    """Where the whole contexts of some sequences of a step lie. C: their tokens, packed."""

    first: int  # of the sequences
    query_start_S1: Tensor  # int32, from 0
    key_start_S1: Tensor  # int32
    blocks_C: Tensor
    offsets_C: Tensor
    most_queries: int  # of one sequence
    most_keys: int

    @classmethod
    def of(cls, layout: StepLayout, first: int, block_size: int) -> "PackedContexts":
        """Of the sequences of a step from number `first` on. Waits for nothing."""
        lens = layout.context_lens[first:]
        num_keys = sum(lens)
        lens_S = layout.context_lens_S[first:]
        key_start_S1 = torch.zeros(len(lens) + 1, dtype=torch.int32, device=lens_S.device)
        torch.cumsum(lens_S, 0, out=key_start_S1[1:])
        rows = torch.arange(len(lens), device=lens_S.device)
        owner_C = torch.repeat_interleave(rows, lens_S, output_size=num_keys)
        position_C = torch.arange(num_keys, device=lens_S.device) - key_start_S1[owner_C]
        tables_SM = layout.block_tables_SM[first:]
        query_start_S1 = layout.query_start_S1[first:]
        return cls(
            first,
            query_start_S1 - query_start_S1[0],
            key_start_S1,
            tables_SM[owner_C, position_C // block_size].long(),
            position_C % block_size,
            max(end - start for start, end in pairwise(layout.query_start[first:])),
            max(lens),
        )


def flash_attend(
    out_TNH: Tensor, q_TNH: Tensor, cache: LayerCache, contexts: PackedContexts, window: int | None
) -> None:
    """Attend from the last rows of `q_TNH`, those of the packed sequences."""
    k_CKH, v_CKH = (
        _gathered(pool_BKPH, contexts).to(q_TNH.dtype) for pool_BKPH in (cache.k_BKPH, cache.v_BKPH)
    )
    result = torch.ops.aten._flash_attention_forward(
        q_TNH,
        k_CKH,
        v_CKH,
        contexts.query_start_S1,
        contexts.key_start_S1,
        contexts.most_queries,
        contexts.most_keys,
        0.0,  # dropout
        True,  # causal; the last query sees the last key
        False,
        scale=q_TNH.shape[-1] ** -0.5,
        window_size_left=-1 if window is None else window - 1,
        window_size_right=0,
    )
    out_TNH.copy_(result[0])


def _gathered(pool_BKPH: Tensor, contexts: PackedContexts) -> Tensor:
    dtype = pool_BKPH.dtype
    if dtype.itemsize == 1:  # not all of torch's operations know numbers of 8 bits
        pool_BKPH = pool_BKPH.view(torch.uint8)
    return pool_BKPH[contexts.blocks_C, :, contexts.offsets_C].view(dtype)

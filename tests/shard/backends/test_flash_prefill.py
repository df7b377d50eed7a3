"""What torch's FlashAttention is asked, without a GPU: the operation itself is played here."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tessera.shard.backends.flash_prefill import PackedContexts, flash_attend, flash_fits
from tests.shard.backends.pool import NAN, Pool, assert_close

PARTS = [(0, 69, 70), (1, 0, 30), (2, 20, 55), (3, 0, 16)]  # the first is a decode row


def pool_of(heads: tuple[int, int, int] = (4, 2, 16)) -> Pool:
    pool = Pool([70, 30, 55, 16], heads, torch.float16)
    pool.fill(0, 0, 69)
    pool.fill(2, 0, 20)
    for part in PARTS:
        pool.fill(*part)
    return pool


def played(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_start: Tensor,
    key_start: Tensor,
    most_queries: int,
    most_keys: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
) -> tuple[Tensor]:
    """As torch documents it: masks are aligned at the last query and the last key."""
    assert (dropout, is_causal, return_debug_mask, window_size_right) == (0.0, True, False, 0)
    out = torch.full_like(query, NAN)
    spans = zip(pairwise(query_start.tolist()), pairwise(key_start.tolist()), strict=True)
    for (first, last), (first_key, last_key) in spans:
        assert last - first <= most_queries and last_key - first_key <= most_keys
        q, k, v = query[first:last], key[first_key:last_key], value[first_key:last_key]
        group = q.shape[1] // k.shape[1]
        k, v = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        position = torch.arange(len(k) - len(q), len(k))[:, None]
        keys = torch.arange(len(k))
        hidden = keys > position
        if window_size_left >= 0:
            hidden |= keys < position - window_size_left
        scores = torch.einsum("qnh,cnh->nqc", q.double(), k) * scale
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out[first:last] = torch.einsum("nqc,cnh->qnh", weights, v).to(out.dtype)
    return (out,)


@pytest.mark.parametrize("window", [None, 1, 9, 1000])
def test_it_is_asked_for_the_prompts_of_a_step(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of()
    layout = pool.layout(PARTS)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", played)
    q_TNH = torch.cat([pool.sequences[s].q_CNH[first:last] for s, first, last in PARTS])
    out_TNH = torch.full_like(q_TNH, NAN)
    contexts = PackedContexts.of(layout, 1, pool.block_size)
    flash_attend(out_TNH[1:], q_TNH[1:], pool.cache, contexts, window)
    assert out_TNH[0].isnan().all()  # not one of the prompts
    for part, got in zip(PARTS[1:], torch.split(out_TNH[1:], [30, 35, 16]), strict=True):
        assert_close(got, pool.expected(*part, window))


def test_torch_has_the_operation_with_these_arguments() -> None:
    """Shapes alone are computed: that is what there is without a GPU."""
    pool = pool_of()
    contexts = PackedContexts.of(pool.layout(PARTS), 1, pool.block_size)
    result = torch.ops.aten._flash_attention_forward(
        *(torch.empty(81, heads, 16, dtype=torch.float16, device="meta") for heads in (4, 2, 2)),
        contexts.query_start_S1.to("meta"),
        contexts.key_start_S1.to("meta"),
        contexts.most_queries,
        contexts.most_keys,
        0.0,
        True,
        False,
        scale=0.25,
        window_size_left=-1,
        window_size_right=0,
    )
    assert result[0].shape == (81, 4, 16)


@pytest.mark.parametrize(
    ("dtype", "head_size", "fits"),
    [
        (torch.bfloat16, 128, True),
        (torch.float16, 80, True),
        (torch.float32, 128, False),
        (torch.bfloat16, 20, False),
        (torch.bfloat16, 264, False),
    ],
)
def test_which_queries_it_takes(dtype: torch.dtype, head_size: int, fits: bool) -> None:
    assert flash_fits(torch.empty(1, 2, head_size, dtype=dtype)) == fits

"""IPEX as its build for GPUs is documented, in plain torch: what it takes, and what it refuses.

Sources: docstrings of intel_extension_for_pytorch 2.8 and its tests for GPUs
(tests/gpu/examples/test_chunked_prefill.py and test_cache_ops.py). `test_ipex.py` compares the
signatures with the real ones of the build for processors.
"""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


class PagedAttention:
    """`ipex.llm.modules.PagedAttention`. Caches are [blocks, positions, heads, head size]."""

    @classmethod
    def reshape_and_cache_flash(
        cls,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str = "auto",
        k_scale: float = 1.0,
        v_scale: float = 1.0,
    ) -> None:
        block_size = key_cache.shape[1]
        for pool, new in ((key_cache, key), (value_cache, value)):
            assert pool.is_contiguous() and new.is_contiguous() and pool.dtype == new.dtype
            assert pool.shape[2:] == new.shape[1:]
            pool[slot_mapping // block_size, slot_mapping % block_size] = new

    @classmethod
    def flash_attn_varlen_func(
        cls,
        output: Tensor,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        scale: float,
        is_cusal: bool,
        block_tables: Tensor,
        alibi_slopes: Tensor | None,
        window_size_left: int = -1,
        window_size_right: int = -1,
        kv_cache_dtype: str = "auto",
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        softcap: float = -1.0,
    ) -> None:
        assert query.dtype in HALVES and query.is_contiguous() and is_cusal
        assert key_cache.is_contiguous() and value_cache.is_contiguous()
        assert key_cache.shape[1] in (16, 32, 64, 128)
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == block_tables.dtype == torch.int32
        starts_q, starts_kv = cu_seqlens_q.tolist(), cu_seqlens_kv.tolist()
        lengths_q, lengths_kv = _differences(starts_q), _differences(starts_kv)
        assert (max(lengths_q), max(lengths_kv)) == (max_seqlen_q, max_seqlen_kv)
        for s, (length_q, length_kv) in enumerate(zip(lengths_q, lengths_kv, strict=True)):
            k, v = (
                pool[block_tables[s].long()].flatten(0, 1)[:length_kv].float()
                for pool in (key_cache, value_cache)
            )
            group = query.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            q = query[starts_q[s] : starts_q[s + 1]].float()
            scores = torch.einsum("qnh,knh->nqk", q, k) * scale
            at_k = torch.arange(length_kv, device=query.device)
            at_q = at_k[length_kv - length_q :, None]
            hidden = at_k > at_q
            if window_size_left >= 0:
                hidden = hidden | (at_k < at_q - window_size_left)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            output[starts_q[s] : starts_q[s + 1]] = torch.einsum("nqk,knh->qnh", weights, v).to(
                output.dtype
            )


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    sin: Tensor,
    cos: Tensor,
    rotary_dim: int,
    rotary_half: bool,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ipex.llm.functional.rotary_embedding`: in place."""
    assert rotary_half and rotary_dim == query.shape[-1] == 2 * sin.shape[-1]
    assert sin.shape == cos.shape == (query.shape[0], 1, rotary_dim // 2)
    assert sin.dtype == cos.dtype == query.dtype
    for x in (query, key):
        left, right = x.chunk(2, dim=-1)
        x.copy_(torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1))
    return query, key


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ipex.llm.functional.rms_norm`."""
    wide = hidden_states.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(hidden_states.dtype) * weight


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let it be what is imported."""
    functional = SimpleNamespace(rotary_embedding=rotary_embedding, rms_norm=rms_norm)
    package = ModuleType("intel_extension_for_pytorch")
    package.llm = SimpleNamespace(  # type: ignore[attr-defined]
        modules=SimpleNamespace(PagedAttention=PagedAttention), functional=functional
    )
    monkeypatch.setitem(sys.modules, package.__name__, package)


def _differences(starts: list[int]) -> list[int]:
    return [end - start for start, end in pairwise(starts)]

"""Whether the kernels of a device compile there and are right: asked before they are used."""

import logging

import torch
from torch import Tensor

from tessera.shard.backends.base import CacheShape, StepLayout
from tessera.shard.backends.reference import ReferenceBackend

logger = logging.getLogger(__name__)


class _Reference(ReferenceBackend):
    """As the device computes it, but for draws: some have no float64."""

    def draw(self, scores_RV: Tensor, keys_R: Tensor) -> Tensor:
        """See `Backend.draw`."""
        return super().draw(scores_RV.cpu(), keys_R.cpu())


def agrees(
    backend: ReferenceBackend,
    dtype: torch.dtype,
    tolerance: float,
    tokens: int = 40,
    cache_dtype: torch.dtype | None = None,
) -> bool:
    """Whether all operations work and give the reference's results, within `tolerance`.

    Args:
        tokens: of a prompt with 20 tokens before it; a decode row goes before them.
        cache_dtype: of keys and values; None: `dtype`.
    """
    try:
        for window in (None, 24):
            given = (dtype, cache_dtype or dtype, tokens, window)
            got = _trial(backend, *given)
            expected = _trial(_Reference(backend.device), *given)
            for ours, right in zip(got, expected, strict=True):
                if not torch.allclose(ours, right, rtol=tolerance, atol=tolerance):
                    logger.warning("kernels for %s give wrong results", backend.device)
                    return False
    except Exception:  # of a compiler, a driver, an operation that torch no longer has
        logger.warning("kernels for %s cannot be used", backend.device, exc_info=True)
        return False
    return True


def _trial(
    backend: ReferenceBackend,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    tokens: int,
    window: int | None,
) -> list[Tensor]:
    """What the operations give, in float32 on the host: [1 + tokens] tokens, 4 heads over 2."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(backend.device, dtype)

    num_blocks = -(-(tokens + 20) // 16)
    (cache,) = backend.new_cache(CacheShape(1, 2, 64, 16, cache_dtype), num_blocks + 3)
    for pool_BKPH in (cache.k_BKPH, cache.v_BKPH):
        pool_BKPH.copy_(normal(*pool_BKPH.shape))
    layout = _trial_layout(tokens, num_blocks, backend.device)
    angles_Lh = torch.arange(tokens + 20).float()[:, None] / (1 + torch.arange(32))
    cos_sin_LH = torch.cat([angles_Lh.cos(), angles_Lh.sin()], dim=-1).to(backend.device)
    x_TD, residual_TD = normal(tokens + 1, 512), normal(tokens + 1, 512)
    normed_TD, sum_TD = backend.add_rms_norm(x_TD, residual_TD, normal(512), 1e-5)
    q_TNH = backend.rotate_and_store(normed_TD, cos_sin_LH, cache, layout)
    out_TNH = backend.attend(q_TNH, cache, layout, window)
    # From numbers that all backends are given alike: an id is right or wrong, never near.
    ids_T = backend.draw(x_TD.float(), torch.arange(tokens + 1).to(backend.device))
    results = (normed_TD, sum_TD, q_TNH, out_TNH, backend.silu_mul(normed_TD), ids_T)
    return [result.float().cpu() for result in results]


def _trial_layout(tokens: int, num_blocks: int, device: torch.device) -> StepLayout:
    """A row at position 36 in the first blocks; a prompt at positions from 20 on."""
    tables_SM = torch.zeros(2, max(3, num_blocks), dtype=torch.int32)
    tables_SM[0, :3] = torch.tensor([2, 0, 1])
    tables_SM[1, :num_blocks] = torch.arange(num_blocks) + 3
    positions_T = torch.cat([torch.tensor([36]), torch.arange(20, tokens + 20)])
    rows_T = (torch.arange(tokens + 1) > 0).long()
    slots_T = tables_SM[rows_T, positions_T // 16].long() * 16 + positions_T % 16
    query_start, context_lens = (0, 1, tokens + 1), (37, tokens + 20)
    return StepLayout(
        positions_T.to(device),
        slots_T.to(device),
        torch.tensor(query_start, dtype=torch.int32, device=device),
        torch.tensor(context_lens, dtype=torch.int32, device=device),
        tables_SM.to(device),
        query_start,
        context_lens,
    )

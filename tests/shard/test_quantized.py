"""Rounding weights to few bits: how far they may be from what they were."""

import pytest
import torch

from tessera.shard.quantized import GROUP, QuantizedWeight, can_quantize, pack, quantize, stacked


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(weight_OI: torch.Tensor, bits: int) -> torch.Tensor:
    """Distances to the weight that is kept, [O, G, C]."""
    kept_OI = quantize(weight_OI, bits).dequantize(torch.float32)
    return (kept_OI - weight_OI).abs().unflatten(1, (-1, GROUP))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_moves_by_much_more_than_half_a_step(
    bits: int, shift: float, scale: float
) -> None:
    """At the ends of a group a little more: scale and zero point have 11 bits themselves."""
    weight_OI = (numbers(300, 96) + shift) * scale
    groups = weight_OI.unflatten(1, (-1, GROUP))
    steps = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    assert (error(weight_OI, bits) / steps[..., None]).max() < (0.52 if bits == 4 else 0.75)


@pytest.mark.parametrize("bits", [4, 8])
def test_errors_of_normal_weights(bits: int) -> None:
    weight_OI = numbers(256, 512)
    kept_OI = quantize(weight_OI, bits).dequantize(torch.float32)
    relative = (kept_OI - weight_OI).norm() / weight_OI.norm()
    assert relative < {4: 0.082, 8: 0.005}[bits]


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-3, -1e-7, 5e4])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_one_value(bits: int, value: float) -> None:
    """No range to divide, and zero points that half precision must still hold."""
    weight_OI = torch.full((2, 64), value)
    assert error(weight_OI, bits).max() <= max(abs(value) / 1000, 2.0**-24)


@pytest.mark.parametrize("bits", [4, 8])
def test_close_values_far_from_zero(bits: int) -> None:
    weight_OI = 2 + 1e-4 * numbers(4, 64)
    assert error(weight_OI, bits).max() < 2e-3  # a thousandth of the values


@pytest.mark.parametrize("bits", [4, 8])
def test_an_outlier_harms_its_own_group_only(bits: int) -> None:
    weight_OI = numbers(4, 128)
    before = quantize(weight_OI, bits).dequantize(torch.float32)
    weight_OI[1, 70] = 100.0
    after = quantize(weight_OI, bits).dequantize(torch.float32)
    changed = (before != after).unflatten(1, (-1, GROUP)).any(-1)
    assert changed.nonzero().tolist() == [[1, 2]]


def test_rows_are_rounded_on_their_own() -> None:
    weight_OI = numbers(300, 64)
    whole, parts = (
        quantize(weight_OI, 4),
        stacked([quantize(p, 4) for p in weight_OI.split([1, 150, 149])]),
    )
    for name in ("codes_OI", "scales_OG", "zeros_OG"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))


@pytest.mark.parametrize(("bits", "most"), [(4, 2 / 3), (8, 2 / 1.75)])
def test_bytes_that_stay(bits: int, most: float) -> None:
    """Against bfloat16: a third, and little more than half."""
    packed = pack(quantize(numbers(512, 1024), bits))
    assert packed.nbytes <= 512 * 1024 * most


def test_what_cannot_be_quantised() -> None:
    assert [n for n in (16, 32, 48, 96, 100) if can_quantize(n)] == [32, 96]


def test_integer_zero_points_are_kept_exactly() -> None:
    """What makes AWQ's and GPTQ's weights exact."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (8, 64), dtype=torch.uint8, generator=generator)
    scales = torch.rand(8, 2, generator=generator).half()
    zeros = torch.randint(0, 257, (8, 2), generator=generator)
    kept = QuantizedWeight(8, codes, scales, zeros.half()).dequantize(torch.float64)
    wide = [tensor.repeat_interleave(GROUP, dim=1) for tensor in (scales.double(), zeros)]
    assert torch.equal(kept, wide[0] * (codes.double() - wide[1]))

"""Products with weights of few bits, of every backend that runs here."""

import logging
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.backends import load_backend
from tessera.shard.backends.base import Backend
from tessera.shard.backends.cpu import CpuBackend, kernel_variants
from tessera.shard.backends.fused_attention import FusedAttentionBackend
from tessera.shard.backends.ipex_version import ipex_fits
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.quantized import GROUP, QuantizedWeight, pack, quantize

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
BITS = [4, 8]
ROWS = [0, 1, 2, 3, 4, 7, 8, 13, 64, 70]


def built_variants() -> list[str]:
    try:
        return kernel_variants()
    except OSError:
        return []


IPEX = ["ipex"] if ipex_fits("cpu") else []


@pytest.fixture(params=["reference", "fused_attention", "xpu", *built_variants(), *IPEX])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "reference":
        return ReferenceBackend(CPU)
    if request.param == "fused_attention":
        return FusedAttentionBackend(CPU)
    if request.param == "xpu":
        return cast(Backend, request.getfixturevalue("xpu_backend"))
    if request.param == "ipex":
        return load_backend("cpu", "ipex")
    return CpuBackend(CPU, request.param)


@pytest.fixture(params=built_variants())
def kernels(request: pytest.FixtureRequest) -> CpuBackend:
    return CpuBackend(CPU, request.param)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def rounded(x_TI: Tensor) -> Tensor:
    """The input in 8 bits per group, as the kernels take it."""
    groups = x_TI.float().unflatten(1, (-1, GROUP))
    top = groups.abs().amax(-1, keepdim=True)
    codes = torch.where(top > 0, groups * (127 / top), 0).round()
    return (codes * (top / 127)).flatten(1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 32), (16, 64), (40, 96), (129, 480), (700, 1024)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_against_the_dequantised_weight(
    backend: Backend, bits: int, with_bias: bool, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = quantize(numbers(*sizes), bits)
    bias_O = numbers(sizes[0], dtype=dtype) if with_bias else None
    linear = backend.quantized_linear(weight, bias_O)
    wide = weight.dequantize(torch.float64)
    for rows in ROWS:
        x_TI = numbers(rows, 2 * sizes[1], dtype=dtype)[:, ::2]  # not contiguous
        got = linear(x_TI)
        assert got.shape == (rows, sizes[0])
        assert got.dtype == dtype
        if rows > 1:  # of one small row the relative error may be anything
            expected = F.linear(x_TI.double(), wide, None if bias_O is None else bias_O.double())
            assert relative_error(got, expected) < 0.012


@pytest.mark.parametrize("bits", BITS)
def test_the_kernels_round_nothing_but_the_input(kernels: CpuBackend, bits: int) -> None:
    weight = quantize(numbers(100, 256), bits)
    x_TI = numbers(13, 256)
    got = kernels.quantized_linear(weight, None)(x_TI)
    expected = rounded(x_TI).double() @ weight.dequantize(torch.float64).T
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("bits", BITS)
def test_integer_zero_points_and_extreme_codes(kernels: CpuBackend, bits: int) -> None:
    """No product of 8-bit numbers overflows on the way."""
    top = 2**bits - 1
    codes = torch.zeros(32, 128, dtype=torch.uint8)
    codes[::2] = top
    ones = torch.ones(32, 4, dtype=torch.float16)
    weight = QuantizedWeight(bits, codes, ones, ones * 2 ** (bits - 1))
    x_TI = torch.ones(5, 128)
    x_TI[1::2] = -1
    got = kernels.quantized_linear(weight, None)(x_TI)
    expected = x_TI @ weight.dequantize(torch.float32).T
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_a_row_does_not_depend_on_the_others(
    kernels: CpuBackend, bits: int, dtype: torch.dtype
) -> None:
    linear = kernels.quantized_linear(quantize(numbers(72, 160), bits), numbers(72, dtype=dtype))
    x_TI = numbers(70, 160, dtype=dtype)
    whole = linear(x_TI)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows in (1, 3, 4, 5, 8, 12, 65):
                for first in (0, 1, 70 - rows):
                    part = linear(x_TI[first : first + rows])
                    assert torch.equal(part, whole[first : first + rows])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_stays_in_its_row(
    backend: Backend, bits: int, dtype: torch.dtype, bad: float
) -> None:
    linear = backend.quantized_linear(quantize(numbers(48, 96), bits), None)
    x_TI = numbers(11, 96, dtype=dtype)
    clean = linear(x_TI)
    x_TI[4, 50] = bad
    got = linear(x_TI)
    assert not got[4].isfinite().any()
    others = [row for row in range(11) if row != 4]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("bits", BITS)
def test_tiny_and_huge_inputs(kernels: CpuBackend, bits: int) -> None:
    weight = quantize(numbers(48, 96), bits)
    linear = kernels.quantized_linear(weight, None)
    x_TI = numbers(8, 96)
    expected = x_TI.double() @ weight.dequantize(torch.float64).T
    for scale in (1e-30, 1e30):
        assert relative_error(linear(x_TI * scale), expected * scale) < 0.012
    assert not linear(x_TI * 0).any()
    assert linear(x_TI * 1e-42).abs().max() < 1e-30  # no precision is left there


def test_four_bits_take_half_a_byte_also_where_they_are_made_floats() -> None:
    weight = quantize(numbers(64, 128), 4)
    linear = ReferenceBackend(CPU).quantized_linear(weight, None)
    assert linear.weight.codes_OI.nbytes == 64 * 128 // 2  # type: ignore[attr-defined]


def test_a_device_without_the_operations_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = FusedAttentionBackend(CPU)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            backend.quantized_linear(quantize(numbers(16, 64), 4), None)
    assert len([r for r in caplog.records if "4-bit weights for cpu" in r.message]) == 1


def test_layouts_that_contradict_are_refused(kernels: CpuBackend) -> None:
    linear = kernels.quantized_linear(quantize(numbers(16, 64), 4), None)
    with pytest.raises(RuntimeError, match="not laid out for 32 inputs and 16 outputs"):
        linear(numbers(3, 32))
    with pytest.raises(RuntimeError, match="dtype"):
        linear(numbers(3, 64).half())
    packed = pack(quantize(numbers(16, 64), 4))
    with pytest.raises(RuntimeError, match="4 or 8 bits, not 5"):
        torch.ops.tessera_cpu.quantized_linear(numbers(3, 64), packed, None, 16, 5, 0)

"""IPEX itself, in the build for processors: `make test-ipex`.

The conformance and parity tests also run over it there; here is what belongs to this backend alone.
"""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tessera.launcher.demo.evaluate import FORMATS, Server, evaluate
from tessera.shard.backends import ipex, load_backend
from tessera.shard.backends.ipex import IpexBackend
from tessera.shard.backends.ipex_linear import IpexLinear
from tessera.shard.errors import DeviceError
from tessera.shard.quantized import GROUP, QuantizedWeight, quantize
from tests.end_to_end.stack import running
from tests.shard.backends import stand_in_ipex
from tests.shard.backends.pool import Pool, assert_close

# Its product computes in bfloat16, whatever the input's dtype.
WORST = 5e-3


@pytest.fixture(scope="module")
def backend() -> IpexBackend:
    loaded = load_backend("cpu", "ipex")
    assert isinstance(loaded, IpexBackend)
    return loaded


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def with_integer_zeros(weight: QuantizedWeight) -> QuantizedWeight:
    """As AWQ and GPTQ checkpoints have them."""
    zeros_OG = weight.zeros_OG.round().clamp(0, 15)
    return QuantizedWeight(weight.bits, weight.codes_OI, weight.scales_OG, zeros_OG)


def error(backend: IpexBackend, weight: QuantizedWeight, dtype: torch.dtype, rows: int) -> float:
    """Of the product, relative; it must be IPEX's own."""
    bias_O, x_TI = numbers(weight.shape[0]).to(dtype), numbers(rows, weight.shape[1]).to(dtype)
    linear = backend.quantized_linear(weight, bias_O)
    assert isinstance(linear, IpexLinear)
    got = linear(x_TI)
    assert got.dtype == dtype
    expected = x_TI.double() @ weight.dequantize(torch.float64).T + bias_O.double()
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(32, 64), (96, 160), (1024, 512)])
def test_4_bit_weights_rounded_while_loading(
    backend: IpexBackend, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = quantize(numbers(*sizes), 4)
    for rows in (1, 5, 64):
        assert error(backend, weight, dtype, rows) < WORST


def test_4_bit_weights_of_checkpoints(backend: IpexBackend) -> None:
    weight = with_integer_zeros(quantize(numbers(64, 128), 4))
    assert error(backend, weight, torch.bfloat16, 7) < WORST
    linear = backend.quantized_linear(weight, None)
    assert isinstance(linear, IpexLinear) and linear._rest_OG is None  # nothing to add


def test_zero_points_that_no_4_bits_hold(backend: IpexBackend) -> None:
    weight = quantize(numbers(64, 128) + 50, 4)
    assert bool((weight.zeros_OG < -15).any())
    assert error(backend, weight, torch.bfloat16, 7) < WORST


@pytest.mark.parametrize(("sizes", "bits"), [((40, 64), 4), ((64, GROUP), 4), ((64, 64), 8)])
def test_weights_that_it_would_get_wrong_are_not_given_to_it(
    backend: IpexBackend, sizes: tuple[int, int], bits: int
) -> None:
    linear = backend.quantized_linear(quantize(numbers(*sizes), bits), None)
    assert not isinstance(linear, IpexLinear)


@pytest.mark.parametrize("window", [None, 1, 20])
def test_float16(backend: IpexBackend, window: int | None) -> None:
    pool = Pool([60, 9], (4, 2, 64), torch.float16)
    for parts in ([(0, 0, 59), (1, 0, 8)], [(0, 59, 60), (1, 8, 9)]):
        for part, got in zip(parts, pool.step(backend, parts, window), strict=True):
            assert_close(got, pool.expected(*part, window))


@pytest.mark.parametrize(
    ("place", "stand_in"),
    [
        ("_functions", stand_in_ipex.rms_norm),
        ("_functions", stand_in_ipex.rotary_embedding),
        ("_pages", stand_in_ipex.PagedAttention.reshape_and_cache_flash),
        ("_pages", stand_in_ipex.PagedAttention.flash_attn_varlen_func),
    ],
)
def test_the_stand_in_for_gpus_has_the_real_signatures(
    backend: IpexBackend, place: str, stand_in: Callable[..., object]
) -> None:
    real = getattr(getattr(backend, place), stand_in.__name__)
    ours, theirs = (inspect.signature(f).parameters.values() for f in (stand_in, real))
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_functions_that_give_wrong_results_are_not_used(
    backend: IpexBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend._pages, "flash_attn_varlen_func", lambda out, *_, **__: out.zero_())
    assert ipex.working_backend(torch.device("cpu")) is None
    with pytest.raises(DeviceError, match=r"its functions do not work on cpu.*set BACKEND=auto"):
        load_backend("cpu", "ipex")


@pytest.mark.timeout(300)
def test_a_server_answers_questions_about_pictures() -> None:
    with running(None, "--device", "cpu", "--backend", "ipex", "--num-shard", "2") as stack:
        results = [
            r.right for r in evaluate(Server(stack.url), 7, 8, FORMATS[:1]) if r.kind == "color"
        ]
    assert sum(results) > 0.8 * len(results)

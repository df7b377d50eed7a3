"""Linear layers in bfloat16 by the CPU kernels, where this processor has instructions for them."""

import pytest
import torch
from torch import Tensor

from tessera.shard.backends.build import library_path
from tessera.shard.backends.cpu import kernel_variants
from tessera.shard.backends.huge_pages import CHUNK_BYTES, HugePages
from tessera.shard.backends.paired_linear import PairedLinear

if not library_path().exists():
    pytest.skip("CPU kernels are not built", allow_module_level=True)
VARIANTS = kernel_variants()


def numbers(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).bfloat16()


def made(weight_OI: Tensor, bias_O: Tensor | None = None) -> PairedLinear:
    if VARIANTS[0] != "avx512_bf16":
        pytest.skip("this processor does not multiply bfloat16")
    return PairedLinear(weight_OI, bias_O, 0, HugePages())


@pytest.mark.parametrize(("out", "width"), [(64, 2), (1, 4), (130, 1030), (200, 64)])
def test_every_number_is_in_its_place(out: int, width: int) -> None:
    weight_OI = numbers(out, width)
    packed = made(weight_OI).packed
    assert packed.shape == (-(-out // 64), width // 2, 64, 2)
    back_OI = packed.permute(0, 2, 1, 3).reshape(-1, width)
    assert back_OI[:out].equal(weight_OI) and not back_OI[out:].any()


@pytest.mark.parametrize("rows", [1, 6, 7, 12, 13, 64, 65, 150])
@pytest.mark.parametrize(("out", "width"), [(96, 1030), (300, 64)])
def test_against_dense_arithmetic(out: int, width: int, rows: int) -> None:
    weight_OI, bias_O, x_TI = numbers(out, width), numbers(out), numbers(rows, width)
    expected = x_TI.double() @ weight_OI.double().T + bias_O.double()
    got = made(weight_OI, bias_O)(x_TI)
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_row_does_not_depend_on_the_others_or_on_threads() -> None:
    linear, x_TI = made(numbers(500, 1500), numbers(500)), numbers(140, 1500)
    whole = linear(x_TI)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for first, last in ((0, 1), (3, 10), (5, 17), (60, 140), (0, 140)):
                assert linear(x_TI[first:last]).equal(whole[first:last])
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_in_its_row() -> None:
    x_TI = numbers(20, 64)
    x_TI[4, 7] = float("nan")
    got = made(numbers(70, 64))(x_TI)
    assert got.isnan().any(-1).nonzero().flatten().tolist() == [4]


def test_layouts_that_contradict_are_refused() -> None:
    linear = made(numbers(64, 32))
    with pytest.raises(RuntimeError, match="not laid out for 16 inputs"):
        linear(numbers(1, 16))
    with pytest.raises(RuntimeError, match="BFloat16"):
        linear(numbers(1, 32).float())


def test_small_tensors_share_large_pages() -> None:
    memory = HugePages()
    first, second = memory.empty((3, 5), torch.bfloat16), memory.empty((7,), torch.float32)
    assert second.data_ptr() - first.data_ptr() == 64
    first.fill_(1), second.fill_(2)
    assert first.sum() == 15 and second.sum() == 14
    huge = memory.empty((CHUNK_BYTES + 2,), torch.uint8)
    assert huge.numel() == CHUNK_BYTES + 2
    assert memory.empty((1,), torch.uint8).data_ptr() - second.data_ptr() == 64

"""torch's product with 4-bit weights, without a GPU: its two operations are played here."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.backends import int4_linear
from tessera.shard.backends.int4_linear import FEW_ROWS, Int4Linear, int4_works, unpacked
from tessera.shard.quantized import GROUP, quantize

CPU = torch.device("cpu")


def packed_as_torch_does(pairs: Tensor, tiles: int) -> Tensor:
    """Lane by lane, as in torch's `matrix_to_m16n8k16_Bint4_layout`.

    A lane has four bytes of one row, four apart; the high halves of all come before the low ones.
    """
    rows, num_bytes = pairs.shape
    packed = torch.zeros(rows // 8, num_bytes // (8 * tiles), 32, tiles // 2, dtype=torch.int64)
    for block, part, lane, word in torch.cartesian_prod(*map(torch.arange, packed.shape)).tolist():
        first = 8 * (part * tiles + 2 * word) + lane % 4
        taken = pairs[8 * block + lane // 4, first : first + 13 : 4].tolist()
        halves = [byte >> 4 for byte in taken] + [byte & 15 for byte in taken]
        packed[block, part, lane, word] = sum(half << 4 * n for n, half in enumerate(halves))
    return packed.to(torch.int32)


class Played:
    """The operations, and how many rows the product was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.tiles: list[int] = []

    def _convert_weight_to_int4pack(self, pairs: Tensor, tiles: int) -> Tensor:
        assert pairs.dtype == torch.uint8 and pairs.is_contiguous()
        self.tiles.append(tiles)
        self.pairs = pairs
        return packed_as_torch_does(pairs, tiles)

    def _weight_int4pack_mm(
        self, x_TI: Tensor, packed: Tensor, group: int, of_groups_GO2: Tensor
    ) -> Tensor:
        assert x_TI.dtype == of_groups_GO2.dtype == torch.bfloat16
        assert x_TI.is_contiguous() and of_groups_GO2.is_contiguous() and x_TI.shape[0] > 0
        self.asked.append(x_TI.shape[0])
        codes_OI = torch.stack((self.pairs >> 4, self.pairs & 15), dim=-1).flatten(1).float()
        scales_OI, offsets_OI = of_groups_GO2.float().repeat_interleave(group, 0).unbind(-1)
        return F.linear(x_TI, ((codes_OI - 8) * scales_OI.T + offsets_OI.T).bfloat16())


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    played = Played()
    for name in ("_convert_weight_to_int4pack", "_weight_int4pack_mm"):
        monkeypatch.setattr(torch.ops.aten, name, getattr(played, name))
    return played


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_the_layout_is_read_as_torch_writes_it(tiles: int) -> None:
    codes_OI = torch.randint(
        0, 16, (24, 3 * 16 * tiles), generator=torch.Generator().manual_seed(0)
    )
    pairs = ((codes_OI[:, ::2] << 4) | codes_OI[:, 1::2]).to(torch.uint8)
    packed = packed_as_torch_does(pairs, tiles)
    on_gpus = torch.ops.aten._convert_weight_to_int4pack(pairs.to("meta"), tiles)
    assert (packed.shape, packed.dtype) == (on_gpus.shape, on_gpus.dtype)
    assert torch.equal(unpacked(packed), (codes_OI - 8).to(torch.int8))


@pytest.mark.parametrize(("columns", "tiles"), [(32, 2), (192, 4), (256, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_few_rows_and_many_are_multiplied_alike(
    played: Played, columns: int, tiles: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(16, columns, generator=generator), 4)
    bias_O = torch.randn(16, generator=generator).to(dtype)
    linear = Int4Linear(weight, bias_O)
    x_TI = torch.randn(FEW_ROWS + 1, columns, generator=generator).to(dtype)
    many, few = linear(x_TI), linear(x_TI[:FEW_ROWS])
    assert played.tiles == [tiles] and played.asked == [FEW_ROWS]
    assert many.dtype == few.dtype == dtype
    torch.testing.assert_close(many[:FEW_ROWS], few, rtol=2e-2, atol=2e-2)
    expected = F.linear(x_TI.float(), weight.dequantize(torch.float32), bias_O.float())
    torch.testing.assert_close(many.float(), expected, rtol=5e-2, atol=0.3)


def test_no_rows_are_not_launched(played: Played) -> None:
    linear = Int4Linear(quantize(torch.randn(8, GROUP), 4), None)
    assert linear(torch.zeros(0, GROUP)).shape == (0, 8)
    assert not played.asked


def test_the_trial_finds_what_is_wrong(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    assert int4_works(CPU)
    assert played.asked == [3]
    monkeypatch.setattr(int4_linear, "unpacked", lambda packed: unpacked(packed).flip(1))
    assert not int4_works(CPU)


def test_a_device_without_the_operations_is_known() -> None:
    assert not int4_works(CPU)

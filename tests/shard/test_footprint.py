"""What a footprint says of a model is what the loaded model holds."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tessera.launcher.model_folder import DEMO_FOLDER
from tessera.shard.backends import load_backend
from tessera.shard.backends.base import Backend, Linear
from tessera.shard.backends.packed_linear import PackedLinear
from tessera.shard.backends.paired_linear import PairedLinear
from tessera.shard.errors import CheckpointError
from tessera.shard.footprint import footprint
from tessera.shard.layers.base import Layer
from tessera.shard.models import load_model
from tessera.shard.models.base import Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.models.dtype import resolve_dtype
from tessera.shard.parallel import Group
from tessera.shard.quantization_names import quantization
from tessera.shard.quantized import QuantizedWeight, pack
from tests import checkpoints


class Weighing:
    """Passes everything on to a backend and weighs what that keeps."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._kept: list[object] = []  # so that no address is used twice
        self.sizes: dict[int, int] = {}  # by address

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        made = self._backend.linear(weight_OI, bias_O)
        if isinstance(made, PackedLinear | PairedLinear):  # a copy of the same size
            self._kept.append(made)
            self.sizes[id(made)] = weight_OI.nbytes
        else:
            self.add(weight_OI)
        self.add(bias_O)
        return made

    def quantized_linear(self, weight: QuantizedWeight, bias_O: Tensor | None) -> Linear:
        self.add(pack(weight))
        self.add(bias_O)
        return self._backend.quantized_linear(weight, bias_O)

    def add(self, tensor: object) -> None:
        if isinstance(tensor, Tensor):
            self._kept.append(tensor)
            self.sizes[tensor.data_ptr()] = tensor.nbytes


def weighed(folder: Path, rank: int, ranks: int, device: str, quantize: str) -> int:
    """Bytes of weights that one rank holds; a GPU keeps them as the reference does."""
    scales = Weighing(load_backend("cpu", "auto" if device == "cpu" else "reference"))
    dtype = resolve_dtype("auto", read_config(folder), device)
    placement = Placement(
        scales,  # type: ignore[arg-type]
        Group(rank, ranks),
        dtype,
        quantization(quantize),
    )
    model = load_model(folder, placement)
    assert isinstance(model, Layer)
    for layer in model.layers():
        for name in layer.parameters:
            scales.add(getattr(layer, name, None))
    return sum(scales.sizes.values())


@pytest.mark.parametrize("kind", checkpoints.KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_are_those_of_the_fullest_rank(
    checkpoint: Callable[[str], Path], kind: str, ranks: int, device: str
) -> None:
    folder = checkpoint(kind)
    loaded = [weighed(folder, rank, ranks, device, "") for rank in range(ranks)]
    assert footprint(folder, ranks, device).weights == max(loaded)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_quantised_weights(checkpoint: Callable[[str], Path], quantize: str, device: str) -> None:
    folder = checkpoint("next-mistral")
    told = footprint(folder, 1, device, quantize=quantize)
    assert told.weights == weighed(folder, 0, 1, device, quantize)
    assert told.weights < footprint(folder, 1, device).weights


@pytest.mark.parametrize("quantize", ["", "int4"])
def test_the_demo_model(quantize: str) -> None:
    told = footprint(DEMO_FOLDER, 1, "cpu", quantize=quantize)
    assert told.weights == weighed(DEMO_FOLDER, 0, 1, "cpu", quantize)


def test_the_cache_and_the_numbers_of_a_model(checkpoint: Callable[[str], Path]) -> None:
    """3 layers, 2 kv heads of 32 in bfloat16; half of it on each of two ranks."""
    folder = checkpoint("next-mistral")
    one, two = (footprint(folder, ranks, "cpu") for ranks in (1, 2))
    assert one.kv_token == 2 * 3 * 2 * 32 * 2 == 2 * two.kv_token
    assert (one.model_type, one.dtype, one.max_positions) == ("llava_next", "bfloat16", 4096)
    assert footprint(folder, 1, "cuda").dtype == "float16"  # as config.json says
    assert one.parameters == two.parameters
    assert one.picture_tokens > 0 == footprint(checkpoint("llama"), 1, "cpu").picture_tokens


def test_only_json_is_read(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    whole = checkpoint("next-vicuna")
    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    assert footprint(tmp_path, 1, "cpu") == footprint(whole, 1, "cpu")


def test_what_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match=r"'bert' in config\.json is not supported"):
        footprint(tmp_path, 1, "cpu")
    done = run(str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: model_type='bert'") and done.stderr.count("\n") == 1


def test_as_a_program() -> None:
    done = run(str(DEMO_FOLDER), "--ranks", "1", "2", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    assert [found["world_size"] for found in json.loads(done.stdout)] == [1, 2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tessera.shard.footprint", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_a_cache_in_8_bits(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("next-mistral")
    wide, few = (
        footprint(folder, 1, "cpu", "bfloat16", kv_cache_dtype=kept).kv_token
        for kept in ("auto", "fp8_e5m2")
    )
    assert wide == 2 * few > 0

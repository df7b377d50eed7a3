"""Checkpoints that are not as they should be are refused in one line that names what is wrong."""

import json
import re
import shlex
import struct
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from tessera.shard.backends.base import Linear
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.errors import CheckpointError
from tessera.shard.layers.base import Source
from tessera.shard.models import load_model
from tessera.shard.models.base import Placement
from tessera.shard.parallel import Group
from tessera.shard.weights import Checkpoint, canonical_name
from tests import checkpoints
from tests.shard.models.driver import Runner, placement

Array = checkpoints.Array
Tensors = dict[str, Array]
Q_PROJ = "language_model.model.layers.1.self_attn.q_proj.weight"


def rewrite(folder: Path, change: Callable[[Tensors], object], num_files: int = 2) -> Path:
    """`folder` with other tensors."""
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    checkpoints.write_tensors(folder, tensors, num_files)
    return folder


def refusal(folder: Path) -> str:
    """The message a folder is refused with."""
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, placement())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.make("next-mistral", tmp_path / "model")


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(Q_PROJ))
    assert "has no tensor layers.1.self_attn.q_proj.weight" in refusal(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    def drop(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.2." in name and "language" in name]:
            del tensors[name]

    assert re.search(
        r"has no tensor (layers\.2\.\S+, ){2}layers\.2\.\S+ and 6 more$",
        refusal(rewrite(folder, drop)),
    )


def test_missing_head_of_an_untied_model(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("language_model.lm_head.weight"))
    assert "lm_head.weight" in refusal(folder)


def test_unexpected_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"resampler.weight": np.zeros(3, np.float16)}))
    assert "a tensor this model has not: resampler.weight" in refusal(folder)


def test_one_layer_too_many(folder: Path) -> None:
    """config.json of a smaller model would else be served with half of the weights."""
    config = checkpoints.merged(
        checkpoints.model_config("next-mistral"), {"text_config": {"num_hidden_layers": 2}}
    )
    checkpoints.write_json(folder / "config.json", config)
    assert "language_model.model.layers.2." in refusal(folder)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64), (128,), (128, 128, 1)])
def test_mis_shaped_tensor(folder: Path, shape: tuple[int, ...]) -> None:
    rewrite(folder, lambda tensors: tensors.update({Q_PROJ: np.zeros(shape, np.float16)}))
    message = refusal(folder)
    assert message.startswith(Q_PROJ)
    assert f"{list(shape)}" in message
    assert "[128, 128]" in message


def test_quantised_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({Q_PROJ: np.zeros((128, 128), np.int8)}))
    assert re.search(
        rf"{re.escape(Q_PROJ)} has dtype I8; only BF16, F16, F32, F64 can", refusal(folder)
    )


def test_one_tensor_under_two_names(folder: Path) -> None:
    copy = Q_PROJ.replace("language_model.model.", "model.language_model.")
    rewrite(folder, lambda tensors: tensors.update({copy: tensors[Q_PROJ]}))
    message = refusal(folder)
    assert Q_PROJ in message
    assert copy in message


def test_tensors_that_mean_nothing_are_ignored(
    folder: Path, oracle_free_logits: Callable[[Path], Tensor]
) -> None:
    """Old files carry buffers; a vision layer that is not run may be there or not."""
    before = oracle_free_logits(folder)

    def change(tensors: Tensors) -> None:
        inv_freq = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
        tensors[inv_freq] = np.ones(16, np.float32)
        ids = "vision_tower.vision_model.embeddings.position_ids"
        tensors[ids] = np.arange(17, dtype=np.int64)[None]
        for name in [n for n in tensors if "post_layernorm" in n or "encoder.layers.2.mlp" in n]:
            del tensors[name]

    assert torch.equal(oracle_free_logits(rewrite(folder, change)), before)


def test_a_tied_model_ignores_a_stored_head(
    tmp_path: Path, oracle_free_logits: Callable[[Path], Tensor]
) -> None:
    folder = checkpoints.make("llama", tmp_path / "tied", {"tie_word_embeddings": True})
    before = oracle_free_logits(folder)
    head = {"lm_head.weight": np.ones((640, 128), np.float16)}
    assert torch.equal(oracle_free_logits(rewrite(folder, lambda t: t.update(head))), before)


@pytest.fixture
def oracle_free_logits() -> Callable[[Path], Tensor]:
    """Our logits of a fixed text, for comparing two folders."""
    from tests.shard.models.driver import Prompt

    return lambda folder: Runner(folder, placement()).logits(Prompt([1, 30, 40, 50, 60]))


def test_index_lists_an_absent_file(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refusal(folder)
    assert "index.json lists model-00002-of-00002.safetensors, which is not in" in message


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": ["b"]}}',
    ],
)
def test_unusable_index(folder: Path, index: str) -> None:
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(folder)


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


ENTRY = {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"<html>not found</html>" * 100,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        header(a=ENTRY),
        header(a=ENTRY) + bytes(4),
        header(a=ENTRY) + bytes(9),
        header(a={**ENTRY, "dtype": "F17"}) + bytes(8),
        header(a={**ENTRY, "shape": [5]}) + bytes(8),
        header(a={**ENTRY, "data_offsets": [8, 0]}) + bytes(8),
    ],
    ids=[
        "empty",
        "short",
        "html",
        "huge header",
        "no object",
        "no data",
        "cut off",
        "trailing",
        "dtype",
        "shape",
        "offsets",
    ],
)
def test_damaged_file(folder: Path, content: bytes) -> None:
    name = "model-00002-of-00002.safetensors"
    (folder / name).write_bytes(content)
    assert refusal(folder).startswith(f"{name} is damaged: ")


def test_truncated_file(folder: Path) -> None:
    """The usual damage: a download that stopped."""
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(folder).startswith(f"{path.name} is damaged: ")


def test_a_folder_instead_of_a_file(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.unlink()
    path.mkdir()
    assert path.name in refusal(folder)


def test_no_weights_at_all(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    assert refusal(folder).endswith("has no *.safetensors file")


def test_pickled_weights_are_refused_with_a_command_that_works(tmp_path: Path) -> None:
    folder = checkpoints.make("llama", tmp_path / "pickled")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "AutoModelForCausalLM" in message
    words = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True)
    load_model(folder, placement())


def test_pickled_pictures_models_name_their_class(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    assert "AutoModelForImageTextToText" in refusal(folder)


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    folder = checkpoints.make("llama", tmp_path / "named")
    (folder / "model.safetensors").rename(folder / "llama-tiny.safetensors")
    load_model(folder, placement())


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("language_model.model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("language_model.model.embed_tokens.weight", "embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("image_newline", "image_newline"),
        ("model.image_newline", "image_newline"),
        ("multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("something.else", "something.else"),
    ],
)
def test_names_of_all_generations(name: str, canonical: str) -> None:
    assert canonical_name(name) == canonical


def test_ranks_read_only_their_part(folder: Path) -> None:
    """The parts of two ranks together are the tensor, along rows and along columns."""
    name = "layers.0.mlp.down_proj.weight"
    with Checkpoint(folder) as checkpoint:
        shape = checkpoint.shapes[name]
        whole = checkpoint.read(Source(name, shape))
        for dim in (0, 1):
            half = shape[dim] // 2
            spans = ((0, half), (half, shape[dim]))
            parts = [checkpoint.read(Source(name, shape, dim, span)) for span in spans]
            assert torch.equal(torch.cat(parts, dim=dim), whole)


class CountingBackend(ReferenceBackend):
    """Lays out weights as a device would, by a copy, and watches the originals."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.originals: list[weakref.ref[Tensor]] = []
        self.most_alive = 0
        self.dtypes: set[torch.dtype] = set()

    def linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        self.originals.append(weakref.ref(weight_OI))
        self.dtypes.add(weight_OI.dtype)
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.originals))
        return super().linear(weight_OI.clone(), bias_O)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_more_than_one_weight_exists_twice(folder: Path, dtype: torch.dtype) -> None:
    backend = CountingBackend()
    load_model(folder, Placement(backend, Group(), dtype))
    # 3 decoder layers of 4, 2 vision layers of 4, 2 in the projector, the head.
    assert len(backend.originals) == 3 * 4 + 2 * 4 + 2 + 1
    assert backend.most_alive == 1
    assert backend.dtypes == {dtype}

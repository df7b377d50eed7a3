import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.proto.image_layout import AnyResLayout, CropLayout
from tessera.router.model_files import ModelFiles, ModelFilesError
from tests import checkpoints

Checkpoint = Callable[[str], Path]


def folder_with(path: Path, **files: Any) -> Path:
    """A model folder of JSON files; names without their ending."""
    path.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


def llava(**changes: Any) -> dict[str, Any]:
    return checkpoints.merged(checkpoints.model_config("next-mistral"), changes)


def test_vision_model(checkpoint: Checkpoint) -> None:
    files = ModelFiles.read(checkpoint("next-mistral"))
    assert files.model_type == "llava_next"
    assert isinstance(files.layout, AnyResLayout) and files.layout.tile == 56
    assert (files.image_token_id, files.image_token) == (600, "<image>")
    assert (files.max_positions, files.vocab_size) == (4096, 640)
    assert files.eos_ids == {2}
    assert files.pipeline_tag == "image-text-to-text"
    assert files.config["image_token_index"] == 600
    assert files.sha is None


@pytest.mark.parametrize(
    ("kind", "eos", "image", "positions"),
    [
        ("next-yi", {7}, 600, 4096),
        ("next-custom", {2}, 500, 2048),
        ("llava15", {2}, 600, 4096),
        ("llama", {2}, None, 2048),
        ("mistral", {2}, None, 4096),
    ],
)
def test_other_models(
    checkpoint: Checkpoint, kind: str, eos: set[int], image: int | None, positions: int
) -> None:
    files = ModelFiles.read(checkpoint(kind))
    assert files.eos_ids == eos
    assert files.image_token_id == image
    assert files.max_positions == positions
    assert (files.pipeline_tag == "text-generation") == (image is None) == (files.layout is None)


def test_crop_layout(checkpoint: Checkpoint) -> None:
    assert ModelFiles.read(checkpoint("llava15")).layout == CropLayout(56, 14)


@pytest.mark.parametrize(
    ("text", "positions", "vocab"),
    [
        ({"model_type": "mistral"}, 131_072, 32_000),
        ({"model_type": "llama"}, 2048, 32_000),
        ({}, 2048, 32_000),
        ({"max_position_embeddings": 77, "vocab_size": 99}, 77, 99),
    ],
)
def test_absent_keys_mean_the_defaults_of_transformers(
    tmp_path: Path, text: dict[str, Any], positions: int, vocab: int
) -> None:
    folder = folder_with(tmp_path, config={"model_type": "llava", "text_config": text})
    files = ModelFiles.read(folder)
    assert (files.max_positions, files.vocab_size) == (positions, vocab)
    assert files.image_token_id == 32_000


@pytest.mark.parametrize(
    ("generation", "top", "text", "ids"),
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 5}, {}, {2, 7}),
        ({"eos_token_id": 3}, {}, {}, {3}),
        ({}, {"eos_token_id": 5}, {"eos_token_id": 6}, {5}),
        ({}, {}, {"eos_token_id": 6}, {6}),
        ({"eos_token_id": None}, {}, {}, set()),
        (None, {}, {}, set()),
    ],
)
def test_end_tokens(
    tmp_path: Path,
    generation: dict[str, Any] | None,
    top: dict[str, Any],
    text: dict[str, Any],
    ids: set[int],
) -> None:
    folder = folder_with(tmp_path, config={"model_type": "llava", "text_config": text, **top})
    if generation is not None:
        folder_with(tmp_path, generation_config=generation)
    assert ModelFiles.read(folder).eos_ids == ids


@pytest.mark.parametrize(
    ("files", "token"),
    [
        ({}, "<image>"),
        ({"processor_config": {"image_token": "<img>"}}, "<img>"),
        ({"processor_config": {"image_token": {"content": "<img>"}}}, "<img>"),
        ({"tokenizer_config": {"image_token": "<pic>"}}, "<pic>"),
        ({"tokenizer_config": {"extra_special_tokens": {"image_token": "<pic>"}}}, "<pic>"),
    ],
)
def test_image_token(tmp_path: Path, files: dict[str, Any], token: str) -> None:
    folder = folder_with(tmp_path, config=llava(), **files)
    assert ModelFiles.read(folder).image_token == token


def test_newer_name_of_the_image_token_id(tmp_path: Path) -> None:
    config = llava(image_token_id=640)
    del config["image_token_index"]
    assert ModelFiles.read(folder_with(tmp_path, config=config)).image_token_id == 640


def test_snapshot_names_its_commit(tmp_path: Path) -> None:
    sha = "0123456789abcdef0123456789abcdef01234567"
    folder = folder_with(tmp_path / "models--a--b" / "snapshots" / sha, config=llava())
    assert ModelFiles.read(folder).sha == sha
    other = folder_with(tmp_path / "snapshots" / "main", config=llava())
    assert ModelFiles.read(other).sha is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no model_type"),
        ({"model_type": 3}, "names no model_type"),
        (llava(image_grid_pinpoints=[[1, 2, 3]]), "image_grid_pinpoints"),
        (llava(vision_config={"image_size": 57}), "image_size=57"),
        (llava(vision_config={"image_size": "large"}), "config.json"),
        (llava(vision_feature_select_strategy="some"), "vision_feature_select_strategy"),
        (llava(image_token_index="x"), "image_token_index='x'"),
        (llava(image_token_index=-1), "image_token_index=-1"),
        (llava(text_config={"vocab_size": 0}), "vocab_size=0"),
        (llava(text_config={"max_position_embeddings": "many"}), "max_position_embeddings"),
        (llava(eos_token_id="</s>"), "eos_token_id='</s>'"),
    ],
)
def test_unusable_values_are_named(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFilesError, match=message):
        ModelFiles.read(folder_with(tmp_path, config=config))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[]", "must hold a JSON object, not a list"),
        (None, "is missing"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelFilesError, match=rf"config\.json {message}"):
        ModelFiles.read(tmp_path)


def test_damaged_optional_file_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, config=llava())
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelFilesError, match="generation_config"):
        ModelFiles.read(folder)

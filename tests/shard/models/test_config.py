"""Configurations mean what transformers takes them for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.shard.errors import CheckpointError, DeviceError
from tessera.shard.models import load_model
from tessera.shard.models.config import (
    CLIP_DEFAULTS,
    CLIP_L14_336,
    LlavaConfig,
    TextConfig,
    VisionConfig,
)
from tessera.shard.models.config_file import read_config
from tessera.shard.models.dtype import resolve_dtype
from tessera.shard.models.llama import LLAMA_DEFAULTS
from tessera.shard.models.mistral import MISTRAL_DEFAULTS
from tessera.shard.models.registry import model_types
from tests import checkpoints
from tests.shard.models.driver import placement


def test_text_defaults_are_those_of_transformers() -> None:
    from transformers import LlamaConfig, MistralConfig

    theirs: Any
    for defaults, theirs in ((LLAMA_DEFAULTS, LlamaConfig()), (MISTRAL_DEFAULTS, MistralConfig())):
        for key, value in defaults.items():
            if value is not None:
                assert value == getattr(theirs, key), key
        parsed = TextConfig.from_dict({}, defaults)
        assert parsed.num_kv_heads == theirs.num_key_value_heads
        assert parsed.head_size == theirs.head_dim
        assert parsed.rotary.theta == theirs.rope_parameters["rope_theta"]


def test_vision_defaults_are_those_of_transformers() -> None:
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaNextConfig

    alone = CLIPVisionConfig()
    assert {key: getattr(alone, key) for key in CLIP_DEFAULTS} == CLIP_DEFAULTS
    for owner in (LlavaConfig(), LlavaNextConfig()):
        absent = {key: getattr(owner.vision_config, key) for key in CLIP_L14_336}
        assert absent == CLIP_L14_336


def test_llava_defaults_are_those_of_transformers() -> None:
    from transformers import LlavaNextConfig

    theirs: Any = LlavaNextConfig()
    parsed = LlavaConfig.from_dict({"model_type": "llava_next"})
    assert parsed.feature_layers == (theirs.vision_config.num_hidden_layers - 1,)
    assert parsed.projector_act == theirs.projector_hidden_act
    assert parsed.projector_bias == theirs.multimodal_projector_bias
    assert parsed.text["model_type"] == theirs.text_config.model_type


def test_a_null_window_is_none_and_an_absent_one_the_default() -> None:
    assert TextConfig.from_dict({}, MISTRAL_DEFAULTS).window == 4096
    assert TextConfig.from_dict({"sliding_window": None}, MISTRAL_DEFAULTS).window is None
    assert TextConfig.from_dict({"sliding_window": 99}, LLAMA_DEFAULTS).window is None


@pytest.mark.parametrize(
    ("layers", "expected"), [(-2, (2,)), (-1, (3,)), (0, (0,)), ([-4, 3], (0, 3)), ([1], (1,))]
)
def test_feature_layers(layers: Any, expected: tuple[int, ...]) -> None:
    config = {"model_type": "llava", "vision_config": checkpoints.VISION}
    parsed = LlavaConfig.from_dict({**config, "vision_feature_layer": layers})
    assert parsed.feature_layers == expected


@pytest.mark.parametrize("layers", [4, -5, [], [0, 9], "-2", None, 1.0])
def test_feature_layers_that_do_not_exist(layers: Any) -> None:
    config = {"model_type": "llava", "vision_config": checkpoints.VISION}
    with pytest.raises(CheckpointError, match=r"vision_feature_layer.*between -4 and 3"):
        LlavaConfig.from_dict({**config, "vision_feature_layer": layers})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 130}, "hidden_size=130 is not a multiple"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"head_dim": 33}, "head size 33"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"hidden_act": "softmax"}, "hidden_act='softmax'"),
        ({"rope_scaling": {"type": "su"}}, "rope type 'su'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\)"),
        ({"quantization_config": "fp8"}, r"quantization_config \(fp8\)"),
        ({"model_type": "gpt2"}, "supported are llama, llava, llava_next, mistral$"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": "registry"}, "model_type='registry'"),
        ({"model_type": "clip"}, "model_type='clip'"),
        ({"model_type": "../llama"}, "model_type='../llama'"),
        ({"model_type": ["llama"]}, "model_type"),
    ],
)
def test_unusable_text_configurations_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = checkpoints.model_config("llama") | changes
    checkpoints.write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, placement())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip_vision_model"),
        ({"vision_config": {"num_channels": 1}}, "num_channels=1"),
        ({"vision_config": {"hidden_size": 65}}, "vision_config.hidden_size=65"),
        ({"vision_config": {"hidden_act": "nope"}}, "vision_config.hidden_act='nope'"),
        ({"vision_config": {"image_size": 57}}, "image_size=57"),
        ({"projector_hidden_act": "nope"}, "projector_hidden_act='nope'"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"text_config": "llama"}, "text_config='llama'"),
        ({"text_config": {"model_type": "gemma"}}, "text_config.model_type='gemma'"),
        ({"image_grid_pinpoints": [[57, 56]]}, "image_grid_pinpoints"),
    ],
)
def test_unusable_picture_configurations_are_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = checkpoints.merged(checkpoints.model_config("next-vicuna"), changes)
    checkpoints.write_json(tmp_path / "config.json", config)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, placement())


def test_a_folder_without_a_readable_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json holds list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


def test_every_model_file_is_listed() -> None:
    assert model_types() == ["llama", "llava", "llava_next", "mistral"]


def test_vision_sizes_that_are_absent() -> None:
    assert VisionConfig.from_dict(None) == VisionConfig.from_dict({})
    assert VisionConfig.from_dict(None).num_layers == 24
    assert VisionConfig.from_dict({"image_size": 64}).num_layers == 12


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        ({"torch_dtype": "float16"}, "cpu", torch.bfloat16),
        ({"torch_dtype": "float16"}, "cuda", torch.float16),
        ({"torch_dtype": "float16"}, "xpu", torch.float16),
        ({"torch_dtype": "bfloat16"}, "cpu", torch.bfloat16),
        ({"dtype": "bfloat16"}, "cuda", torch.bfloat16),
        ({"dtype": "float32"}, "cpu", torch.float32),
        ({"torch_dtype": "torch.bfloat16"}, "cpu", torch.bfloat16),
        ({}, "cpu", torch.float32),
        ({"torch_dtype": None, "text_config": None}, "cpu", torch.float32),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "cuda", torch.bfloat16),
        ({"text_config": {"dtype": "bfloat16"}, "dtype": "float16"}, "cuda", torch.float16),
    ],
)
def test_dtype_auto(config: dict[str, Any], device: str, expected: torch.dtype) -> None:
    assert resolve_dtype("auto", config, device) is expected


def test_dtype_asked_for() -> None:
    config = json.loads('{"torch_dtype": "float16"}')
    assert resolve_dtype("float32", config, "cpu") is torch.float32
    assert resolve_dtype("bfloat16", config, "cuda") is torch.bfloat16
    assert resolve_dtype("float16", {}, "cuda") is torch.float16
    with pytest.raises(DeviceError, match="use bfloat16, float32 or auto as DTYPE"):
        resolve_dtype("float16", config, "cpu")
    with pytest.raises(DeviceError, match="'int8' is not known"):
        resolve_dtype("int8", config, "cpu")
    with pytest.raises(CheckpointError, match="float8_e4m3fn"):
        resolve_dtype("auto", {"dtype": "float8_e4m3fn"}, "cuda")


def test_a_text_model_takes_no_images(tmp_path: Path) -> None:
    model = load_model(checkpoints.make("llama", tmp_path / "llama"), placement())
    with pytest.raises(TypeError):
        model.encode_images([])

"""Configurations that the stock checkpoints do not have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from tests import checkpoints
from tests.shard.models.cases import ATOL, BACKENDS, image_case, text_case
from tests.shard.models.driver import Runner, placement
from tests.shard.models.oracle import Oracle

Oracles = Callable[[str], Oracle]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TEXT_VARIANTS: dict[str, dict[str, Any]] = {
    "head size of its own": {"head_dim": 48, "num_key_value_heads": 2},
    "wide enough for packed weights": {"hidden_size": 640, "intermediate_size": 1024},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "tied": {"tie_word_embeddings": True},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic rope": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "yarn rope": {"rope_scaling": YARN},
    "new rope keys": {"rope_parameters": {**YARN, "rope_theta": 5000.0}},
}


def assert_parity(folder: Path, backend: str, aspect: str | None = None) -> None:
    """Our logits of one prompt are transformers'."""
    oracle = Oracle(folder)
    case = image_case(oracle, aspect) if aspect else text_case(oracle)
    ours = Runner(folder, placement(backend)).logits(case.prompt)
    torch.testing.assert_close(ours, oracle.logits(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("variant", TEXT_VARIANTS)
def test_text_model(variant: str, backend: str, tmp_path: Path) -> None:
    folder = checkpoints.make("llama", tmp_path / "variant", TEXT_VARIANTS[variant])
    assert_parity(folder, backend)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("next-mistral", {"vision_feature_layer": [-2, 1, 3, 0]}),
        ("next-mistral", {"multimodal_projector_bias": False}),
        ("next-mistral", {"tie_word_embeddings": True}),
        ("next-mistral", {"vision_config": {"hidden_act": "gelu"}}),
        ("next-mistral", {"text_config": {"sliding_window": 20}}),
        ("next-mistral", {"image_grid_pinpoints": [[56, 56]]}),
        ("next-custom", {"vision_feature_select_strategy": "default"}),
        ("next-custom", {"projector_hidden_act": "quick_gelu", "vision_feature_layer": 1}),
        ("llava15", {"vision_feature_select_strategy": "full"}),
        ("llava15", {"text_config": {"tie_word_embeddings": True}, "tie_word_embeddings": True}),
    ],
)
def test_picture_model(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoints.make(kind, tmp_path / "variant", changes)
    assert_parity(folder, "reference", "4:3")


def test_keys_that_hub_files_leave_out(tmp_path: Path) -> None:
    """An absent `sliding_window` is 4096 for mistral, absent kv heads are 8: not llama's values."""
    folder = checkpoints.make(
        "mistral", tmp_path / "m", {"num_key_value_heads": 8, "num_attention_heads": 8}
    )
    config = checkpoints.model_config("mistral") | {"num_attention_heads": 8}
    del config["sliding_window"], config["num_key_value_heads"]
    checkpoints.write_json(folder / "config.json", config)
    assert_parity(folder, "reference")


def rename_452(name: str) -> str:
    """transformers 4.52 to 4.57: everything below `model.`."""
    name = name.replace("language_model.lm_head", "lm_head")
    name = name.replace("language_model.model.", "model.language_model.")
    inner = ("vision_tower", "multi_modal_projector", "image_newline")
    return f"model.{name}" if name.startswith(inner) else name


def rename_5(name: str) -> str:
    """transformers 5: CLIP without its inner level."""
    return rename_452(name).replace("vision_tower.vision_model.", "vision_tower.")


@pytest.mark.parametrize("rename", [rename_452, rename_5])
@pytest.mark.parametrize("kind", ["next-vicuna", "llava15"])
def test_tensor_names_of_every_generation(
    kind: str,
    rename: Callable[[str], str],
    oracle: Oracles,
    tmp_path: Path,
    runner: Callable[..., Runner],
) -> None:
    folder = checkpoints.make(kind, tmp_path / "renamed")
    tensors: dict[str, checkpoints.Array] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= {rename(name): array for name, array in load_file(path).items()}
        path.unlink()
    checkpoints.write_tensors(folder, tensors, num_files=2)
    case = image_case(oracle(kind), "tall")
    assert torch.equal(
        Runner(folder, placement()).logits(case.prompt), runner(kind).logits(case.prompt)
    )


def test_one_file_or_many(
    checkpoint: Callable[[str], Path],
    oracle: Oracles,
    tmp_path: Path,
    runner: Callable[..., Runner],
) -> None:
    folder = checkpoints.make("llama", tmp_path / "many")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    checkpoints.write_tensors(folder, tensors, num_files=5)
    prompt = text_case(oracle("llama")).prompt
    assert torch.equal(Runner(folder, placement()).logits(prompt), runner("llama").logits(prompt))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["next-mistral", "next-vicuna", "llava15", "mistral"])
def test_bfloat16_is_as_near_as_transformers_bfloat16(
    kind: str, backend: str, oracle: Oracles, checkpoint: Callable[[str], Path]
) -> None:
    """Greedy tokens of random models flip in bfloat16; the size of the error must not grow."""
    half = Oracle(checkpoint(kind), torch.bfloat16)
    case = image_case(oracle(kind), "4:3") if half.takes_images else text_case(half)
    exact = oracle(kind).logits(case)
    ours = Runner(checkpoint(kind), placement(backend, torch.bfloat16)).logits(case.prompt)
    our_error = (ours - exact).abs().mean()
    assert ours.dtype == torch.float32
    assert our_error < 1.25 * (half.logits(case) - exact).abs().mean()
    assert our_error > 0


def test_not_finite_is_not_hidden(
    checkpoint: Callable[[str], Path], oracle: Oracles, runner: Callable[..., Runner]
) -> None:
    hidden = torch.zeros(3, 128)
    hidden[1, 5], hidden[2, 7] = float("nan"), float("inf")
    logits = runner("llama").model.logits(hidden)
    assert logits is not None
    assert logits[0].isfinite().all()
    assert not logits[1].isfinite().any()
    assert not logits[2].isfinite().any()

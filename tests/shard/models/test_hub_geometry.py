"""The hub's own models: every tensor's place, and the real image geometry on a narrow model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.shard.models.registry import build_model
from tessera.shard.parallel import Group
from tests import checkpoints
from tests.shard.models.cases import ATOL, QUESTION
from tests.shard.models.driver import Runner, on_ranks, placement
from tests.shard.models.oracle import Oracle, picture

CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}
MISTRAL = {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "sliding_window": None,
    "vocab_size": 32064,
}
VICUNA_13B = VICUNA | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
YI_34B = {
    "model_type": "llama",
    "hidden_size": 7168,
    "intermediate_size": 20480,
    "max_position_embeddings": 4096,
    "num_attention_heads": 56,
    "num_hidden_layers": 60,
    "num_key_value_heads": 8,
    "vocab_size": 64064,
}

HUB: dict[str, tuple[str, dict[str, Any], int, int]] = {
    # name: (model_type, text_config, tensors in its files, parameters)
    "llava-v1.6-mistral-7b": ("llava_next", MISTRAL, 687, 7_566_747_648),
    "llava-v1.6-vicuna-7b": ("llava_next", VICUNA, 687, 7_063_431_168),
    "llava-v1.6-vicuna-13b": ("llava_next", VICUNA_13B, 759, 13_351_499_776),
    "llava-v1.6-34b": ("llava_next", YI_34B, 939, 34_752_083_968),
    "llava-1.5-7b": ("llava", VICUNA, 686, 7_063_427_072),
}
UNUSED_TENSORS = 16 + 2
"""The last vision layer and post_layernorm, which vision_feature_layer -2 does not need."""
UNUSED_PARAMETERS = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024 + 2 * 1024


@pytest.mark.parametrize("name", HUB)
def test_every_tensor_of_the_hub_has_its_place(name: str, tmp_path: Path) -> None:
    """Counts of the models' cards, without reading a weight."""
    model_type, text, num_tensors, num_parameters = HUB[name]
    config = {"model_type": model_type, "vision_config": CLIP_L, "text_config": text}
    model = build_model(config, tmp_path, placement())
    sources = {
        source.name: torch.Size(source.shape).numel()
        for layer in model.layers()
        for parameter in layer.parameters.values()
        for source in parameter.sources
    }
    assert len(sources) == num_tensors - UNUSED_TENSORS
    assert sum(sources.values()) == num_parameters - UNUSED_PARAMETERS


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_hold_an_equal_share_of_the_large_weights(world_size: int, tmp_path: Path) -> None:
    _, text, _, num_parameters = HUB["llava-v1.6-mistral-7b"]
    config = {"model_type": "llava_next", "vision_config": CLIP_L, "text_config": text}
    totals = []
    for rank in range(world_size):
        group = Group(rank, world_size)
        model = build_model(config, tmp_path, placement(group=group))
        assert model.num_kv_heads == 8 // world_size
        shapes = [p.shape for layer in model.layers() for p in layer.parameters.values()]
        totals.append(sum(torch.Size(shape).numel() for shape in shapes))
    share = (num_parameters - UNUSED_PARAMETERS) / world_size
    for total in totals:
        assert share <= total < 1.01 * share


def test_real_image_geometry(tmp_path: Path) -> None:
    """336 pixels in patches of 14: 577 positions, 2340 tokens for a 4:3 picture."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    changes = {
        "vision_config": {"image_size": 336, "patch_size": 14},
        "image_grid_pinpoints": pinpoints,
    }
    folder = checkpoints.make("next-mistral", tmp_path / "real", changes)
    oracle = Oracle(folder)
    case = oracle.case(QUESTION, [picture(640, 480)])
    assert case.prompt.ids.count(case.prompt.image_token) == 2340
    runner = Runner(folder, placement("cpu"))
    expected = oracle.logits(case)
    torch.testing.assert_close(runner.logits(case.prompt), expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(runner.logits(case.prompt, 512, 99), expected, atol=ATOL, rtol=0)


def test_sizes_a_model_tells_its_engine(checkpoint: Callable[[str], Path]) -> None:
    model = Runner(checkpoint("next-mistral"), placement()).model
    assert (model.num_layers, model.num_kv_heads, model.head_size) == (3, 2, 32)
    assert (model.vocab_size, model.max_positions) == (640, 4096)
    shared = on_ranks(4, lambda g: Runner(checkpoint("next-mistral"), placement(group=g)).model)
    assert [rank.num_kv_heads for rank in shared] == [1, 1, 1, 1]

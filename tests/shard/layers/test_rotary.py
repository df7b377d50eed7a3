"""The rotary tables are transformers' numbers, and unusable configurations are named."""

from typing import Any

import pytest
import torch

from tessera.shard.errors import CheckpointError
from tessera.shard.layers.rotary import Rotary, cos_sin_table

BASE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "base of its own": {"rope_theta": 1000000.0},
    "null": {"rope_scaling": None},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "linear, old spelling": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "llama3, trained length beside it": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")},
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_scaling": YARN},
    "yarn, attention factor": {"rope_scaling": {**YARN, "attention_factor": 1.7}},
    "yarn, betas": {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2}},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    "yarn, one mscale only": {"rope_scaling": {**YARN, "mscale": 0.7}},
    "yarn, not truncated": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn, no ramp": {"rope_scaling": {**YARN, "beta_fast": 2, "beta_slow": 2}},
    "yarn, no trained length": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "new keys": {"rope_parameters": {**YARN, "rope_theta": 5000.0}, "rope_theta": None},
    "new keys, default": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "no base at all": {"rope_theta": None},
}


def merged(changes: dict[str, Any]) -> dict[str, Any]:
    """`BASE` with changes; None removes the base, as a file without it."""
    config = {**BASE, **changes}
    if config["rope_theta"] is None:
        del config["rope_theta"]
    return config


@pytest.mark.parametrize("scaling", SCALINGS)
def test_table_is_that_of_transformers(scaling: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = merged(SCALINGS[scaling])
    table_LH = cos_sin_table(Rotary.from_dict(config), head_size=64)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config))
    positions = torch.arange(256)[None]
    cos, sin = theirs(torch.zeros(1), positions)
    assert table_LH.dtype == torch.float32
    assert torch.equal(table_LH[:256, :32], cos[0, :, :32])
    assert torch.equal(table_LH[:256, 32:], sin[0, :, :32])


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({}, 256),
        ({"rope_type": "linear", "factor": 3.0}, 768),
        ({"rope_type": "dynamic", "factor": 3.0}, 256),
        (LLAMA3, 256),
        (YARN, 512),
        ({**YARN, "factor": 2.0}, 256),
    ],
)
def test_positions_a_scaled_model_can_use(scaling: dict[str, Any], positions: int) -> None:
    rotary = Rotary.from_dict({**BASE, "rope_scaling": scaling})
    assert rotary.max_positions == positions
    assert cos_sin_table(rotary, 64).shape == (positions, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor=0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_scaling": {**YARN, "beta_fast": "x"}}, "beta_fast='x'"),
        ({"rope_scaling": {**YARN, "attention_factor": -1}}, "attention_factor=-1"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": []}}, "original_max"),
    ],
)
def test_unusable_configurations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Rotary.from_dict({**BASE, **changes})

"""Mistral: llama with grouped key/value heads and, in its first version, a sliding window."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.shard.models.base import LoadableModel, Placement
from tessera.shard.models.config import TextConfig
from tessera.shard.models.llama import Llama

MISTRAL_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
"""What absent keys mean (transformers 5.23, `MistralConfig`); a null window means none."""


def build(config: Mapping[str, Any], folder: Path, placement: Placement) -> LoadableModel:
    """The model without its weights."""
    return Llama(TextConfig.from_dict(config, MISTRAL_DEFAULTS), placement)

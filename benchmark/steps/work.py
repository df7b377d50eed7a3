"""What a step must read and compute, from the sizes of the model alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tessera.shard.layers.base import Layer
from tessera.shard.layers.embedding import VocabParallelEmbedding, VocabParallelHead

PICTURE_PARTS = ("vision_tower.", "multi_modal_projector.")
TAIL_PARTS = ("self_attn.o_proj", "mlp")  # of the last layer


@dataclass(frozen=True, slots=True)
class Work:
    """The least a device must do."""

    num_bytes: int
    num_flops: int

    def limit_s(self, read_rate: float, matrix_rate: float) -> float:
        """The larger of moving the bytes (per second) and doing the arithmetic (per second)."""
        return max(self.num_bytes / read_rate, self.num_flops / matrix_rate)

    def is_memory_bound(self, read_rate: float, matrix_rate: float) -> bool:
        """Whether the bytes take longer than the arithmetic."""
        return self.num_bytes / read_rate >= self.num_flops / matrix_rate

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.num_flops / self.num_bytes


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the part of a model that one rank has."""

    itemsize: int  # bytes of a weight and of a value in the cache
    decoder_weights: int  # numbers that every token is multiplied with
    tail_weights: int  # those behind the last layer's keys and values: for sampled rows alone
    head_weights: int  # those that every sampled row is multiplied with
    cached_per_token: int  # numbers a token leaves in the cache: keys and values of all layers
    attention_width: int  # head size times heads, summed over layers
    picture_weights: int = 0
    patches: int = 0  # of one tile, without the class token
    picture_attention_width: int = 0  # as attention_width, of the vision tower

    def decode(self, batch: int, context: int) -> Work:
        """One more token for `batch` sequences which then see `context` tokens each."""
        return self._text(batch, batch, batch * context, batch * context)

    def prefill(self, batch: int, new: int) -> Work:
        """`batch` whole prompts of `new` tokens, and the first token of their answers."""
        return self._text(batch * new, batch, batch * new, batch * new * (new + 1) // 2)

    def pictures(self, tiles: int) -> Work:
        """Tiles through the vision tower and the projector."""
        tokens = tiles * (self.patches + 1)
        pairs = tiles * (self.patches + 1) ** 2
        flops = 2 * self.picture_weights * tokens + 4 * self.picture_attention_width * pairs
        return Work(self.itemsize * self.picture_weights, flops)

    def _text(self, tokens: int, sampled: int, cached: int, pairs: int) -> Work:
        """`pairs`: of a query and a key. `cached`: tokens whose keys and values are read."""
        weights = self.decoder_weights + self.tail_weights + self.head_weights
        numbers = weights + cached * self.cached_per_token
        of_sampled = self.tail_weights + self.head_weights
        products = 2 * (self.decoder_weights * tokens + of_sampled * sampled)
        return Work(self.itemsize * numbers, products + 4 * self.attention_width * pairs)


def sizes_of(model: Layer, config: Mapping[str, Any], itemsize: int, ranks: int) -> Sizes:
    """Sizes of a loaded model on one of `ranks` ranks; `config` is its config.json."""
    text = config.get("text_config", config)
    layers, heads = text["num_hidden_layers"], text["num_attention_heads"]
    head_size = text.get("head_dim") or text["hidden_size"] // heads
    kv_heads = max(1, (text.get("num_key_value_heads") or heads) // ranks)
    weights = {"decoder": 0, "tail": 0, "head": 0, "pictures": 0}
    for layer in model.layers():
        weights[_part(layer, layers - 1)] += _num_multiplied(layer)
    vision = config.get("vision_config")
    run = _tower_layers(config) if vision else 0
    return Sizes(
        itemsize=itemsize,
        decoder_weights=weights["decoder"],
        tail_weights=weights["tail"],
        head_weights=weights["head"],
        cached_per_token=2 * layers * kv_heads * head_size,
        attention_width=layers * heads * head_size // ranks,
        picture_weights=weights["pictures"],
        patches=(vision["image_size"] // vision["patch_size"]) ** 2 if vision else 0,
        picture_attention_width=run * vision["hidden_size"] // ranks if vision else 0,
    )


def _part(layer: Layer, last_layer: int) -> str:
    if isinstance(layer, VocabParallelHead):
        return "head"
    names = [source.name for each in layer.parameters.values() for source in each.sources]
    if any(name.startswith(PICTURE_PARTS) for name in names):
        return "pictures"
    behind = any(f"layers.{last_layer}.{part}" in name for name in names for part in TAIL_PARTS)
    return "tail" if behind else "decoder"


def _num_multiplied(layer: Layer) -> int:
    """Numbers in matrices; the rows that embeddings look up are none."""
    if isinstance(layer, VocabParallelEmbedding):
        return 0
    return sum(
        math.prod(parameter.shape)
        for parameter in layer.parameters.values()
        if len(parameter.shape) > 1
        and not any("position_embedding" in source.name for source in parameter.sources)
    )


def _tower_layers(config: Mapping[str, Any]) -> int:
    """Layers of the vision tower up to the one whose output is used."""
    layers, used = config["vision_config"]["num_hidden_layers"], config["vision_feature_layer"]
    deepest = max(used) if isinstance(used, list) else used
    return int(layers + 1 + deepest if deepest < 0 else deepest)

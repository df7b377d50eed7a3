"""Llama: the decoder under vicuna, Yi and most others; mistral adds only a window."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tessera.shard.backends.base import LastRows, LayerCache, StepLayout
from tessera.shard.layers.attention import CausalSelfAttention
from tessera.shard.layers.base import Layer
from tessera.shard.layers.embedding import VocabParallelEmbedding, VocabParallelHead
from tessera.shard.layers.mlp import GatedMLP
from tessera.shard.layers.norm import RMSNorm
from tessera.shard.layers.rotary import cos_sin_table
from tessera.shard.models.base import ImageTiles, LoadableModel, Placement
from tessera.shard.models.config import TextConfig

LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
"""What absent keys mean (transformers 5.23, `LlamaConfig`); None: derived from the others."""


def build(config: Mapping[str, Any], folder: Path, placement: Placement) -> LoadableModel:
    """The model without its weights."""
    return Llama(TextConfig.from_dict(config, LLAMA_DEFAULTS), placement)


class DecoderLayer(Layer):
    """Attention, then feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config: TextConfig, placement: Placement, name: str) -> None:
        backend, group = placement.backend, placement.group
        width, eps = config.width, config.rms_eps
        self.input_norm = RMSNorm(backend, f"{name}.input_layernorm", width, eps)
        self.attention = CausalSelfAttention(backend, group, f"{name}.self_attn", config.attention)
        self.mlp_norm = RMSNorm(backend, f"{name}.post_attention_layernorm", width, eps)
        self.mlp = GatedMLP(
            backend, group, f"{name}.mlp", width, config.inner, config.act, config.mlp_bias
        )

    def __call__(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        cos_sin_LH: Tensor,
        cache: LayerCache,
        layout: StepLayout,
        wanted: LastRows | None,
    ) -> tuple[Tensor, Tensor]:
        """(what this layer adds, the residual stream before that), of `wanted` alone if given."""
        x_TD, residual_TD = self.input_norm(x_TD, residual_TD)
        x_TD = self.attention(x_TD, cos_sin_LH, cache, layout, wanted)
        if wanted is not None:
            residual_TD = residual_TD[wanted.rows_S]
        x_TD, residual_TD = self.mlp_norm(x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD


class Llama(LoadableModel):
    """A decoder with its embedding and its head on one rank."""

    def __init__(self, config: TextConfig, placement: Placement) -> None:
        group = placement.group
        self.embedding = VocabParallelEmbedding(
            group, "embed_tokens", config.vocab_size, config.width
        )
        self.decoder = [
            DecoderLayer(config, placement, f"layers.{i}") for i in range(config.num_layers)
        ]
        self.norm = RMSNorm(placement.backend, "norm", config.width, config.rms_eps)
        self.head = VocabParallelHead(
            group,
            "lm_head",
            config.vocab_size,
            config.width,
            tied=self.embedding if config.tied else None,
        )
        table_LH = cos_sin_table(config.rotary, config.head_size)
        self.cos_sin_LH = table_LH.to(placement.backend.device)
        first_kv, last_kv = self.decoder[0].attention.heads.kv
        self.width = config.width
        self.num_layers = config.num_layers
        self.num_kv_heads = last_kv - first_kv
        self.head_size = config.head_size
        self.vocab_size = config.vocab_size
        self.max_positions = config.rotary.max_positions

    def embed(self, ids_T: Tensor) -> Tensor:
        """See `Model.embed`."""
        return self.embedding(ids_T)

    def encode_images(self, images: list[ImageTiles]) -> list[Tensor]:
        """See `Model.encode_images`.

        Raises:
            TypeError: always; there is no vision tower.
        """
        raise TypeError("this model has no vision tower")

    def forward(
        self,
        x_TD: Tensor,
        caches: list[LayerCache],
        layout: StepLayout,
        wanted: LastRows | None = None,
    ) -> Tensor:
        """See `Model.forward`."""
        num_rows = x_TD.shape[0]
        residual_TD: Tensor | None = None
        for layer, cache in zip(self.decoder, caches, strict=False):
            last = wanted if layer is self.decoder[-1] else None
            x_TD, residual_TD = layer(x_TD, residual_TD, self.cos_sin_LH, cache, layout, last)
        normed = self.norm(x_TD, residual_TD)[0]
        if wanted is None or normed.shape[0] == num_rows:
            return normed
        return normed.new_zeros(num_rows, self.width).index_copy_(0, wanted.rows_S, normed)

    def logits(self, hidden_RD: Tensor) -> Tensor | None:
        """See `Model.logits`."""
        return self.head(hidden_RD)

"""What the engine needs of a model, and what a model needs of its rank."""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from tessera.shard.backends.base import Backend, LastRows, LayerCache, StepLayout
from tessera.shard.layers.base import Layer
from tessera.shard.parallel import Group
from tessera.shard.quantization_names import Quantization


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model lives: its device's operations, its rank's group, its arithmetic."""

    backend: Backend
    group: Group
    dtype: torch.dtype
    quantization: Quantization = field(default_factory=Quantization)
    cache_dtype: torch.dtype | None = None  # of keys and values; None: `dtype`


@dataclass(frozen=True, slots=True)
class ImageTiles:
    """One picture as the router cut it."""

    tiles: Tensor  # uint8 [num_tiles, side, side, 3], anywhere, the overview first
    height: int  # of the original picture, pixels
    width: int
    grid: tuple[int, int]  # tiles down and across that follow the overview; (0, 0): none


class Model(Protocol):
    """A decoder on one rank. Loaded and packed; holds no state of any sequence."""

    width: int  # of embeddings and hidden states
    num_layers: int
    num_kv_heads: int  # on this rank
    head_size: int
    vocab_size: int  # ids below this may be sampled
    max_positions: int

    def embed(self, ids_T: Tensor) -> Tensor:
        """Embeddings x_TD of token ids."""
        ...

    def encode_images(self, images: list[ImageTiles]) -> list[Tensor]:
        """Features [tokens_i, D] of each picture, all tiles in one pass of the vision tower.

        As many rows as the image layout of the configuration counts. Raises TypeError for text
        models (the router never sends them images).
        """
        ...

    def forward(
        self,
        x_TD: Tensor,
        caches: list[LayerCache],
        layout: StepLayout,
        wanted: LastRows | None = None,
    ) -> Tensor:
        """The hidden states [T, D] after the last norm; writes the KV cache of this step.

        The memory of `x_TD` may be reused. With fewer caches than layers only the first layers run:
        enough to measure what a step takes.

        Args:
            wanted: if given, other rows of the result mean nothing, and the last layer need not
                compute them: of those only keys and values are looked at again.
        """
        ...

    def logits(self, hidden_RD: Tensor) -> Tensor | None:
        """float32 [R, vocab_size] on rank 0, None on the others."""
        ...


class LoadableModel(Layer, Model):
    """What the files in this folder build: a model whose layers the loader can fill."""

    width: int  # of the residual stream, D

"""LLaVA-1.5: one crop of a picture, its patches' features projected to prompt embeddings.

Source: arXiv 2310.03744; as transformers 5.23, `LlavaForConditionalGeneration`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.shard.backends.base import LastRows, LayerCache, StepLayout
from tessera.shard.layers.activations import activation
from tessera.shard.layers.base import Layer, share
from tessera.shard.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from tessera.shard.models.base import ImageTiles, LoadableModel, Placement
from tessera.shard.models.clip import ClipVisionTower
from tessera.shard.models.config import LlavaConfig
from tessera.shard.models.pixels import PixelScale
from tessera.shard.models.registry import build_text_model


def build(config: Mapping[str, Any], folder: Path, placement: Placement) -> LoadableModel:
    """The model without its weights."""
    parsed = LlavaConfig.from_dict(config)
    text = build_text_model(parsed.text, folder, placement)
    return Llava(parsed, text, PixelScale.from_folder(folder), placement)


class Projector(Layer):
    """Two linears with an activation between: the vision tower's features to the text's width."""

    def __init__(self, config: LlavaConfig, width: int, placement: Placement) -> None:
        group, bias = placement.group, config.projector_bias
        features = config.vision.width * len(config.feature_layers)
        span = share(width, group)
        first = Projection("multi_modal_projector.linear_1", width, span)
        self.linear_1 = ColumnParallelLinear(features, [first], bias)
        self.linear_2 = RowParallelLinear(
            group, "multi_modal_projector.linear_2", width, span, width, bias
        )
        self._act = activation(config.projector_act, "projector_hidden_act")

    def __call__(self, features_SQF: Tensor) -> Tensor:
        """[S, Q, features] to [S, Q, D], equal on every rank."""
        x_TD = self.linear_2(self._act(self.linear_1(features_SQF.flatten(0, 1))))
        return x_TD.view(*features_SQF.shape[:2], -1)


class Llava(LoadableModel):
    """A text model that also takes pictures. Subclasses say how tiles become one sequence."""

    def __init__(
        self, config: LlavaConfig, text: LoadableModel, pixels: PixelScale, placement: Placement
    ) -> None:
        self.tower = ClipVisionTower(config.vision, config.feature_layers, pixels, placement)
        self.projector = Projector(config, text.width, placement)
        self.text = text
        self._layout = config.layout
        self.width = text.width
        self.num_layers = text.num_layers
        self.num_kv_heads = text.num_kv_heads
        self.head_size = text.head_size
        self.vocab_size = text.vocab_size
        self.max_positions = text.max_positions

    def embed(self, ids_T: Tensor) -> Tensor:
        """See `Model.embed`."""
        return self.text.embed(ids_T)

    def encode_images(self, images: list[ImageTiles]) -> list[Tensor]:
        """See `Model.encode_images`."""
        features_SQF = self.tower(torch.cat([image.tiles for image in images]))
        if self._layout.strategy == "default":
            features_SQF = features_SQF[:, 1:]  # without the class feature
        tiles_SQD = self.projector(features_SQF)
        per_image = torch.split(tiles_SQD, [image.tiles.shape[0] for image in images])
        return [self.pack_tiles(*pair) for pair in zip(images, per_image, strict=True)]

    def pack_tiles(self, image: ImageTiles, tiles_SQD: Tensor) -> Tensor:
        """The prompt embeddings [tokens, D] of one picture from its tiles' features."""
        return tiles_SQD[0]

    def forward(
        self,
        x_TD: Tensor,
        caches: list[LayerCache],
        layout: StepLayout,
        wanted: LastRows | None = None,
    ) -> Tensor:
        """See `Model.forward`."""
        return self.text.forward(x_TD, caches, layout, wanted)

    def logits(self, hidden_RD: Tensor) -> Tensor | None:
        """See `Model.logits`."""
        return self.text.logits(hidden_RD)

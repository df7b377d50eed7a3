"""CLIP's vision tower: tiles of a picture to features, heads and inner widths split over ranks.

Source: arXiv 2103.00020; layer by layer as transformers 5.23, `CLIPVisionModel`.
"""

import torch
from torch import Tensor

from tessera.shard.backends.base import Backend
from tessera.shard.layers.activations import activation
from tessera.shard.layers.base import Layer, Parameter, Source, share
from tessera.shard.layers.linear import ColumnParallelLinear, Projection, RowParallelLinear
from tessera.shard.layers.norm import LayerNorm, vector
from tessera.shard.models.base import Placement
from tessera.shard.models.config import VisionConfig
from tessera.shard.models.pixels import PixelScale
from tessera.shard.parallel import Group

NAME = "vision_tower"


class ClipLayer(Layer):
    """Attention, then feed-forward, each after a norm and added to its input."""

    def __init__(self, config: VisionConfig, backend: Backend, group: Group, name: str) -> None:
        width, inner, eps = config.width, config.inner, config.eps
        heads, inner_share = share(config.num_heads, group), share(inner, group)
        self._backend = backend
        self._head_size = width // config.num_heads
        self._act = activation(config.act, "vision_config.hidden_act")
        span = (heads[0] * self._head_size, heads[1] * self._head_size)
        parts = [f"{name}.self_attn.{part}_proj" for part in "qkv"]
        self.norm1 = LayerNorm(f"{name}.layer_norm1", width, eps)
        self.qkv_proj = ColumnParallelLinear(
            width, [Projection(part, width, span) for part in parts], bias=True
        )
        self.out_proj = RowParallelLinear(
            group, f"{name}.self_attn.out_proj", width, span, width, bias=True
        )
        self.norm2 = LayerNorm(f"{name}.layer_norm2", width, eps)
        self.fc1 = ColumnParallelLinear(
            width, [Projection(f"{name}.mlp.fc1", inner, inner_share)], bias=True
        )
        self.fc2 = RowParallelLinear(group, f"{name}.mlp.fc2", inner, inner_share, width, bias=True)

    def __call__(self, x_TD: Tensor, num_tiles: int) -> Tensor:
        """[T, D] to [T, D]; T is `num_tiles` equally long runs."""
        qkv_TF = self.qkv_proj(self.norm1(x_TD))
        qkv_SQ3NH = qkv_TF.view(
            num_tiles, -1, 3, qkv_TF.shape[1] // 3 // self._head_size, self._head_size
        )
        out_SQNH = self._backend.attend_dense(*qkv_SQ3NH.unbind(2))
        x_TD = x_TD + self.out_proj(out_SQNH.reshape(x_TD.shape[0], -1))
        return x_TD + self.fc2(self._act(self.fc1(self.norm2(x_TD))))


class ClipVisionTower(Layer):
    """The tower up to the last layer whose output is wanted; the rest is not even loaded."""

    class_D: Tensor
    position_QD: Tensor
    patch_DF: Tensor

    def __init__(
        self,
        config: VisionConfig,
        feature_layers: tuple[int, ...],
        pixels: PixelScale,
        placement: Placement,
    ) -> None:
        """`feature_layers`: how many layers run before each feature is taken, 0 for none."""
        # Heads need not divide evenly, but no rank may be without one: then every rank runs the
        # whole tower, and nothing is summed.
        splits = config.num_heads >= placement.group.world_size
        group = placement.group if splits else Group()
        num_run = max(feature_layers)
        self._feature_layers = feature_layers
        self._dtype = placement.dtype
        self._device = placement.backend.device
        self._patch = config.patch
        self._pixel_table_3X = pixels.table().to(self._device)
        self.parameters = _embedding_parameters(config)
        self.pre_norm = LayerNorm(f"{NAME}.pre_layrnorm", config.width, config.eps)
        self.encoder = [
            ClipLayer(config, placement.backend, group, f"{NAME}.encoder.layers.{i}")
            for i in range(num_run)
        ]
        self.unused = (
            f"{NAME}.post_layernorm.",
            f"{NAME}.embeddings.position_ids",  # in files of transformers before 4.31
            *(f"{NAME}.encoder.layers.{i}." for i in range(num_run, config.num_layers)),
        )

    def __call__(self, tiles: Tensor) -> Tensor:
        """Features of every patch.

        Args:
            tiles: uint8 [S, side, side, 3].

        Returns:
            [S, Q, D * number of feature layers], the class feature first, then row by row.
        """
        num_tiles = tiles.shape[0]
        x_SQD = self._embed(self._patches(tiles.to(self._device)))
        x_TD = self.pre_norm(x_SQD).flatten(0, 1)
        wanted = {0: x_TD} if 0 in self._feature_layers else {}
        for i, layer in enumerate(self.encoder, start=1):
            x_TD = layer(x_TD, num_tiles)
            if i in self._feature_layers:
                wanted[i] = x_TD
        features_TF = torch.cat([wanted[i] for i in self._feature_layers], dim=-1)
        return features_TF.view(num_tiles, -1, features_TF.shape[1])

    def _patches(self, tiles: Tensor) -> Tensor:
        """Normalised pixels [S, patches, 3 * patch * patch] of uint8 [S, side, side, 3]."""
        side, patch = tiles.shape[1] // self._patch, self._patch
        channels_SC = tiles.permute(0, 3, 1, 2).int()
        first_C11 = torch.arange(3, device=tiles.device, dtype=torch.int32)[:, None, None] * 256
        pixels = self._pixel_table_3X.flatten()[channels_SC + first_C11].to(self._dtype)
        grid = pixels.view(-1, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
        return grid.reshape(tiles.shape[0], side * side, -1)

    def _embed(self, patches_SQF: Tensor) -> Tensor:
        """[S, 1 + patches, D]: the class token, then the patches; a convolution whose windows do
        not overlap is a multiplication."""
        x_SQD = torch.nn.functional.linear(patches_SQF, self.patch_DF)
        class_S1D = self.class_D.expand(x_SQD.shape[0], 1, -1)
        return torch.cat((class_S1D, x_SQD), dim=1) + self.position_QD


def _embedding_parameters(config: VisionConfig) -> dict[str, Parameter]:
    name, width = f"{NAME}.embeddings", config.width
    positions = (config.tile // config.patch) ** 2 + 1
    kernel = (width, 3, config.patch, config.patch)
    return {
        "class_D": vector(f"{name}.class_embedding", width),
        "position_QD": Parameter(
            (positions, width),
            (Source(f"{name}.position_embedding.weight", (positions, width)),),
        ),
        "patch_DF": Parameter(
            (width, 3 * config.patch**2), (Source(f"{name}.patch_embedding.weight", kernel),)
        ),
    }

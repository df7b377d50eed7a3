"""LLaVA-NeXT: an overview of the picture and a grid of tiles at up to three times the resolution.

Source: the LLaVA-NeXT release notes (llava-vl.github.io/blog/2024-01-30-llava-next, "anyres"); the
order of features is that of transformers 5.23, `LlavaNextModel.pack_image_features`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.shard.layers.norm import vector
from tessera.shard.models.base import ImageTiles, LoadableModel, Placement
from tessera.shard.models.config import LlavaConfig
from tessera.shard.models.llava import Llava
from tessera.shard.models.pixels import PixelScale
from tessera.shard.models.registry import build_text_model


def build(config: Mapping[str, Any], folder: Path, placement: Placement) -> LoadableModel:
    """The model without its weights."""
    parsed = LlavaConfig.from_dict(config)
    text = build_text_model(parsed.text, folder, placement)
    return LlavaNext(parsed, text, PixelScale.from_folder(folder), placement)


class LlavaNext(Llava):
    """Overview first, then the grid's rows without their padding, each ended by a newline."""

    newline_D: Tensor

    def __init__(
        self, config: LlavaConfig, text: LoadableModel, pixels: PixelScale, placement: Placement
    ) -> None:
        super().__init__(config, text, pixels, placement)
        self.parameters = {"newline_D": vector("image_newline", text.width)}

    def pack_tiles(self, image: ImageTiles, tiles_SQD: Tensor) -> Tensor:
        """See `Llava.pack_tiles`.

        With the strategy "full" the overview keeps its class feature and the tiles of the grid,
        which could not be laid side by side with it, do not.
        """
        overview_QD, tiles_SQD = tiles_SQD[0], tiles_SQD[1:]
        if image.grid == (0, 0):
            return overview_QD
        plan = self._layout.plan_on(image.height, image.width, image.grid)
        if self._layout.strategy == "full":
            tiles_SQD = tiles_SQD[:, 1:]
        side = self._layout.tile // self._layout.patch
        rows, columns = plan.grid
        grid_RCD = (
            tiles_SQD.reshape(rows, columns, side, side, -1)
            .transpose(1, 2)
            .reshape(rows * side, columns * side, -1)
        )
        (top, left), (height, width) = plan.cut, plan.kept
        kept_RCD = grid_RCD[top : top + height, left : left + width]
        newline_R1D = self.newline_D.expand(height, 1, -1)
        lines_RCD = torch.cat((kept_RCD, newline_R1D), dim=1)
        return torch.cat((overview_QD, lines_RCD.flatten(0, 1)))

"""Pictures into tiles (LLaVA-NeXT's "anyres") and per-patch labels, to train the demo model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tessera.launcher.demo.pictures import (
    CHARACTERS,
    COLOR_NAMES,
    SHAPE_NAMES,
    Scene,
    character_centres,
)

TILE = 84  # pixels, side of one tile: what the vision tower sees at once
PATCH = 14  # pixels, side of one patch: what becomes one image token
SIDE = TILE // PATCH  # patches along one side of a tile
PINPOINTS = ((84, 168), (168, 84), (252, 84), (84, 252))  # (height, width) of the tiled picture
IGNORE = -100  # a label that no loss counts
HEADS = {  # name of each per-patch label -> number of classes; class 0 is "none"
    "shape": len(SHAPE_NAMES) + 1,
    "color": len(COLOR_NAMES) + 1,
    "background": len(COLOR_NAMES) + 1,
    "left_character": len(CHARACTERS) + 1,  # whose middle lies in the patch's left half
    "right_character": len(CHARACTERS) + 1,
    "centre": 2,  # the middle of a shape lies in the patch
}
SHAPE, COLOR, BACKGROUND, LEFT, RIGHT, CENTRE = range(len(HEADS))


@dataclass(frozen=True, slots=True)
class Layout:
    """How pictures of one size are tiled. Lengths in pixels, `rows` and `columns` in tiles."""

    width: int
    height: int
    rows: int
    columns: int
    resized_width: int
    resized_height: int

    @property
    def left(self) -> int:
        """Width of the black border on the left of the tiled picture."""
        return (self.columns * TILE - self.resized_width) // 2

    @property
    def top(self) -> int:
        """Height of the black border above the tiled picture."""
        return (self.rows * TILE - self.resized_height) // 2

    @property
    def cut_rows(self) -> int:
        """Rows of patches that are cut at the top, and as many at the bottom."""
        grid_rows, grid_columns = self.rows * SIDE, self.columns * SIDE
        if self.width * grid_rows <= self.height * grid_columns:
            return 0
        return (grid_rows - self.height * grid_columns // self.width) // 2

    @property
    def cut_columns(self) -> int:
        """Columns of patches that are cut on the left, and as many on the right."""
        grid_rows, grid_columns = self.rows * SIDE, self.columns * SIDE
        if self.width * grid_rows > self.height * grid_columns:
            return 0
        return (grid_columns - self.width * grid_rows // self.height) // 2


def layout(width: int, height: int) -> Layout:
    """The tiling of a picture: the pinpoint that keeps most pixels, then wastes least."""

    def kept_and_waste(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - pinpoint[0] * pinpoint[1]

    tall, wide = max(PINPOINTS, key=kept_and_waste)
    scale_x, scale_y = wide / width, tall / height
    if scale_x < scale_y:
        resized_width, resized_height = wide, min(math.ceil(height * scale_x), tall)
    else:
        resized_width, resized_height = min(math.ceil(width * scale_y), wide), tall
    return Layout(width, height, tall // TILE, wide // TILE, resized_width, resized_height)


def cut(image: Image.Image, plan: Layout) -> NDArray[np.uint8]:
    """The picture's tiles, [1 + rows * columns, 3, TILE, TILE]: the whole, then the grid."""
    overview = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    resized = image.resize((plan.resized_width, plan.resized_height), Image.Resampling.BICUBIC)
    canvas = np.zeros((plan.rows * TILE, plan.columns * TILE, 3), np.uint8)
    canvas[
        plan.top : plan.top + plan.resized_height, plan.left : plan.left + plan.resized_width
    ] = np.asarray(resized)
    grid = (
        canvas.reshape(plan.rows, TILE, plan.columns, TILE, 3)
        .swapaxes(1, 2)
        .reshape(-1, TILE, TILE, 3)
    )
    return np.ascontiguousarray(np.concatenate([overview[None], grid]).transpose(0, 3, 1, 2))


def labels(scene: Scene, plan: Layout) -> NDArray[np.int16]:
    """What each patch shows, [tiles, SIDE * SIDE, len(HEADS)]; `IGNORE` outside the picture."""
    overview = _View(SIDE, SIDE, TILE / scene.width, TILE / scene.height, 0, 0)
    grid = _View(
        plan.rows * SIDE, plan.columns * SIDE,
        plan.resized_width / scene.width, plan.resized_height / scene.height, plan.left, plan.top,
    )  # fmt: skip
    fine = grid.labels(scene).reshape(plan.rows, SIDE, plan.columns, SIDE, len(HEADS))
    tiles = fine.swapaxes(1, 2).reshape(-1, SIDE * SIDE, len(HEADS))
    return np.concatenate([overview.labels(scene).reshape(1, SIDE * SIDE, len(HEADS)), tiles])


@dataclass(frozen=True, slots=True)
class _View:
    """A picture as seen through a grid of patches: scaled, then moved by (left, top) pixels."""

    rows: int
    columns: int
    scale_x: float
    scale_y: float
    left: int
    top: int

    def labels(self, scene: Scene) -> NDArray[np.int16]:
        found = np.zeros((self.rows, self.columns, len(HEADS)), np.int16)
        x = ((np.arange(self.columns) + 0.5) * PATCH - self.left) / self.scale_x
        y = ((np.arange(self.rows) + 0.5) * PATCH - self.top) / self.scale_y
        found[..., BACKGROUND] = COLOR_NAMES.index(scene.background) + 1
        for shape in scene.shapes:
            distance = np.hypot(x[None, :] - shape.x, y[:, None] - shape.y) / shape.radius
            found[(distance >= 0.7) & (distance < 1.25), SHAPE : COLOR + 1] = IGNORE
            found[distance < 0.7, SHAPE] = SHAPE_NAMES.index(shape.name) + 1
            found[distance < 0.7, COLOR] = COLOR_NAMES.index(shape.color) + 1
        for shape in scene.shapes:
            row, column, _ = self._patch(shape.x, shape.y)
            found[row, column, SHAPE] = SHAPE_NAMES.index(shape.name) + 1
            found[row, column, COLOR] = COLOR_NAMES.index(shape.color) + 1
            found[row, column, CENTRE] = 1
        for character, middle_x, middle_y in _characters(scene):
            row, column, right = self._patch(middle_x, middle_y)
            found[row, column, RIGHT if right else LEFT] = CHARACTERS.index(character) + 1
        outside = ((x < 0) | (x >= scene.width))[None, :] | ((y < 0) | (y >= scene.height))[:, None]
        empty = (
            outside & (found[..., CENTRE] == 0) & (found[..., LEFT] == 0) & (found[..., RIGHT] == 0)
        )
        found[empty] = IGNORE
        return found

    def _patch(self, x: float, y: float) -> tuple[int, int, bool]:
        """Row and column of the patch at a point of the picture; whether it is its right half."""
        column = (x * self.scale_x + self.left) / PATCH
        row = (y * self.scale_y + self.top) / PATCH
        column, row = (
            min(max(column, 0.0), self.columns - 0.01),
            min(max(row, 0.0), self.rows - 0.01),
        )
        return int(row), int(column), column % 1 >= 0.5


def _characters(scene: Scene) -> Iterable[tuple[str, float, float]]:
    for line in scene.lines:
        yield from character_centres(line)

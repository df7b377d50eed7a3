"""Pictures into tiles (LLaVA-NeXT's "anyres") and per-patch labels, to train the demo model."""

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
    reading_order,
)
from tessera.proto.image_layout import AnyResLayout, ImagePlan

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
RANK = len(HEADS)  # one label more, of scenes only: which one in reading order (0: nothing)
MAX_CHARACTERS, MAX_SHAPES = 5, 4
RANKS = 1 + MAX_CHARACTERS + MAX_SHAPES  # classes: none, first character..., first shape...
NUM_LABELS = len(HEADS) + 1


def layout(width: int, height: int) -> ImagePlan:
    """How a picture of this size is tiled."""
    return AnyResLayout(TILE, PATCH, PINPOINTS).plan(height, width)


def cut(image: Image.Image, plan: ImagePlan) -> NDArray[np.uint8]:
    """The picture's tiles, [1 + rows * columns, 3, TILE, TILE]: the whole, then the grid."""
    (height, width), (top, left), (rows, columns) = plan.resized, plan.offset, plan.grid
    overview = np.asarray(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    canvas = np.zeros((*plan.canvas, 3), np.uint8)
    canvas[top : top + height, left : left + width] = resized
    grid = canvas.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)
    return np.ascontiguousarray(np.concatenate([overview[None], grid]).transpose(0, 3, 1, 2))


def labels(scene: Scene, plan: ImagePlan) -> NDArray[np.int16]:
    """What each patch shows, [tiles, SIDE * SIDE, NUM_LABELS]; `IGNORE` outside the picture."""
    (height, width), (top, left), (rows, columns) = plan.resized, plan.offset, plan.grid
    overview = _View(SIDE, SIDE, TILE / scene.width, TILE / scene.height, 0, 0)
    grid = _View(rows * SIDE, columns * SIDE, width / scene.width, height / scene.height, left, top)
    fine = grid.labels(scene).reshape(rows, SIDE, columns, SIDE, NUM_LABELS)
    tiles = fine.swapaxes(1, 2).reshape(-1, SIDE * SIDE, NUM_LABELS)
    return np.concatenate([overview.labels(scene).reshape(1, SIDE * SIDE, NUM_LABELS), tiles])


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
        found = np.zeros((self.rows, self.columns, NUM_LABELS), np.int16)
        x = ((np.arange(self.columns) + 0.5) * PATCH - self.left) / self.scale_x
        y = ((np.arange(self.rows) + 0.5) * PATCH - self.top) / self.scale_y
        found[..., BACKGROUND] = COLOR_NAMES.index(scene.background) + 1
        for shape in scene.shapes:
            distance = np.hypot(x[None, :] - shape.x, y[:, None] - shape.y) / shape.radius
            found[(distance >= 0.7) & (distance < 1.25), SHAPE : COLOR + 1] = IGNORE
            found[distance < 0.7, SHAPE] = SHAPE_NAMES.index(shape.name) + 1
            found[distance < 0.7, COLOR] = COLOR_NAMES.index(shape.color) + 1
        for rank, shape in enumerate(reading_order(scene)):
            row, column, _ = self._patch(shape.x, shape.y)
            found[row, column, SHAPE] = SHAPE_NAMES.index(shape.name) + 1
            found[row, column, COLOR] = COLOR_NAMES.index(shape.color) + 1
            found[row, column, CENTRE] = 1
            if rank < MAX_SHAPES:
                found[row, column, RANK] = 1 + MAX_CHARACTERS + rank
        for rank, (character, middle_x, middle_y) in enumerate(_characters(scene)):
            row, column, right = self._patch(middle_x, middle_y)
            found[row, column, RIGHT if right else LEFT] = CHARACTERS.index(character) + 1
            if found[row, column, RANK] == 0 and rank < MAX_CHARACTERS:
                found[row, column, RANK] = 1 + rank
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

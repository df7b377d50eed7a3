"""Tiles and patch labels of the demo model's training agree with the picture and with serving."""

import numpy as np
import pytest

from tessera.launcher.demo import pictures
from tessera.launcher.demo.pictures import COLORS, Scene, Shape, TextLine
from tessera.launcher.demo.tiles import (
    CENTRE,
    COLOR,
    IGNORE,
    LEFT,
    PINPOINTS,
    RIGHT,
    SHAPE,
    SIDE,
    TILE,
    cut,
    labels,
    layout,
)

WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("size", "tiles"), [((640, 480), 2), ((480, 640), 2), ((800, 400), 2), ((1200, 300), 3)]
)
def test_layout_takes_the_pinpoint_of_the_shape(size: tuple[int, int], tiles: int) -> None:
    plan = layout(*size)
    assert plan.num_tiles == 1 + tiles
    assert plan.canvas in PINPOINTS


def test_cut_gives_the_whole_picture_then_the_grid_on_black() -> None:
    scene = Scene(400, 300, "white", WHITE)
    plan = layout(400, 300)
    tiles = cut(pictures.draw(scene), plan)
    assert tiles.shape == (3, 3, TILE, TILE)
    assert (tiles[0] == 255).all()
    assert (tiles[1, :, :, : plan.offset[1]] == 0).all()
    assert (tiles[1, :, :, plan.offset[1] :] == 255).all()


def test_labels_name_the_shape_at_its_middle() -> None:
    shape = Shape("star", "red", COLORS["red"][0], 100, 200, 40, 0.0)
    scene = Scene(400, 400, "white", WHITE, shapes=(shape,))
    found = labels(scene, layout(400, 400))
    row, column = int(200 / 400 * SIDE), int(100 / 400 * SIDE)
    patch = found[0].reshape(SIDE, SIDE, -1)[row, column]
    assert patch[SHAPE] == pictures.SHAPE_NAMES.index("star") + 1
    assert patch[COLOR] == pictures.COLOR_NAMES.index("red") + 1
    assert found[0, :, CENTRE].sum() == 1
    assert found[1:, :, CENTRE].clip(0).sum() == 1


def test_labels_hold_every_character_once_per_view() -> None:
    scene = Scene(400, 300, "white", WHITE, lines=(TextLine("A7K", 30, 60, 150, 0, (0, 0, 0)),))
    found = labels(scene, layout(400, 300))
    for view in (found[:1], found[1:]):
        characters = view[..., LEFT : RIGHT + 1]
        assert sorted(characters[characters > 0]) == sorted(
            pictures.CHARACTERS.index(c) + 1 for c in "A7K"
        )


def test_patches_on_the_black_border_are_ignored() -> None:
    plan = layout(400, 400)
    found = labels(Scene(400, 400, "white", WHITE), plan)
    grid = found[1:].reshape(*plan.grid, SIDE, SIDE, -1)
    assert (grid[:, 0, :, 0] == IGNORE).all()
    assert not np.any(found[0] == IGNORE)

"""How an image is cut into tiles and how many prompt tokens it becomes.

The one place that knows: the router resizes, cuts and counts with it, the shards pack features
with it. Integer arithmetic throughout, so that both ends agree on every size.

Words: a *canvas* is the size a picture is fitted into before it is cut into square *tiles*; the
*overview* is the whole picture squeezed into one tile; a *patch* gives one feature.

A picture that must not become too many tokens is laid out on a smaller canvas, or as its overview
alone. The tiles down and across then say all: from them and the picture's size both ends make the
same plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Strategy = Literal["default", "full"]

LLAVA_NEXT_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""Canvases (height, width) of the v1.6 checkpoints; `LlavaNextConfig`'s default in transformers."""


class ImageLayoutError(ValueError):
    """The configuration describes no usable layout. The message names the key."""


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What becomes of one picture. Sizes are (height, width) in pixels unless said otherwise."""

    resized: tuple[int, int]  # the picture's size on its canvas
    canvas: tuple[int, int]
    offset: tuple[int, int]  # (top, left) of the picture on the canvas; negative: cropped
    grid: tuple[int, int]  # tiles down and across that follow the overview; (0, 0): none
    kept: tuple[int, int]  # patch rows and columns of the grid that become features
    cut: tuple[int, int]  # patch rows cut at the top, patch columns cut at the left
    num_tokens: int

    @property
    def num_tiles(self) -> int:
        """Tiles the vision tower sees, the overview included."""
        return 1 + self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class AnyResLayout:
    """LLaVA-NeXT: an overview and a grid of tiles on the canvas that fits best ("anyres")."""

    tile: int  # side of a tile = of the vision tower's input, pixels; 336 for CLIP-L/14@336
    patch: int  # side of a patch, pixels; 14 for CLIP-L/14@336
    pinpoints: tuple[tuple[int, int], ...] = LLAVA_NEXT_PINPOINTS
    strategy: Strategy = "default"  # "full" keeps the overview's class feature

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    @property
    def overview_tokens(self) -> int:
        """Features of the overview tile."""
        return self.side**2 + (self.strategy == "full")

    @property
    def min_tokens(self) -> int:
        """Fewest tokens any picture can become: those of its overview."""
        return self.overview_tokens

    @property
    def max_tokens(self) -> int:
        """Most tokens any picture can become."""
        most = max(h // self.patch * (w // self.patch + 1) for h, w in self.pinpoints)
        return self.overview_tokens + most

    def plan(self, height: int, width: int, max_tokens: int | None = None) -> ImagePlan:
        """Tiling of a picture of `height` x `width` pixels, both at least 1.

        Args:
            max_tokens: only canvases on which the picture becomes at most so many tokens count; if
                there is none, the overview stands alone, also when even that is more. None: all.

        The overview gives (tile / patch)**2 features (one more when `full`). The grid gives one
        feature per patch that is not padding, plus one `image_newline` after each patch row.

        Returns:
            For 336/14 and the v1.6 pinpoints, 640 x 640 becomes 2928 tokens, 480 x 640 2340.

        Source:
            transformers 5.23, `select_best_resolution`, `_get_resize_output_image_size`-alikes of
            `LlavaNextImageProcessor` and `LlavaNextProcessor._get_number_of_features`, which this
            equals on all sizes tests/proto/test_image_layout.py draws. (`unpad_image` rounds
            height * columns / width to 7 digits before truncating; integer division gives the
            same up to 20,000 pixels.)
        """
        canvases = self.pinpoints
        if max_tokens is not None:
            fits = [self._on_canvas(height, width, c).num_tokens <= max_tokens for c in canvases]
            canvases = tuple(c for c, fit in zip(canvases, fits, strict=True) if fit)
        if not canvases:
            return self._overview_only()
        return self._on_canvas(height, width, _best_canvas(height, width, canvases))

    def plan_on(self, height: int, width: int, grid: tuple[int, int]) -> ImagePlan:
        """Tiling of a picture on so many tiles down and across; (0, 0): the overview alone.

        Raises:
            ImageLayoutError: no canvas has that grid.
        """
        if grid == (0, 0):
            return self._overview_only()
        canvas = (grid[0] * self.tile, grid[1] * self.tile)
        if canvas not in self.pinpoints:
            raise ImageLayoutError(f"no canvas of this model has {grid[0]} x {grid[1]} tiles.")
        return self._on_canvas(height, width, canvas)

    def _overview_only(self) -> ImagePlan:
        whole = (self.tile, self.tile)
        return ImagePlan(whole, whole, (0, 0), (0, 0), (0, 0), (0, 0), self.overview_tokens)

    def _on_canvas(self, height: int, width: int, canvas: tuple[int, int]) -> ImagePlan:
        resized = _fit(height, width, canvas)
        offset = ((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2)
        rows, columns = canvas[0] // self.patch, canvas[1] // self.patch
        cut = (0, 0)
        if width * rows > columns * height:  # wider than the canvas: padding above and below
            cut = ((rows - height * columns // width) // 2, 0)
        else:
            cut = (0, (columns - width * rows // height) // 2)
        kept = (rows - 2 * cut[0], columns - 2 * cut[1])
        return ImagePlan(
            resized=resized,
            canvas=canvas,
            offset=offset,
            grid=(canvas[0] // self.tile, canvas[1] // self.tile),
            kept=kept,
            cut=cut,
            num_tokens=self.overview_tokens + kept[0] * (kept[1] + 1),
        )


@dataclass(frozen=True, slots=True)
class CropLayout:
    """LLaVA-1.5: the shortest edge resized to one tile, then a centre crop. No grid."""

    tile: int
    patch: int
    strategy: Strategy = "default"

    @property
    def min_tokens(self) -> int:
        """Tokens of a picture; every picture becomes as many."""
        return (self.tile // self.patch) ** 2 + (self.strategy == "full")

    @property
    def max_tokens(self) -> int:
        """The same: there is nothing to leave out."""
        return self.min_tokens

    def plan(self, height: int, width: int, max_tokens: int | None = None) -> ImagePlan:
        """Resize and crop of a picture of `height` x `width` pixels, both at least 1.

        Args:
            max_tokens: changes nothing, because there are no canvases to choose from.

        Source: transformers 5.23, `get_resize_output_image_size` (shortest edge, no limit on the
        longest: int(shortest * longest / shortest edge)) and `center_crop`.
        """
        short, long = sorted((height, width))
        longest = self.tile * long // short
        resized = (self.tile, longest) if height <= width else (longest, self.tile)
        offset = (-((resized[0] - self.tile) // 2), -((resized[1] - self.tile) // 2))
        return ImagePlan(
            resized=resized,
            canvas=(self.tile, self.tile),
            offset=offset,
            grid=(0, 0),
            kept=(0, 0),
            cut=(0, 0),
            num_tokens=self.max_tokens,
        )

    def plan_on(self, height: int, width: int, grid: tuple[int, int]) -> ImagePlan:
        """The same plan: there is no grid.

        Raises:
            ImageLayoutError: `grid` is not (0, 0).
        """
        if grid != (0, 0):
            raise ImageLayoutError("this model's pictures are one tile each.")
        return self.plan(height, width)


ImageLayout = AnyResLayout | CropLayout


def layout_from_config(config: Mapping[str, Any]) -> ImageLayout | None:
    """The layout a model's config.json asks for, or None for a text model.

    Raises:
        ImageLayoutError: a key holds something no layout can be made of.
    """
    model_type = config.get("model_type")
    if model_type not in ("llava", "llava_next"):
        return None
    tile, patch = _tile_and_patch(config.get("vision_config") or {})
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise ImageLayoutError(
            f"vision_feature_select_strategy={strategy!r} must be 'default' or 'full'."
        )
    if model_type == "llava":
        return CropLayout(tile, patch, strategy)
    pinpoints = config.get("image_grid_pinpoints") or LLAVA_NEXT_PINPOINTS
    return AnyResLayout(tile, patch, _checked_pinpoints(pinpoints, tile), strategy)


def _tile_and_patch(vision: Any) -> tuple[int, int]:
    if not isinstance(vision, Mapping):
        raise ImageLayoutError(f"vision_config={vision!r} must be an object.")
    # An absent vision_config means CLIP-L/14@336, an absent key in it CLIPVisionConfig's default.
    tile = vision.get("image_size", 224 if vision else 336)
    patch = vision.get("patch_size", 32 if vision else 14)
    whole = isinstance(tile, int) and isinstance(patch, int)
    if not whole or patch < 1 or tile < patch or tile % patch:
        raise ImageLayoutError(
            f"vision_config.image_size={tile} must be a positive multiple of patch_size={patch}."
        )
    return tile, patch


def _checked_pinpoints(pinpoints: Any, tile: int) -> tuple[tuple[int, int], ...]:
    try:
        pairs = tuple((int(height), int(width)) for height, width in pinpoints)
    except (TypeError, ValueError):
        raise ImageLayoutError(
            f"image_grid_pinpoints={pinpoints!r} must be a list of [height, width] pairs."
        ) from None
    for pair in pairs:
        if min(pair) < tile or pair[0] % tile or pair[1] % tile:
            raise ImageLayoutError(
                f"image_grid_pinpoints has {list(pair)}; both must be multiples of "
                f"image_size={tile}."
            )
    return pairs


def _best_canvas(height: int, width: int, canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The canvas that keeps most of the picture's pixels; among equals, the smallest waste."""

    def kept_and_waste(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=kept_and_waste)


def _fit(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """The largest size of that aspect ratio inside `canvas`.

    Source: transformers 5.23, `get_patch_output_size`; its ceil of a float product is kept, because
    an exact ceiling differs from it for some sizes.
    """
    scale_height, scale_width = canvas[0] / height, canvas[1] / width
    if scale_width < scale_height:
        return min(_ceil(height * scale_width), canvas[0]), canvas[1]
    return canvas[0], min(_ceil(width * scale_height), canvas[1])


def _ceil(value: float) -> int:
    return int(-(-value // 1))

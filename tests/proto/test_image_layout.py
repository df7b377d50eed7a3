"""The image arithmetic equals transformers' on tens of thousands of sizes."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tessera.proto.image_layout import (
    LLAVA_NEXT_PINPOINTS,
    AnyResLayout,
    CropLayout,
    ImageLayoutError,
    layout_from_config,
)
from tests.shard.models.oracle import cut

Size = tuple[int, int]

V16 = AnyResLayout(336, 14)
CUSTOM = AnyResLayout(512, 32, ((512, 512), (1024, 1024), (512, 2048)), "full")
NUM_SIZES = 20_000


def random_sizes(count: int, limit: int, seed: int = 0) -> Iterator[Size]:
    """Uniform sizes, and as many with logarithmic sides: small and extreme ones."""
    generator = np.random.Generator(np.random.PCG64(seed))
    uniform = generator.integers(1, limit + 1, (count // 2, 2))
    skewed = np.exp(generator.uniform(0, np.log(limit), (count - count // 2, 2))).astype(int)
    for height, width in np.concatenate((uniform, skewed)).tolist():
        yield max(height, 1), max(width, 1)


@pytest.fixture(scope="module")
def anyres() -> SimpleNamespace:
    """The functions of transformers that LLaVA-NeXT's arithmetic is spread over."""
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    return SimpleNamespace(
        best=select_best_resolution,
        output_size=get_patch_output_size,
        unpad=unpad_image,
        unpadded=LlavaNextProcessor._get_unpadded_features,
    )


def blank(size: Size) -> "np.ndarray[Any, Any]":
    """A picture of any size that takes no memory."""
    return np.broadcast_to(np.uint8(0), (3, *size))


def assert_plan_agrees(layout: AnyResLayout, size: Size, anyres: SimpleNamespace) -> None:
    plan, pinpoints = layout.plan(*size), [list(pair) for pair in layout.pinpoints]
    canvas = anyres.best(list(size), pinpoints)
    resized = anyres.output_size(blank(size), canvas, input_data_format="channels_first")
    grid = tuple(side // layout.tile for side in canvas)
    features, newlines = anyres.unpadded(None, *size, layout.side, layout.side, *grid)
    assert plan.canvas == tuple(canvas), size
    assert plan.resized == tuple(resized), size
    assert plan.grid == grid, size
    assert plan.offset == tuple((c - r) // 2 for c, r in zip(canvas, resized, strict=True)), size
    assert plan.num_tokens == layout.overview_tokens + features + newlines, size
    assert plan.num_tokens <= layout.max_tokens


@pytest.mark.parametrize("layout", [V16, CUSTOM], ids=["v1.6 default", "custom full"])
def test_plan_equals_transformers(layout: AnyResLayout, anyres: SimpleNamespace) -> None:
    for size in random_sizes(NUM_SIZES, 4000):
        assert_plan_agrees(layout, size, anyres)


def test_plan_equals_transformers_on_huge_pictures(anyres: SimpleNamespace) -> None:
    for size in random_sizes(2000, 20_000, seed=1):
        assert_plan_agrees(V16, size, anyres)


@pytest.mark.parametrize("layout", [V16, CUSTOM], ids=["v1.6", "custom"])
def test_the_kept_features_are_those_that_transformers_keeps(
    layout: AnyResLayout, anyres: SimpleNamespace
) -> None:
    """Not only as many, but the same rows and columns of the grid."""
    for size in random_sizes(2000, 4000, seed=2):
        plan = layout.plan(*size)
        rows, columns = (side // layout.patch for side in plan.canvas)
        grid = torch.arange(rows * columns).view(1, rows, columns)
        top, left = plan.cut
        ours = grid[:, top : top + plan.kept[0], left : left + plan.kept[1]]
        assert torch.equal(ours, anyres.unpad(grid, size)), size


def test_documented_sizes() -> None:
    """Counts of LLaVA-NeXT's own code for well-known sizes (height, width)."""
    counts = {
        (336, 336): 1176,
        (480, 640): 2340,
        (640, 480): 2352,
        (672, 672): 2928,
        (336, 1344): 1890,
        (1344, 336): 1944,
        (1080, 1920): 1948,
        (1, 1000): 576,
        (1000, 1): 648,
        (1, 1): 1176,
    }
    assert {size: V16.plan(*size).num_tokens for size in counts} == counts
    assert V16.max_tokens == 2928


def test_crop_equals_transformers() -> None:
    from transformers.image_transforms import get_resize_output_image_size

    layout = CropLayout(336, 14)
    for size in random_sizes(NUM_SIZES, 4000, seed=3):
        resized = get_resize_output_image_size(
            blank(size), 336, default_to_square=False, input_data_format="channels_first"
        )
        plan = layout.plan(*size)
        assert plan.resized == tuple(resized), size
        assert plan.offset == tuple(-((side - 336) // 2) for side in resized), size
        assert plan.num_tokens == 576


@pytest.fixture(scope="module")
def processors() -> dict[str, Any]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    plain: dict[str, Any] = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
    size: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    pinpoints: dict[str, Any] = {
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    }
    return {
        "crop": lambda image: CLIPImageProcessorPil(**size)(image, **plain),
        "anyres": lambda image: LlavaNextImageProcessorPil(**size, **pinpoints)(image, **plain),
    }


@pytest.mark.parametrize("name", ["crop", "anyres"])
def test_pixels_cut_by_a_plan_are_those_of_the_processor(
    name: str, processors: dict[str, Any]
) -> None:
    """The plan says all that is needed to cut a picture: bit for bit, tile for tile."""
    pinpoints = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    layout = CropLayout(28, 7) if name == "crop" else AnyResLayout(28, 7, pinpoints)
    generator = np.random.Generator(np.random.PCG64(4))
    for height, width in random_sizes(150, 300, seed=5):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        expected = processors[name](image)["pixel_values"]
        expected = expected[0] if name == "anyres" else expected
        ours = cut(image, layout).tiles.permute(0, 3, 1, 2)
        assert torch.equal(ours.double(), expected.double()), (height, width)


def test_layout_of_a_hub_configuration() -> None:
    config = {
        "model_type": "llava_next",
        "vision_config": {"image_size": 336, "patch_size": 14},
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "vision_feature_select_strategy": "default",
    }
    assert layout_from_config(config) == V16


def test_defaults_of_absent_keys() -> None:
    """No vision_config means CLIP-L/14@336; one without sizes means CLIP's smallest."""
    assert layout_from_config({"model_type": "llava_next"}) == V16
    assert layout_from_config({"model_type": "llava"}) == CropLayout(336, 14)
    assert layout_from_config(
        {"model_type": "llava", "vision_config": {"hidden_size": 64}}
    ) == CropLayout(224, 32)
    assert layout_from_config({"model_type": "llama"}) is None
    assert V16.pinpoints == LLAVA_NEXT_PINPOINTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_pinpoints": [[336, 500]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [336]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[0, 336]]}, "image_grid_pinpoints"),
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),
        ({"vision_config": {"image_size": 330, "patch_size": 14}}, "image_size"),
        ({"vision_config": {"image_size": 336, "patch_size": 0}}, "patch_size"),
        ({"vision_config": {"image_size": [336, 336], "patch_size": 14}}, "image_size"),
        ({"vision_config": {"image_size": 336, "patch_size": None}}, "patch_size"),
        ({"vision_config": "clip"}, "vision_config"),
    ],
)
def test_unusable_configurations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageLayoutError, match=message):
        layout_from_config({"model_type": "llava_next", **changes})


SIDES = st.integers(1, 5000)


@settings(max_examples=2000, deadline=None)
@given(SIDES, SIDES, st.integers(-10, 3000), st.sampled_from([V16, CUSTOM]))
def test_a_limited_plan_fits_and_is_the_best_that_does(
    height: int, width: int, max_tokens: int, layout: AnyResLayout
) -> None:
    plan, whole = layout.plan(height, width, max_tokens), layout.plan(height, width)
    assert plan.num_tokens <= max(max_tokens, layout.min_tokens)
    if whole.num_tokens <= max_tokens:
        assert plan == whole
    fitting = tuple(
        canvas
        for canvas in layout.pinpoints
        if AnyResLayout(layout.tile, layout.patch, (canvas,), layout.strategy)
        .plan(height, width)
        .num_tokens
        <= max_tokens
    )
    if fitting:  # as if the model had only these canvases
        only = AnyResLayout(layout.tile, layout.patch, fitting, layout.strategy)
        assert plan == only.plan(height, width)
    else:
        assert (plan.grid, plan.num_tiles, plan.num_tokens) == ((0, 0), 1, layout.min_tokens)


@settings(max_examples=500, deadline=None)
@given(SIDES, SIDES, st.none() | st.integers(0, 3000), st.sampled_from([V16, CUSTOM]))
def test_both_ends_make_the_same_plan_from_size_and_grid(
    height: int, width: int, max_tokens: int | None, layout: AnyResLayout
) -> None:
    plan = layout.plan(height, width, max_tokens)
    assert layout.plan_on(height, width, plan.grid) == plan


def test_a_grid_no_canvas_has_is_refused() -> None:
    with pytest.raises(ImageLayoutError, match="3 x 3 tiles"):
        V16.plan_on(100, 100, (3, 3))
    crop = CropLayout(336, 14)
    assert crop.plan_on(100, 200, (0, 0)) == crop.plan(100, 200) == crop.plan(100, 200, 5)
    with pytest.raises(ImageLayoutError, match="one tile"):
        crop.plan_on(100, 100, (1, 1))

"""A picture on a smaller canvas than its best gives what a model with only that canvas gives."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tessera.proto import shard_pb2
from tessera.proto.image_layout import AnyResLayout
from tessera.router.images import prepare_image
from tessera.router.request import PreparedImage
from tessera.router.scheduler import StepPlan
from tessera.router.shards import step_message
from tessera.shard.engine import _tiles
from tests import checkpoints
from tests.shard.backends.pool import CPU
from tests.shard.models.cases import ATOL, QUESTION
from tests.shard.models.driver import Runner
from tests.shard.models.oracle import Oracle, picture

Oracles = Callable[[str], Oracle]
Runners = Callable[..., Runner]

SMALLER = {  # canvases that only a limit makes a square picture use
    "next-mistral": [[56, 112], [112, 56]],
    "next-vicuna": [[168, 56]],
    "next-custom": [[64, 64]],
}


def fitted(image: Image.Image, layout: AnyResLayout, max_tokens: int) -> PreparedImage:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return prepare_image(buffer.getvalue(), layout, 10**6, max_tokens)


def sent(image: PreparedImage) -> shard_pb2.Image:
    return step_message(StepPlan(images=[image]), 0).images[0]


@pytest.mark.parametrize("kind", SMALLER)
def test_logits_are_those_of_a_model_with_fewer_canvases(
    kind: str, oracle: Oracles, runner: Runners, tmp_path: Path
) -> None:
    folder = checkpoints.make(kind, tmp_path / kind, {"image_grid_pinpoints": SMALLER[kind]})
    reference, ours = Oracle(folder), runner(kind)
    layout, few = oracle(kind).layout, reference.layout
    assert isinstance(layout, AnyResLayout) and isinstance(few, AnyResLayout)
    image = picture(128, 128)
    tokens = few.plan(128, 128).num_tokens
    case = reference.case(QUESTION, [image])
    prepared = fitted(image, layout, tokens)
    if kind == "next-vicuna":  # not the best of its size: the model takes what it is told
        prepared = fitted(image, few, tokens)
    assert prepared.num_tokens == tokens < layout.plan(128, 128).num_tokens
    case.prompt.images = [_tiles(sent(prepared), CPU)]
    torch.testing.assert_close(ours.logits(case.prompt), reference.logits(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("kind", ["next-mistral", "next-custom"])
def test_an_overview_alone_gives_exactly_the_features_of_the_overview(
    kind: str, oracle: Oracles, runner: Runners
) -> None:
    layout, model = oracle(kind).layout, runner(kind).model
    assert isinstance(layout, AnyResLayout)
    image = picture(128, 128)
    both = [fitted(image, layout, most) for most in (layout.max_tokens, layout.min_tokens)]
    assert [one.num_tiles for one in both] == [layout.plan(128, 128).num_tiles, 1]
    with torch.inference_mode():
        whole, overview = (model.encode_images([_tiles(sent(one), CPU)])[0] for one in both)
        together = model.encode_images([_tiles(sent(one), CPU) for one in both])
    assert overview.shape[0] == layout.min_tokens
    torch.testing.assert_close(overview, whole[: layout.min_tokens], atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1], overview, atol=1e-5, rtol=0)

"""Pictures that are too large for their prompt: laid out smaller, told in the reply, or refused."""

import asyncio
import base64
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.applications import Starlette

from tessera.proto.image_layout import AnyResLayout, CropLayout, ImageLayout
from tessera.router.errors import ValidationError
from tessera.router.images import prepare_image
from tessera.router.metrics import Metrics
from tessera.router.picture_allowance import PictureAllowance
from tessera.router.pictures import Pictures, fitting_tokens, reductions
from tessera.router.request import Request
from tessera.router.settings import RouterSettings
from tessera.router.validation import Validator
from tests.router.http_fakes import LIMITS, FakeGenerator, events, post
from tests.router.test_validation import build, native

MakeValidator = Callable[..., Validator]
App = Callable[..., Starlette]

V16 = AnyResLayout(336, 14)
FULL = AnyResLayout(512, 32, ((512, 512), (1024, 1024), (512, 2048)), "full")
CROP = CropLayout(56, 14)
OVERVIEW = 16  # tokens of an overview in the tiny checkpoints; the largest picture has 88
SIZES = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=6)


def png(width: int = 112, height: int = 112, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def source(width: int = 112, height: int = 112) -> str:
    return base64.b64encode(png(width, height)).decode()


def limited(max_input_tokens: int) -> FakeGenerator:
    return FakeGenerator(limits=replace(LIMITS, max_input_tokens=max_input_tokens))


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(0, 12_000), st.sampled_from([V16, FULL, CROP]))
def test_pictures_are_reduced_until_all_fit_and_no_further(
    sizes: list[tuple[int, int]], room: int, layout: ImageLayout
) -> None:
    wanted = [layout.plan(*size).num_tokens for size in sizes]
    tokens = fitting_tokens(layout, sizes, room)
    assert sum(tokens) <= max(room, len(sizes) * layout.min_tokens)
    assert all(layout.min_tokens <= t <= w for t, w in zip(tokens, wanted, strict=True))
    if sum(wanted) <= room:
        assert tokens == wanted
    for size, count in zip(sizes, tokens, strict=True):  # a limit of so many gives so many
        assert layout.plan(*size, count).num_tokens == count
    for t, w in zip(tokens, wanted, strict=True):  # the smaller ones were left alone, if any
        assert t < w or t <= min(
            (w for t, w in zip(tokens, wanted, strict=True) if t < w), default=t
        )


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 3000))
def test_one_picture_gets_the_best_canvas_that_fits(height: int, width: int, room: int) -> None:
    assert fitting_tokens(V16, [(height, width)], room) == [
        V16.plan(height, width, room).num_tokens
    ]


def test_the_largest_picture_is_reduced_first() -> None:
    small, large = (300, 100), (672, 672)
    tokens = fitting_tokens(V16, [small, large], 3500)
    assert tokens == [V16.plan(*small).num_tokens, V16.plan(*large, 2927).num_tokens]
    # Equal ones are reduced alike as soon as one of them alone does not make room enough.
    assert fitting_tokens(V16, [large, large], 2400) == [1176, 1176]
    assert fitting_tokens(V16, [large, large], 4200) == [1176, 2928]


def test_impossible_room_leaves_the_overviews() -> None:
    assert fitting_tokens(V16, [(672, 672)] * 2, 100) == [576, 576]


def test_content_hashes_of_different_plans_differ() -> None:
    """Also of a picture whose tiles are the same on both canvases: black on black."""
    upright, lying = (AnyResLayout(56, 14, (size,)) for size in ((56, 112), (112, 56)))
    black = png(100, 100, "black")
    pictures = [prepare_image(black, layout, 10**6) for layout in (upright, lying)]
    assert pictures[0].tiles == pictures[1].tiles
    pictures.append(prepare_image(black, upright, 10**6, max_tokens=OVERVIEW))
    assert len({picture.content_hash for picture in pictures}) == 3
    assert pictures[2].tiles == pictures[0].tiles[: 56 * 56 * 3]
    assert (pictures[2].grid, pictures[2].num_tiles) == ((0, 0), 1)


def test_only_pictures_that_must_change_are_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int | None] = []

    def counting(data: bytes, layout: ImageLayout, pixels: int, most: int | None) -> Any:
        decoded.append(most)
        return prepare_image(data, layout, pixels, most)

    monkeypatch.setattr("tessera.router.pictures.prepare_image", counting)
    layout = AnyResLayout(56, 14, ((56, 112), (112, 56), (112, 112)))
    options = RouterSettings()
    pictures = Pictures(layout, options, Metrics().pictures)
    sources = [source(), source(20, 20)]
    one = asyncio.run(pictures.prepare(sources[:1], 50, PictureAllowance(options)))
    assert (len(decoded), one[0].num_tokens) == (1, 36)
    decoded.clear()
    both = asyncio.run(pictures.prepare(sources, 60, PictureAllowance(options)))
    assert [image.num_tokens for image in both] == [16, 36]
    assert len(decoded) == 3
    pictures.close()


def test_what_was_reduced_is_told() -> None:
    layout = AnyResLayout(56, 14, ((56, 112), (112, 112)))
    images = [prepare_image(png(), layout, 10**6, most) for most in (None, 50, 16)]
    assert reductions(layout, images, 100, "MAX_INPUT_TOKENS") == (
        "Picture 2 of 3 was reduced to an overview and 1 x 2 tiles, 36 tokens instead of 88, "
        "so that the prompt fits in 100 tokens (MAX_INPUT_TOKENS).",
        "Picture 3 of 3 was reduced to its overview alone, 16 tokens instead of 88, "
        "so that the prompt fits in 100 tokens (MAX_INPUT_TOKENS).",
    )


def fitted(make_validator: MakeValidator, text: str, limit: int, **parameters: Any) -> Request:
    validator = make_validator("next-mistral", limited(limit))
    return build(validator, native(text, **parameters))


def test_a_prompt_that_fits_is_left_alone(make_validator: MakeValidator) -> None:
    text = f"<image>{source()}</image>What?"
    whole = fitted(make_validator, text, 480)
    assert whole.warnings == ()
    again = fitted(make_validator, text, len(whole.prompt_ids))
    assert (again.prompt_ids, again.images, again.warnings) == (whole.prompt_ids, whole.images, ())


@pytest.mark.parametrize("count", [1, 3])
def test_a_prompt_is_made_to_fit_down_to_the_overviews(
    make_validator: MakeValidator, count: int
) -> None:
    text = f"<image>{source()}</image>" * count + "What?"
    whole = fitted(make_validator, text, 480)
    text_tokens = len(whole.prompt_ids) - whole.num_image_tokens
    for limit in range(text_tokens + count * OVERVIEW, len(whole.prompt_ids), 7):
        request = fitted(make_validator, text, limit)
        assert len(request.prompt_ids) <= limit
        reduced = [p for p in request.images if p.image.num_tokens < 88]
        assert len(request.warnings) == len(reduced) > 0
        for placed in request.images:
            tokens = request.prompt_ids[placed.offset : placed.offset + placed.image.num_tokens]
            assert len(tokens) == placed.image.num_tokens and len(set(tokens)) == 1
            assert len(placed.image.tiles) == placed.image.num_tiles * 56 * 56 * 3
            rows, columns = placed.image.grid
            assert placed.image.num_tiles == 1 + rows * columns
    with pytest.raises(ValidationError, match="reduced as far as possible") as refused:
        fitted(make_validator, text, text_tokens + count * OVERVIEW - 1)
    assert f"{text_tokens} text tokens and {count * OVERVIEW} image tokens" in str(refused.value)
    assert "MAX_INPUT_TOKENS" in str(refused.value)


def test_rejecting_says_the_numbers_and_the_ways_out(make_validator: MakeValidator) -> None:
    validator = make_validator("next-mistral", limited(60), image_overflow="reject")
    with pytest.raises(ValidationError) as refused:
        build(validator, native(f"<image>{source()}</image>What?"))
    message = str(refused.value)
    assert refused.value.status == 422
    for part in ("less than 60", "text tokens and 88 image tokens", "fewer or smaller pictures"):
        assert part in message
    assert "MAX_INPUT_TOKENS" in message and "IMAGE_OVERFLOW=fit" in message


def test_a_picture_that_cannot_be_reduced_is_refused(make_validator: MakeValidator) -> None:
    with pytest.raises(ValidationError, match="16 image tokens"):
        build(make_validator("llava15", limited(15)), native(f"<image>{source()}</image>a"))


def test_truncation_cuts_the_text_before_a_picture_and_then_reduces_it(
    make_validator: MakeValidator,
) -> None:
    text = f"one two three four five<image>{source()}</image>What?"
    kept = fitted(make_validator, text, 480, truncate=100)
    assert (len(kept.prompt_ids), kept.warnings) == (100, ())
    assert kept.images[0].image.num_tokens == 88
    reduced = fitted(make_validator, text, 480, truncate=60)
    assert len(reduced.prompt_ids) <= 60
    assert reduced.images[0].image.num_tokens < 88
    assert "fits in 60 tokens (truncate)" in reduced.warnings[0]


def test_pictures_that_truncation_must_drop_are_dropped(make_validator: MakeValidator) -> None:
    text = f"<image>{source()}</image>" + "one two three four five " * 3
    request = fitted(make_validator, text, 480, truncate=8)
    assert (len(request.prompt_ids), request.images, request.warnings) == (8, (), ())


@pytest.mark.parametrize("kind", ["next-yi", "next-vicuna", "next-custom"])
def test_every_kind_of_checkpoint_fits(make_validator: MakeValidator, kind: str) -> None:
    request = build(
        make_validator(kind, limited(60)), native(f"<image>{source(128, 128)}</image>What?")
    )
    assert len(request.prompt_ids) <= 60 and len(request.warnings) == 1


def test_tokenize_counts_what_would_be_generated_from(make_validator: MakeValidator) -> None:
    validator = make_validator("next-mistral", limited(60))
    text = f"<image>{source()}</image>What?"
    spans = asyncio.run(validator.tokenize(text))
    assert tuple(span.id for span in spans) == build(validator, native(text)).prompt_ids


PROMPT = f"<image>{source()}</image>What?"
CHAT = {"messages": [{"role": "user", "content": [
    {"type": "text", "text": "What?"},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{source()}"}},
]}]}  # fmt: skip
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": PROMPT}),
    ("/", {"inputs": PROMPT}),
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"prompt": PROMPT}),
    ("/v1/chat/completions", {**CHAT, "n": 2}),
]


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_replies_state_it(vision_app: App, path: str, body: dict[str, Any]) -> None:
    response = post(vision_app(limited(90)), path, body)
    assert response.status_code == 200, response.text
    reply = response.json()
    reply = reply[0] if path == "/" else reply
    (warning,) = reply["warnings"]
    assert "instead of 88" in warning
    assert response.headers["x-warnings"] == warning
    fine = post(vision_app(), path, body)
    assert "warnings" not in fine.text and "x-warnings" not in fine.headers


STREAMS: list[tuple[str, dict[str, Any]]] = [
    ("/generate_stream", {"inputs": PROMPT}),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "n": 2}),
    (
        "/v1/chat/completions",
        {**CHAT, "stream": True, "stream_options": {"include_usage": True}},
    ),
    ("/v1/completions", {"prompt": PROMPT, "stream": True}),
]


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_streams_state_it_in_the_header_and_last_event(
    vision_app: App, path: str, body: dict[str, Any]
) -> None:
    response = post(vision_app(limited(90)), path, body)
    *others, last = events(response)
    assert last["warnings"] == [response.headers["x-warnings"]]
    assert not any("warnings" in one for one in others)
    fine = post(vision_app(), path, body)
    assert "warnings" not in fine.text and "x-warnings" not in fine.headers


def test_several_warnings_are_one_line_in_the_header(vision_app: App) -> None:
    response = post(vision_app(limited(90)), "/generate", {"inputs": PROMPT * 2})
    warnings = response.json()["warnings"]
    assert len(warnings) == 2
    assert response.headers["x-warnings"] == f"{warnings[0]} (1 more in `warnings`)"


def test_rejection_over_http(vision_app: App) -> None:
    response = post(vision_app(limited(90), image_overflow="reject"), *BODIES[0])
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")

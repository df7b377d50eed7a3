"""Requests as clients send them: seeded, with the answer each of them will get.

Token ids are random numbers; only which of them are equal matters. Pictures have sizes that
cameras, screens and web pages give them and become as many tokens as `proto.image_layout` says.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from tessera.proto.image_layout import AnyResLayout
from tessera.router.request import (
    PlacedImage,
    PreparedImage,
    Request,
    SamplingParams,
    StoppingParams,
)

PLACEHOLDER_ID = 70_000  # outside of what random text draws from
LAYOUT = AnyResLayout(tile=336, patch=14)

PICTURE_SIZES = (
    (480, 640),
    (768, 1024),
    (720, 1280),
    (1080, 1920),
    (1920, 1080),
    (600, 800),
    (640, 640),
    (375, 500),
    (336, 336),
    (3024, 4032),
)
"""(height, width) in pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """One request, when it is sent and what becomes of it."""

    kind: str
    at_s: float  # since the trace's start, or since the end of the request it follows
    request: Request
    output_ids: tuple[int, ...]  # what the model will say; ends on its own after that
    follows: "Arrival | None" = None  # the turn before it in a chat
    patience_s: float | None = None  # the client leaves when nothing has come by then
    leaves_after: int | None = None  # tokens after which the client leaves

    @property
    def num_output_tokens(self) -> int:
        """Tokens the client stays for."""
        return min(len(self.output_ids), self.leaves_after or len(self.output_ids))


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal distribution of token counts."""

    median: int
    sigma: float
    most: int

    def draw(self, rng: Random) -> int:
        """A count from 1 to `most`."""
        return max(1, min(self.most, round(self.median * rng.lognormvariate(0, self.sigma))))


def text_ids(rng: Random, count: int) -> tuple[int, ...]:
    """`count` random token ids."""
    return tuple(array("H", rng.randbytes(2 * count)))


def picture(rng: Random) -> PreparedImage:
    """A picture nobody has sent yet, without its pixels."""
    height, width = rng.choice(PICTURE_SIZES)
    plan = LAYOUT.plan(height, width)
    return PreparedImage(rng.randbytes(16), height, width, plan.num_tiles, b"", plan.num_tokens)


def poisson(rng: Random, per_s: float, duration_s: float) -> Iterator[float]:
    """Times at which independent clients send, `per_s` a second on average."""
    at = rng.expovariate(per_s)
    while at < duration_s:
        yield at
        at += rng.expovariate(per_s)


def request_of(
    prompt_ids: tuple[int, ...],
    max_new_tokens: int,
    images: tuple[PlacedImage, ...] = (),
    key: str = "",
) -> Request:
    """A greedy request."""
    stopping = StoppingParams(max_new_tokens)
    return Request(prompt_ids, images, SamplingParams(), stopping, fairness_key=key)


def with_pictures(
    rng: Random, images: list[PreparedImage], text_tokens: int
) -> tuple[tuple[int, ...], tuple[PlacedImage, ...]]:
    """A prompt that begins with pictures: its ids and where they lie in it."""
    ids = text_ids(rng, 4)
    placed = []
    for image in images:
        placed.append(PlacedImage(image, len(ids)))
        ids += (PLACEHOLDER_ID,) * image.num_tokens
    return ids + text_ids(rng, text_tokens), tuple(placed)

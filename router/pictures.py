"""A request's pictures: read, decoded off the event loop, and laid out so that its prompt fits.

Each picture becomes as many tokens as its best canvas gives. Where that is more than the prompt may
hold (IMAGE_OVERFLOW=fit), the largest one is laid out on a smaller canvas, again and again until
all of them fit; the last resort is a picture's overview alone.
"""

import asyncio
import time
from collections.abc import Collection, Coroutine, Mapping, Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Any, TypeVar

from tessera.proto.image_layout import ImageLayout
from tessera.router.errors import ValidationError
from tessera.router.fair_threads import FairThreads
from tessera.router.image_fetch import ImageFetcher
from tessera.router.images import count_pixels, decode_image_source, prepare_image, scheme_of
from tessera.router.local_images import LocalImages
from tessera.router.metrics.pictures import PictureMetrics
from tessera.router.picture_allowance import PictureAllowance
from tessera.router.request import PreparedImage
from tessera.router.settings import RouterSettings

T = TypeVar("T")


class Pictures:
    """Prepares pictures for one model."""

    def __init__(
        self, layout: ImageLayout, settings: RouterSettings, metrics: PictureMetrics
    ) -> None:
        """Start no thread yet.

        Raises:
            SettingsError: the settings name hosts or folders that cannot be.
        """
        self._layout = layout
        self._metrics = metrics
        self._max_pixels = settings.max_image_pixels
        self._threads = FairThreads(settings.validation_workers, "pictures")
        self._fetcher = ImageFetcher(settings)
        self._local = LocalImages(settings.allowed_image_paths)

    def close(self) -> None:
        """Stop the threads; work that has not begun is dropped."""
        self._threads.close()
        self._fetcher.close()

    async def prepare(
        self,
        sources: Sequence[str],
        room: int | None,
        allowance: PictureAllowance,
        overviews: Collection[int] = (),
    ) -> list[PreparedImage]:
        """Read pictures, decode them and cut them into tiles, as far as it is the request's turn.

        Nothing outlives this call but what a thread is doing: cancelling it ends its fetches.

        Args:
            sources: what the client wrote where a picture is expected.
            room: tokens that all of them may become together, if their layout allows it; None: any
                number.
            allowance: what the pictures of the request may still cost.
            overviews: indices of those that are wanted as an overview alone, without tiles.

        Raises:
            ValidationError: one of them cannot be used; says which.
        """
        with allowance.stages.measured("read pictures"):
            files = await self._read(sources, allowance)
        # What one picture can become at most: a picture on its own is never decoded twice.
        most = None if room is None else room - (len(sources) - 1) * self._layout.min_tokens
        everything = dict(enumerate(files))
        limits: dict[int, int | None] = dict.fromkeys(everything, most)
        limits.update(dict.fromkeys(overviews, self._layout.min_tokens))
        with allowance.stages.measured("decode pictures"):
            images = await self._decode(everything, limits, allowance)
            if room is not None:
                sizes = [(image.height, image.width) for image in images.values()]
                tokens = fitting_tokens(self._layout, sizes, room, overviews)
                limits.update(enumerate(tokens))
                too_large = {i: files[i] for i in images if images[i].num_tokens > tokens[i]}
                images |= await self._decode(too_large, limits, allowance)
        return [images[index] for index in range(len(sources))]

    async def _read(self, sources: Sequence[str], allowance: PictureAllowance) -> list[bytes]:
        """The files, none of them decoded, but known to have few enough pixels together."""
        places = {source: index for index, source in reversed(list(enumerate(sources)))}

        async def file_and_pixels(source: str) -> tuple[bytes, int]:
            data = await self._file(source, allowance)
            count = partial(count_pixels, data, self._max_pixels)
            return data, await self._threads.run(allowance, count)

        jobs = {place: file_and_pixels(source) for source, place in places.items()}
        found = await _all(jobs, len(sources))
        allowance.take_pixels(sum(found[places[source]][1] for source in sources))
        return [found[places[source]][0] for source in sources]

    async def _file(self, source: str, allowance: PictureAllowance) -> bytes:
        """What a client wrote, or the file at the address it wrote."""
        scheme = scheme_of(source)
        if scheme in ("http", "https"):
            if source not in allowance.fetched:
                allowance.fetched[source] = await self._fetch(source, allowance)
            return allowance.fetched[source]
        if scheme == "file" or self._local.covers(source):
            read = partial(self._local.read, source, max(0, allowance.num_bytes))
            data = await self._threads.run(allowance, read)
            allowance.take_bytes(len(data))
            return data
        return await self._threads.run(allowance, partial(decode_image_source, source))

    async def _fetch(self, url: str, allowance: PictureAllowance) -> bytes:
        began = time.perf_counter()
        try:
            return await self._fetcher.fetch(url, allowance)
        finally:
            self._metrics.fetched(time.perf_counter() - began)

    async def _decode(
        self,
        files: Mapping[int, bytes],
        max_tokens: Mapping[int, int | None],
        allowance: PictureAllowance,
    ) -> dict[int, PreparedImage]:
        jobs = {
            index: self._prepare(data, max_tokens[index], allowance)
            for index, data in files.items()
        }
        return await _all(jobs, len(max_tokens))

    async def _prepare(
        self, data: bytes, max_tokens: int | None, allowance: PictureAllowance
    ) -> PreparedImage:
        def prepare() -> tuple[PreparedImage, float]:
            began = time.perf_counter()
            image = prepare_image(data, self._layout, self._max_pixels, max_tokens)
            return image, time.perf_counter() - began

        image, seconds = await self._threads.run(allowance, prepare)
        self._metrics.decoded(seconds)
        return image


async def _all(jobs: Mapping[int, Coroutine[Any, Any, T]], num_pictures: int) -> dict[int, T]:
    """What jobs return, by their pictures' indices; the first failure cancels the others.

    Raises:
        ValidationError: of the first that failed, with its picture's number.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {
                index: group.create_task(_numbered(job, index + 1, num_pictures))
                for index, job in jobs.items()
            }
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return {index: task.result() for index, task in tasks.items()}


async def _numbered(job: Coroutine[Any, Any, T], number: int, num_pictures: int) -> T:
    try:
        return await job
    except ValidationError as error:
        if num_pictures == 1:
            raise
        raise ValidationError(f"picture {number} of {num_pictures}: {error.detail}") from None


def fitting_tokens(
    layout: ImageLayout,
    sizes: Sequence[tuple[int, int]],
    room: int,
    overviews: Collection[int] = (),
) -> list[int]:
    """Tokens each picture may become so that all of them together become at most `room`.

    The picture with the most tokens is reduced first, by one canvas at a time. If even all
    overviews do not fit, each gets the tokens of its overview.

    Args:
        sizes: (height, width) of the pictures, pixels.
        overviews: indices of those that are overviews anyway.
    """
    tokens = [
        layout.min_tokens if index in overviews else layout.plan(*size).num_tokens
        for index, size in enumerate(sizes)
    ]
    largest = [(-count, index) for index, count in enumerate(tokens)]
    heapify(largest)
    excess = sum(tokens) - room
    while excess > 0 and largest:
        _, index = heappop(largest)
        reduced = layout.plan(*sizes[index], tokens[index] - 1).num_tokens
        if reduced < tokens[index]:
            excess -= tokens[index] - reduced
            tokens[index] = reduced
            heappush(largest, (-reduced, index))
    return tokens


def reductions(
    layout: ImageLayout,
    images: Sequence[PreparedImage],
    max_tokens: int,
    setting: str,
    overviews: Collection[int] = (),
) -> tuple[str, ...]:
    """A sentence for every picture that became fewer tokens than its size asks for.

    Args:
        max_tokens: what the prompt had to fit in.
        setting: the name of that limit, as the client or the operator knows it.
        overviews: indices of those that were wanted as overviews.
    """
    sentences = []
    for number, image in enumerate(images, 1):
        wanted = layout.plan(image.height, image.width).num_tokens
        if image.num_tokens >= wanted or number - 1 in overviews:
            continue
        rows, columns = image.grid
        kept = f"an overview and {rows} x {columns} tiles" if rows else "its overview alone"
        sentences.append(
            f"Picture {number} of {len(images)} was reduced to {kept}, {image.num_tokens} tokens "
            f"instead of {wanted}, so that the prompt fits in {max_tokens} tokens ({setting})."
        )
    return tuple(sentences)

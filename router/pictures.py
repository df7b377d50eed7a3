"""A request's pictures: decoded off the event loop, and laid out together so that its prompt fits.

Each picture becomes as many tokens as its best canvas gives. Where that is more than the prompt may
hold (IMAGE_OVERFLOW=fit), the largest one is laid out on a smaller canvas, again and again until
all of them fit; the last resort is a picture's overview alone.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from heapq import heapify, heappop, heappush

from tessera.proto.image_layout import ImageLayout
from tessera.router.images import decode_image_source, prepare_image
from tessera.router.request import PreparedImage


class Pictures:
    """Prepares pictures for one model."""

    def __init__(self, layout: ImageLayout, max_pixels: int, workers: int) -> None:
        """`workers`: threads; a picture is decoded by one of them."""
        self._layout = layout
        self._max_pixels = max_pixels
        self._pool = ThreadPoolExecutor(workers, "pictures")

    def close(self) -> None:
        """Stop the threads; work that has not begun is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def prepare(self, sources: Sequence[str], room: int | None) -> list[PreparedImage]:
        """Decode pictures and cut them into tiles, all at once as far as there are threads.

        Args:
            sources: what the client wrote where a picture is expected.
            room: tokens that all of them may become together, if their layout allows it; None: any
                number.

        Raises:
            ValidationError: one of them cannot be used.
        """
        # What one picture can become at most: a picture on its own is never decoded twice.
        most = None if room is None else room - (len(sources) - 1) * self._layout.min_tokens
        everything = dict(enumerate(sources))
        images = await self._decode(everything, dict.fromkeys(everything, most))
        if room is not None:
            sizes = [(image.height, image.width) for image in images.values()]
            limits = dict(enumerate(fitting_tokens(self._layout, sizes, room)))
            too_large = {i: sources[i] for i in images if images[i].num_tokens > limits[i]}
            images |= await self._decode(too_large, limits)
        return [images[index] for index in range(len(sources))]

    async def _decode(
        self, sources: Mapping[int, str], max_tokens: Mapping[int, int | None]
    ) -> dict[int, PreparedImage]:
        loop = asyncio.get_running_loop()
        jobs = {
            index: loop.run_in_executor(
                self._pool, partial(self._picture, source, max_tokens[index])
            )
            for index, source in sources.items()
        }
        try:
            return dict(zip(jobs, await asyncio.gather(*jobs.values()), strict=True))
        finally:
            for job in jobs.values():
                job.cancel()  # after a failure the others are not worth beginning

    def _picture(self, source: str, max_tokens: int | None) -> PreparedImage:
        data = decode_image_source(source)
        return prepare_image(data, self._layout, self._max_pixels, max_tokens)


def fitting_tokens(layout: ImageLayout, sizes: Sequence[tuple[int, int]], room: int) -> list[int]:
    """Tokens each picture may become so that all of them together become at most `room`.

    The picture with the most tokens is reduced first, by one canvas at a time. If even all
    overviews do not fit, each gets the tokens of its overview.

    Args:
        sizes: (height, width) of the pictures, pixels.
    """
    tokens = [layout.plan(height, width).num_tokens for height, width in sizes]
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
    layout: ImageLayout, images: Sequence[PreparedImage], max_tokens: int, setting: str
) -> tuple[str, ...]:
    """A sentence for every picture that became fewer tokens than its size asks for.

    Args:
        max_tokens: what the prompt had to fit in.
        setting: the name of that limit, as the client or the operator knows it.
    """
    sentences = []
    for number, image in enumerate(images, 1):
        wanted = layout.plan(image.height, image.width).num_tokens
        if image.num_tokens >= wanted:
            continue
        rows, columns = image.grid
        kept = f"an overview and {rows} x {columns} tiles" if rows else "its overview alone"
        sentences.append(
            f"Picture {number} of {len(images)} was reduced to {kept}, {image.num_tokens} tokens "
            f"instead of {wanted}, so that the prompt fits in {max_tokens} tokens ({setting})."
        )
    return tuple(sentences)

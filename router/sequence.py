"""A request in flight, as the scheduler sees it."""

from dataclasses import dataclass, field

from tessera.router.request import PlacedImage, Request


@dataclass(eq=False, slots=True)
class Sequence:
    """One generation, from admission to its last token.

    `token_ids` holds prompt and generated tokens. The cache holds the first `num_computed` of them
    (those of steps still under way included). A preempted sequence starts again from 0 and computes
    prompt and generated tokens alike.
    """

    sequence_id: int
    request: Request
    token_ids: list[int] = field(init=False)
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    sent_to_shards: bool = False

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens the client sent, images included."""
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Tokens known to have been generated."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Known tokens the cache does not hold yet; 1 in steady decode."""
        return len(self.token_ids) - self.num_computed

    def images_between(self, first: int, last: int) -> list[PlacedImage]:
        """Images with a placeholder at a position in [first, last)."""
        return [
            placed
            for placed in self.request.images
            if placed.offset < last and placed.offset + placed.image.num_tokens > first
        ]

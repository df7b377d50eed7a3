"""A request in flight, as the scheduler sees it."""

from dataclasses import dataclass, field

from tessera.router.request import PlacedImage, Request


@dataclass(eq=False, slots=True)
class Sequence:
    """One generation, from admission to its last token.

    `token_ids` holds prompt and generated tokens as far as they are known; `num_pending` more have
    been planned and are not back yet. The cache holds the first `num_computed` of them all, once
    the steps under way are done. A preempted sequence starts again from 0 and computes prompt and
    generated tokens alike.
    """

    sequence_id: int
    request: Request
    token_ids: list[int] = field(init=False)
    num_pending: int = 0
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)  # of the known full blocks
    num_published: int = 0  # blocks that others can find
    num_cached: int = 0  # prompt tokens that were found when it was first let in
    num_overtaken: int = 0  # sequences that were let in before it although they came later
    num_encoded: int = 0  # pictures that had to be encoded for it
    sent_to_shards: bool = False
    was_admitted: bool = False
    has_borrowed: bool = False  # blocks that it did not compute since it was last let in
    is_apart: bool = False  # neither takes blocks from others nor leaves any
    awaits_mask: bool = False  # it is not decoded before its mask is known (`guidance_masks`)
    num_losses: int = 0  # shards that were lost while they computed it

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def uses_cache(self) -> bool:
        """Whether it shares blocks, as far as its client is concerned and its own past."""
        return self.request.use_prefix_cache and not self.is_apart

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
        """Tokens, known or pending, the cache does not hold yet; 1 in steady decode."""
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def is_prefilling(self) -> bool:
        """Whether it goes on by chunks: its prompt, or what is computed again, is not cached."""
        in_prompt = self.num_computed < self.num_prompt_tokens
        return in_prompt or self.num_uncomputed > 1 or not self.sent_to_shards

    @property
    def is_exhausted(self) -> bool:
        """Whether all tokens it may generate are planned."""
        planned = self.num_generated + self.num_pending
        return planned >= self.request.stopping.max_new_tokens

    def forget_computed(self) -> None:
        """The shards that computed it are gone, with all that was on its way."""
        self.num_pending = self.num_computed = self.num_published = 0
        self.block_ids = []
        self.sent_to_shards = self.has_borrowed = False

    def images_between(self, first: int, last: int) -> list[PlacedImage]:
        """Images with a placeholder at a position in [first, last)."""
        return [
            placed
            for placed in self.request.images
            if placed.offset < last and placed.offset + placed.image.num_tokens > first
        ]

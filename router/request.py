"""What a client asked for, after validation: plain immutable values that every later part reads."""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from tessera.router.grammar import Grammar
from tessera.router.guidance_compile import Guide


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Neutral defaults: greedy, no penalties."""

    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    typical_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0  # OpenAI's meaning: times the count among generated tokens
    presence_penalty: float = 0.0
    seed: int = 0  # any unsigned 64-bit number
    top_n_tokens: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a sequence ends."""

    max_new_tokens: int
    stop_sequences: tuple[str, ...] = ()
    ignore_eos: bool = False  # it goes on behind an end-of-text token
    min_tokens: int = 0  # before them no `end_ids` are sampled, and no stop sequence counts
    end_ids: tuple[int, ...] = ()
    include_stop_text: bool = True  # the native API returns the stop string, OpenAI's does not


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """A picture decoded, resized and cut into tiles, ready for the shards."""

    content_hash: bytes  # 16 bytes over tiles, grid and original size
    height: int  # of the original, pixels, after EXIF orientation
    width: int
    num_tiles: int
    tiles: bytes = field(repr=False)  # uint8 RGB [num_tiles, side, side, 3], the overview first
    num_tokens: int  # prompt tokens it becomes
    grid: tuple[int, int] = (0, 0)  # tiles down and across that follow the first


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """A picture and where its tokens lie in the prompt."""

    image: PreparedImage
    offset: int  # index of its first placeholder in the prompt's ids


@dataclass(frozen=True, slots=True)
class Request:
    """One generation a client asked for, validated."""

    prompt_ids: tuple[int, ...]  # placeholders included
    images: tuple[PlacedImage, ...]  # by rising offset
    sampling: SamplingParams
    stopping: StoppingParams
    prompt_text: str = field(default="", repr=False)  # what return_full_text puts first
    priority: int = 0  # higher goes first
    fairness_key: str = ""  # requests of one key wait for each other, not for other keys'
    cache_salt: str = ""  # only requests with the same salt share cached prefixes
    use_prefix_cache: bool = True
    grammar: Grammar | None = None  # what the answer must look like
    guide: Guide | None = field(default=None, repr=False)  # the grammar, compiled
    warnings: tuple[str, ...] = ()  # sentences for the reply: what was done differently than asked
    validation_s: float = 0.0  # time from arrival until this value existed

    @property
    def num_image_tokens(self) -> int:
        """Prompt tokens that stand for pictures."""
        return sum(placed.image.num_tokens for placed in self.images)


class FinishReason(enum.Enum):
    """Why a sequence ended. The values are text-generation-inference's."""

    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"


class TokenInfo(NamedTuple):  # made for every token: a frozen dataclass takes three times as long
    """One token as clients see it."""

    id: int
    text: str
    logprob: float
    special: bool = False
    utf8: bytes | None = None  # what it adds, perhaps part of a character; None: that of `text`


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, seconds."""

    total: float
    validation: float
    queue: float
    inference: float
    first_token: float  # from submission

    @property
    def prompt(self) -> float:
        """From the first step that computes something for it to its first token."""
        return max(0.0, self.first_token - self.queue)

    def per_token(self, generated_tokens: int) -> float:
        """Mean inference time of a token."""
        return self.inference / max(1, generated_tokens)


@dataclass(frozen=True, slots=True)
class Completion:
    """How a request ended."""

    reason: FinishReason
    text: str  # specials skipped, stop text as `include_stop_text` says
    generated_tokens: int
    seed: int | None  # None when greedy
    timings: Timings


class TokenEvent(NamedTuple):
    """One step forward of one request."""

    token: TokenInfo
    text: str  # newly readable, specials skipped; the events' texts concatenate to the full text
    top_tokens: tuple[TokenInfo, ...] = ()
    completion: Completion | None = None  # on the last event only

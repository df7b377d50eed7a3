"""What the HTTP side expects of the loop that runs requests. `router.core` implements it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tessera.router.progress import Progress
from tessera.router.request import Request, TokenEvent, TokenInfo

MOST_AT_ONCE = 64
"""Events that are read, and written, together where a client lags behind."""


@dataclass(frozen=True, slots=True)
class ServingLimits:
    """What fits in this model on these devices; known after the warm-up. Counts are tokens."""

    max_input_tokens: int  # longest prompt, image tokens included
    max_total_tokens: int  # longest prompt plus generation
    max_batch_prefill_tokens: int  # prompt tokens computed in one step
    max_batch_total_tokens: int  # tokens the KV cache holds
    max_batch_size: int  # sequences in one step
    num_shard: int = 1
    dtype: str = ""  # of the weights, as torch prints it without "torch."
    device: str = ""  # what a shard runs on, e.g. "cpu" or "nvidia-h200"
    quantization: str = ""  # of linear layers: "int4", "int8", "awq", "gptq"; empty: none
    cache_dtype: str = ""  # of keys and values


class TokenStream(Protocol):
    """One request in flight. Whoever got it must call `close`, however its reading ended."""

    prompt_tokens: int  # image tokens included
    image_tokens: int
    progress: Progress  # how far it is
    cached_tokens: int  # prompt tokens found in the prefix cache; final with the first event
    prompt_logprobs: list[TokenInfo]
    """One entry per prompt token, filled when the first event is out and
    `sampling.prompt_logprobs` was set; the first logprob is nan."""
    prompt_top_tokens: list[tuple[TokenInfo, ...]]
    """What else was likely in the place of each of them, if `sampling.top_n_tokens` was set too."""

    def take(self) -> list[TokenEvent]:
        """The events that have come since; at most `MOST_AT_ONCE`, perhaps none.

        The one with `completion` is the last.

        Raises:
            RouterError: the request failed, and all events before that have been taken.
        """
        ...

    def listen(self, on_news: Callable[[], None]) -> None:
        """Have a function called, by the event loop, whenever there is something to `take`.

        That is soon after it has come, and soon after a `take` that left something. There is one
        listener at a time.
        """
        ...

    async def next_events(self) -> list[TokenEvent]:
        """Wait for something to `take`; never empty. Becomes the listener."""
        ...

    def close(self) -> None:
        """Cancel if still running and free what is held. Harmless when already over."""
        ...


class Generator(Protocol):
    """Runs requests."""

    @property
    def limits(self) -> ServingLimits:
        """What fits. Only meaningful once `ready` was true."""
        ...

    @property
    def ready(self) -> bool:
        """True while every shard is warm and alive and the server is not draining."""
        ...

    @property
    def takes_requests(self) -> bool:
        """Whether `submit` takes them: when ready, and for a while when new shards are awaited."""
        ...

    def submit(self, request: Request) -> TokenStream:
        """Queue one request.

        Raises:
            OverloadedError: the queue is full.
            NotReadyError: there is nothing to run it on.
        """
        ...

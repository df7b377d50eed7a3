"""A request under way: what its client has been told, and what it is told next."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq

from tessera.proto import shard_pb2
from tessera.router.errors import RouterError
from tessera.router.output import Output
from tessera.router.request import Completion, FinishReason, Timings, TokenEvent, TokenInfo
from tessera.router.sequence import Sequence
from tessera.router.tokenizer import Tokenizer


class RequestStream:
    """The events of one request, as `generation.TokenStream` describes them."""

    def __init__(self, sequence: Sequence, cancel: Callable[[], None]) -> None:
        request = sequence.request
        self.prompt_tokens = len(request.prompt_ids)
        self.image_tokens = request.num_image_tokens
        self.cached_tokens = 0
        self.prompt_logprobs: list[TokenInfo] = []
        self._cancel = cancel
        # Bounded by the request's own max_new_tokens.
        self._events: deque[TokenEvent | RouterError] = deque()
        self._arrival: asyncio.Future[None] | None = None  # what the reader waits for

    @property
    def num_ready(self) -> int:
        """Events and errors that can be read without waiting."""
        return len(self._events)

    def push(self, event: TokenEvent | RouterError) -> None:
        """Hand the client its next event or its error."""
        self._events.append(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """The events in order; the one with `completion` is the last."""
        while True:
            while not self._events:
                self._arrival = asyncio.get_running_loop().create_future()
                await self._arrival
            event = self._events.popleft()
            if isinstance(event, RouterError):
                raise event
            yield event
            if event.completion is not None:
                return

    def follow(self, cancel: Callable[[], None]) -> None:
        """Its request goes on as another sequence, which `cancel` forgets."""
        self._cancel = cancel

    def close(self) -> None:
        """Cancel if still running; its blocks are free at once, the shards hear of it next step."""
        self._cancel()


class InFlight:
    """Turns the tokens that come back for a sequence into the events of its stream.

    All times are seconds of the same clock.
    """

    def __init__(
        self,
        sequence: Sequence,
        stream: RequestStream,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        now: float,
    ) -> None:
        self.sequence = sequence
        self.stream = stream
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._output = Output(tokenizer, sequence.request)
        self._submitted_at = now
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._prompt_logprobs: list[float] = []

    def start(self, now: float) -> None:
        """Note that a step computes something for it."""
        if self._started_at is None:
            self._started_at = now
            self.stream.cached_tokens = self.sequence.num_cached

    def add_prompt_logprobs(self, first_position: int, logprobs: Seq[float]) -> None:
        """Take the scores of a chunk; a prompt computed again repeats what is already known."""
        known = 1 + len(self._prompt_logprobs) - first_position
        self._prompt_logprobs += logprobs[known:]

    def tell(self, token: shard_pb2.SampledToken, now: float) -> bool:
        """Tell the client about one more token; returns whether it was the last."""
        if self._first_token_at is None:
            self._first_token_at = now
            self._publish_prompt_logprobs()
        step = self._output.add(token.token_id)
        text, completion = step.text, None
        reason = self._finish_reason(token.token_id, step.stopped)
        if reason is not None:
            text += self._output.finish()
            completion = self._completion(reason, now)
        is_special = self._tokenizer.is_special(token.token_id)
        utf8 = self._tokenizer.token_utf8(token.token_id)
        info = TokenInfo(token.token_id, step.token_text, token.logprob, is_special, utf8)
        top = tuple(self._info(entry.token_id, entry.logprob) for entry in token.top_tokens)
        self.stream.push(TokenEvent(info, text, top, completion))
        return completion is not None

    def _finish_reason(self, token_id: int, stopped: bool) -> FinishReason | None:
        stopping = self.sequence.request.stopping
        if stopped:
            return FinishReason.STOP
        if token_id in self._eos_ids and not stopping.ignore_eos:
            return FinishReason.EOS
        if self.sequence.num_generated >= stopping.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _completion(self, reason: FinishReason, now: float) -> Completion:
        request = self.sequence.request
        started = self._started_at or now
        timings = Timings(
            total=request.validation_s + now - self._submitted_at,
            validation=request.validation_s,
            queue=started - self._submitted_at,
            inference=now - started,
            first_token=(self._first_token_at or now) - self._submitted_at,
        )
        seed = request.sampling.seed if request.sampling.temperature > 0 else None
        return Completion(reason, self._output.text, self.sequence.num_generated, seed, timings)

    def _publish_prompt_logprobs(self) -> None:
        request = self.sequence.request
        if request.sampling.prompt_logprobs:
            # The first token of a prompt follows nothing, so it has no probability.
            missing = len(request.prompt_ids) - len(self._prompt_logprobs)
            logprobs = [float("nan")] * missing + self._prompt_logprobs
            self.stream.prompt_logprobs += map(self._info, request.prompt_ids, logprobs)

    def _info(self, token_id: int, logprob: float) -> TokenInfo:
        tokenizer = self._tokenizer
        return TokenInfo(
            token_id,
            tokenizer.token_text(token_id),
            logprob,
            tokenizer.is_special(token_id),
            tokenizer.token_utf8(token_id),
        )

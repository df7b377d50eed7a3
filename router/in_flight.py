"""A request under way: what its client has been told, and what it is told next."""

import asyncio
from collections.abc import Callable, Iterable

from tessera.proto import shard_pb2
from tessera.proto.columns import SampledToken
from tessera.router.errors import RouterError
from tessera.router.generation import MOST_AT_ONCE
from tessera.router.metrics.requests import RequestMetrics
from tessera.router.output import Output
from tessera.router.progress import Progress
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
        self.progress = Progress()
        self.prompt_logprobs: list[TokenInfo] = []
        self.prompt_top_tokens: list[tuple[TokenInfo, ...]] = []
        self._cancel = cancel
        # Bounded by the request's own max_new_tokens.
        self._events: list[TokenEvent] = []
        self._error: RouterError | None = None  # what follows the events
        self._on_news: Callable[[], None] | None = None
        self._is_announced = False  # its listener is about to be called, or to `take`

    def push(self, event: TokenEvent) -> None:
        """Hand the client its next event."""
        self._events.append(event)
        self._announce()

    def fail(self, error: RouterError) -> None:
        """Hand the client its error, behind the events it has not read yet."""
        self._error = error
        self._announce()

    def take(self) -> list[TokenEvent]:
        """See `generation.TokenStream`."""
        events, self._events, self._is_announced = self._events, [], False
        if not events and self._error is not None:
            raise self._error
        if len(events) > MOST_AT_ONCE or (events and self._error is not None):
            self._events = events[MOST_AT_ONCE:]
            self._announce()
            return events[:MOST_AT_ONCE]
        return events

    def listen(self, on_news: Callable[[], None]) -> None:
        """See `generation.TokenStream`."""
        self._on_news, self._is_announced = on_news, False
        if self._events or self._error is not None:
            self._announce()

    async def next_events(self) -> list[TokenEvent]:
        """See `generation.TokenStream`."""
        while not (events := self.take()):
            news = asyncio.Event()
            self.listen(news.set)
            await news.wait()
        return events

    def _announce(self) -> None:
        """Call the listener soon: not now, where the next step is waited for."""
        if self._on_news is not None and not self._is_announced:
            self._is_announced = True
            asyncio.get_running_loop().call_soon(self._on_news)

    def follow(self, cancel: Callable[[], None]) -> None:
        """Its request goes on as another sequence, which `cancel` forgets."""
        self._cancel = cancel

    def close(self) -> None:
        """Cancel if still running; its blocks are free at once, the shards hear of it next step."""
        self._on_news = None
        self._cancel()


class InFlight:
    """Turns the tokens that come back for a sequence into the events of its stream.

    All times are `time.perf_counter()`.
    """

    def __init__(
        self,
        sequence: Sequence,
        stream: RequestStream,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        metrics: RequestMetrics,
    ) -> None:
        self.sequence = sequence
        self.stream = stream
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._output = Output(tokenizer, sequence.request)
        self._progress = stream.progress
        self._metrics = metrics
        self._prompt_scores: list[tuple[float, tuple[TokenInfo, ...]]] = []

    def start(self, now: float) -> None:
        """Note that a step computes something for it."""
        progress, stream = self._progress, self.stream
        if progress.started_at is None:
            progress.started_at = now
            stream.cached_tokens = self.sequence.num_cached
            self._metrics.first_step(
                now - progress.submitted_at,
                stream.prompt_tokens,
                stream.cached_tokens,
                stream.image_tokens,
            )

    def add_prompt_logprobs(self, scored: shard_pb2.PromptLogprobs) -> None:
        """Take the scores of a chunk; a prompt computed again repeats what is already known."""
        known = 1 + len(self._prompt_scores) - scored.first_position
        tops = [self._infos(top.tokens) for top in scored.top_tokens[known:]]
        logprobs = scored.logprobs[known:]
        self._prompt_scores += zip(logprobs, tops or [()] * len(logprobs), strict=True)

    def tell(self, token: SampledToken, now: float) -> bool:
        """Tell the client about one more token; returns whether it was the last."""
        progress, request = self._progress, self.sequence.request
        if progress.last_token_at is None:
            progress.first_token_at = now
            self._metrics.first_token(request.validation_s + now - progress.submitted_at)
            self._publish_prompt_logprobs()
        else:
            self._metrics.next_token(now - progress.last_token_at)
        progress.last_token_at = now
        progress.generated_tokens = self.sequence.num_generated
        token_id = token.token_id
        token_text, text, is_stopped = self._output.add(token_id)
        completion = None
        reason = self._finish_reason(token_id, is_stopped)
        if reason is not None:
            progress.finish_reason = reason
            text += self._output.finish()
            completion = self._completion(reason, now)
        _, is_special, utf8 = self._tokenizer.describe(token_id)
        info = TokenInfo(token_id, token_text, token.logprob, is_special, utf8)
        top = self._infos(token.top_tokens) if token.top_tokens else ()
        self.stream.push(TokenEvent(info, text, top, completion))
        return completion is not None

    def _finish_reason(self, token_id: int, stopped: bool) -> FinishReason | None:
        stopping = self.sequence.request.stopping
        if stopped:
            return FinishReason.STOP
        if token_id in self._eos_ids and not stopping.ignore_eos:
            return FinishReason.EOS
        if self._progress.generated_tokens >= stopping.max_new_tokens:
            return FinishReason.LENGTH
        return None

    def _completion(self, reason: FinishReason, now: float) -> Completion:
        request, progress = self.sequence.request, self._progress
        submitted, started = progress.submitted_at, progress.started_at or now
        timings = Timings(
            total=request.validation_s + now - submitted,
            validation=request.validation_s,
            queue=started - submitted,
            inference=now - started,
            first_token=(progress.first_token_at or now) - submitted,
        )
        seed = request.sampling.seed if request.sampling.temperature > 0 else None
        return Completion(reason, self._output.text, self.sequence.num_generated, seed, timings)

    def _publish_prompt_logprobs(self) -> None:
        request = self.sequence.request
        if request.sampling.prompt_logprobs:
            # The first token of a prompt follows nothing, so it has no probability.
            missing = len(request.prompt_ids) - len(self._prompt_scores)
            scores = [(float("nan"), ())] * missing + self._prompt_scores
            logprobs = [logprob for logprob, _ in scores]
            self.stream.prompt_logprobs += map(self._info, request.prompt_ids, logprobs)
            self.stream.prompt_top_tokens += [top for _, top in scores]

    def _infos(self, entries: Iterable[shard_pb2.TokenLogprob]) -> tuple[TokenInfo, ...]:
        return tuple(self._info(entry.token_id, entry.logprob) for entry in entries)

    def _info(self, token_id: int, logprob: float) -> TokenInfo:
        text, is_special, utf8 = self._tokenizer.describe(token_id)
        return TokenInfo(token_id, text, logprob, is_special, utf8)

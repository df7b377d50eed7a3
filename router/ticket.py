"""One HTTP request inside the server: its permits, its generations, its line in the metrics."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect

from tessera.router.admission import Admission
from tessera.router.errors import (
    IncompleteError,
    NotReadyError,
    OverloadedError,
    TemplateError,
    ValidationError,
)
from tessera.router.generation import Generator, TokenStream
from tessera.router.metrics import FailureKind, Metrics
from tessera.router.request import Completion, Request, TokenEvent

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Generation:
    """A request that was submitted and the events it yields."""

    request: Request
    stream: TokenStream
    events: AsyncIterator[TokenEvent]  # like the stream's, but never ends without a completion


class Ticket:
    """Counts one request in, and out again exactly once, whatever ends it."""

    def __init__(
        self, request_id: str, generator: Generator, admission: Admission, metrics: Metrics
    ) -> None:
        self._request_id = request_id
        self._generator = generator
        self._admission = admission
        self._metrics = metrics
        self._permits = 0
        self._generations: list[Generation] = []
        self._completions: list[Completion] = []
        self._failure: FailureKind | None = None
        self._over = False
        self._kept = False
        metrics.request_started()

    def admit(self, count: int) -> None:
        """Take one permit per generation that is asked for, before any work is done for them.

        Raises:
            NotReadyError: there are no shards to run them.
            OverloadedError: too many are inside already.
        """
        if not self._generator.ready:
            raise NotReadyError("The model is not ready: it is loading, draining or restarting.")
        self._admission.take(count)
        self._permits += count
        for _ in range(count - 1):
            self._metrics.request_started()

    def submit(self, requests: Sequence[Request]) -> list[Generation]:
        """Queue the requests; `close` closes what was queued, also if a later one is refused."""
        for request in requests:
            self._metrics.request_validated(
                len(request.prompt_ids), request.stopping.max_new_tokens, request.validation_s
            )
            stream = self._generator.submit(request)
            self._generations.append(Generation(request, stream, self._watched(stream)))
        return self._generations

    def keep(self) -> None:
        """Stay open past the handler that got this ticket: a response under way closes it."""
        self._kept = True

    @property
    def kept(self) -> bool:
        """Whether somebody else will close this ticket."""
        return self._kept

    def failed(self, error: BaseException) -> None:
        """Note what went wrong; only the first failure counts."""
        self._failure = self._failure or _failure_kind(error)

    def close(self) -> None:
        """End what still runs and give everything back. Harmless when already closed."""
        if self._over:
            return
        self._over = True
        for generation in self._generations:
            generation.stream.close()
        self._admission.give_back(self._permits)
        if len(self._completions) < len(self._generations):
            self._failure = self._failure or "dropped"
        if self._failure:
            self._metrics.request_failed(self._failure)
        self._log()

    def _log(self) -> None:
        """One line per request, without any of its content."""
        if self._failure:
            logger.info("request %s: %s", self._request_id, self._failure)
            return
        for generation, completion in zip(self._generations, self._completions, strict=True):
            timings = completion.timings
            logger.info(
                "request %s: success, %d prompt and %d generated tokens, total %.3f s, "
                "validation %.3f s, queue %.3f s, first token %.3f s, inference %.3f s",
                self._request_id,
                generation.stream.prompt_tokens,
                completion.generated_tokens,
                timings.total,
                timings.validation,
                timings.queue,
                timings.first_token,
                timings.inference,
            )

    async def _watched(self, stream: TokenStream) -> AsyncIterator[TokenEvent]:
        async for event in stream:
            if event.completion is not None:
                self._completions.append(event.completion)
                self._metrics.request_finished(event.completion)
                yield event
                return
            yield event
        raise IncompleteError("Incomplete generation: the tokens ended without a last one.")


class Desk:
    """Hands out tickets."""

    def __init__(self, generator: Generator, admission: Admission, metrics: Metrics) -> None:
        self._generator = generator
        self._admission = admission
        self._metrics = metrics

    @contextmanager
    def ticket(self, request_id: str) -> Iterator[Ticket]:
        """A ticket that is closed at the end of the block, unless it was kept without an error."""
        ticket = Ticket(request_id, self._generator, self._admission, self._metrics)
        try:
            yield ticket
        except BaseException as error:
            ticket.failed(error)
            ticket.close()
            raise
        if not ticket.kept:
            ticket.close()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A permit for work that is no generation.

        Raises:
            OverloadedError: too many requests are inside already.
        """
        self._admission.take(1)
        try:
            yield
        finally:
            self._admission.give_back(1)


def _failure_kind(error: BaseException) -> FailureKind:
    match error:
        case TemplateError():
            return "template"
        case ValidationError():
            return "validation"
        case OverloadedError():
            return "overloaded"
        case IncompleteError():
            return "incomplete"
        case ClientDisconnect() | asyncio.CancelledError() | GeneratorExit():
            return "dropped"
    return "generation"

"""One HTTP request inside the server: its permits, its generations, its line in the metrics."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.requests import ClientDisconnect

from tessera.router.admission import Admission
from tessera.router.errors import (
    NotReadyError,
    OverloadedError,
    TemplateError,
    ValidationError,
)
from tessera.router.generation import Generator, TokenStream
from tessera.router.metrics import Metrics
from tessera.router.metrics.requests import FailureKind
from tessera.router.request import Completion, Request, TokenEvent
from tessera.router.request_record import RequestRecord


@dataclass(frozen=True, slots=True)
class Generation:
    """A request that was submitted and the events it yields."""

    request: Request
    stream: TokenStream
    on_completion: Callable[[Completion], None]

    def take(self) -> list[TokenEvent]:
        """What the stream's gives."""
        events = self.stream.take()
        if events and (completion := events[-1].completion) is not None:
            self.on_completion(completion)
        return events

    async def next_events(self) -> list[TokenEvent]:
        """What the stream's gives."""
        events = await self.stream.next_events()
        if (completion := events[-1].completion) is not None:
            self.on_completion(completion)
        return events


class Ticket:
    """Counts one request in, and out again exactly once, whatever ends it."""

    def __init__(
        self, record: RequestRecord, generator: Generator, admission: Admission, metrics: Metrics
    ) -> None:
        self._record = record
        self._generator = generator
        self._admission = admission
        self._metrics = metrics
        self._permits = 0
        self._generations: list[Generation] = []
        self._completions: list[Completion] = []
        self._failure: FailureKind | None = None
        self._over = False
        self._kept = False
        metrics.requests.started()

    def admit(self, count: int) -> None:
        """Take one permit per generation that is asked for, before any work is done for them.

        Raises:
            NotReadyError: there are no shards to run them.
            OverloadedError: too many are inside already.
        """
        if not self._generator.takes_requests:
            raise NotReadyError("The model is not ready: it is loading, draining or restarting.")
        self._admission.take(count)
        self._permits += count
        for _ in range(count - 1):
            self._metrics.requests.started()

    def submit(self, requests: Sequence[Request]) -> list[Generation]:
        """Queue the requests; `close` closes what was queued, also if a later one is refused."""
        for request in requests:
            self._metrics.requests.validated(
                len(request.prompt_ids), request.stopping.max_new_tokens
            )
            stream = self._generator.submit(request)
            self._record.submitted(request, stream)
            self._generations.append(Generation(request, stream, self._completed))
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
        self._record.failed(error)
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
            self.failed(ClientDisconnect())  # unless something went wrong before
        if self._failure:
            self._metrics.requests.failed(self._failure)

    def _completed(self, completion: Completion) -> None:
        self._completions.append(completion)
        self._metrics.requests.finished(completion)


class Desk:
    """Hands out tickets."""

    def __init__(self, generator: Generator, admission: Admission, metrics: Metrics) -> None:
        self._generator = generator
        self._admission = admission
        self._metrics = metrics

    @contextmanager
    def ticket(self, record: RequestRecord) -> Iterator[Ticket]:
        """A ticket that is closed at the end of the block, unless it was kept without an error."""
        ticket = Ticket(record, self._generator, self._admission, self._metrics)
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
        case ClientDisconnect() | asyncio.CancelledError() | GeneratorExit():
            return "dropped"
    return "generation"

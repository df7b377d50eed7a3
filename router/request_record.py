"""What one HTTP request did, noted while it is served; its log line and its trace are made of it.

Holds counts, times and names of ours only: nothing a client wrote but a request id that was found
harmless. So neither a log nor a trace can give away a prompt, a picture or a key.
"""

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from tessera.router.errors import RouterError, ValidationError
from tessera.router.generation import TokenStream
from tessera.router.request import Request

CANCELLED = "cancelled"
"""Error type where the client left; the others are those that clients are told."""

_OUR_FIELD = re.compile(r"(parameters\.)?[a-z_]+")
"""Of a parameter's place in a body, what is surely ours: further in, clients choose keys, too."""


@dataclass(slots=True, eq=False)
class Stage:
    """A part of the work that prepares a request. Times are `time.perf_counter()`."""

    name: str
    began: float
    parent: "Stage | None"  # the stage it is a part of
    ended: float = 0.0
    failed: bool = False


class Stages:
    """The stages of one request, in the order they began. Used on the event loop only."""

    def __init__(self) -> None:
        self.all: list[Stage] = []
        self._open: Stage | None = None

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Note the time that the block takes, as a part of the stage that is open."""
        stage = Stage(name, time.perf_counter(), self._open)
        self.all.append(stage)
        self._open = stage
        try:
            yield
        except BaseException:
            stage.failed = True
            raise
        finally:
            stage.ended = time.perf_counter()
            self._open = stage.parent


class Trace(Protocol):
    """The trace of one request."""

    trace_id: str  # 32 hexadecimal digits
    is_sampled: bool  # whether it will be sent anywhere

    def end(self, record: "RequestRecord") -> None:
        """Hand over what there is to send; never waits and never raises."""
        ...


class Tracer(Protocol):
    """Makes traces; `router.tracing` implements it."""

    def begin(self, headers: Headers) -> Trace:
        """The trace of a request that has just come in, within its client's if it names one."""
        ...


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One HTTP request. Times are `time.perf_counter()`."""

    request_id: str
    method: str
    model_name: str = ""
    trace: Trace | None = None
    began: float = field(default_factory=time.perf_counter)
    began_ns: int = field(default_factory=time.time_ns)  # the same moment, since 1970
    ended: float = 0.0
    route: str = ""  # as it is declared; empty: there is no such address
    status: int | None = None  # None: the reply never began
    error_type: str = ""
    param: str = ""  # the field of the body that was refused, where it was exactly one
    is_our_fault: bool = False
    stages: Stages = field(default_factory=Stages)
    generations: list[tuple[Request, TokenStream]] = field(default_factory=list)

    def submitted(self, request: Request, stream: TokenStream) -> None:
        """Note a generation that was queued."""
        stream.progress.is_traced = self.trace is not None and self.trace.is_sampled
        self.generations.append((request, stream))

    def failed(self, error: BaseException) -> None:
        """Note what went wrong; only the first failure counts."""
        if self.error_type:
            return
        match error:
            case RouterError():
                self.error_type = error.error_type
                self.is_our_fault = error.status >= 500 or error.status == 424
                if isinstance(error, ValidationError) and error.param:
                    found = _OUR_FIELD.match(error.param)
                    self.param = found[0] if found else ""
            case ClientDisconnect() | asyncio.CancelledError() | GeneratorExit():
                self.error_type = CANCELLED
            case _:
                self.error_type, self.is_our_fault = "internal", True

    def at_ns(self, moment: float) -> int:
        """Nanoseconds since 1970 of a moment on `time.perf_counter()`."""
        return self.began_ns + round((moment - self.began) * 1e9)

    @property
    def prompts(self) -> list[TokenStream]:
        """A generation of each prompt; several answers to one share its ids."""
        return list(
            {id(request.prompt_ids): stream for request, stream in self.generations}.values()
        )

    @property
    def streams(self) -> list[TokenStream]:
        """All generations."""
        return [stream for _, stream in self.generations]

    @property
    def finish_reasons(self) -> list[str]:
        """How the generations ended that did."""
        reasons = [stream.progress.finish_reason for stream in self.streams]
        return [reason.value for reason in reasons if reason is not None]

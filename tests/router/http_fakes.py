"""A generator that says what it is told to, and ways to call an app over it."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette

from tessera.router.errors import NotReadyError, OverloadedError, RouterError
from tessera.router.generation import ServingLimits
from tessera.router.in_flight import RequestStream
from tessera.router.request import (
    Completion,
    FinishReason,
    Request,
    Timings,
    TokenEvent,
    TokenInfo,
)
from tessera.router.sequence import Sequence

LIMITS = ServingLimits(
    max_input_tokens=480,
    max_total_tokens=512,
    max_batch_prefill_tokens=64,
    max_batch_total_tokens=1024,
    max_batch_size=8,
    num_shard=2,
    dtype="float32",
    device="cpu",
)
TIMINGS = Timings(total=0.5, validation=0.1, queue=0.05, inference=0.3, first_token=0.2)


@dataclass
class Script:
    """What every stream of a generator yields."""

    texts: tuple[str, ...] = ("Hel", "lo", " there")
    reason: FinishReason = FinishReason.LENGTH
    logprobs: tuple[float, ...] = ()  # per token; missing ones are -1.0
    error: RouterError | Exception | None = None
    error_after: int = 0  # tokens before `error`
    delay_s: float = 0.0  # before each token but the first
    first_delay_s: float = 0.0
    hang_after: int | None = None  # tokens before it falls silent for good


class FakeStream(RequestStream):
    def __init__(self, script: Script, request: Request, copy: int) -> None:
        super().__init__(Sequence(0, request), cancel=self._end)
        self.request = request
        self.cached_tokens = 3
        self.num_closed = 0
        self._script = script
        self._copy = copy
        self._playing: asyncio.Task[None] | None = None

    def play(self) -> "FakeStream":
        self._playing = asyncio.ensure_future(self._play())
        return self

    async def _play(self) -> None:
        try:
            async for event in self._scripted():
                self.push(event)
        except Exception as error:
            self.fail(error)  # type: ignore[arg-type]  # also defects, which the real one never tells

    async def _scripted(self) -> AsyncIterator[TokenEvent]:
        script = self._script
        text = ""
        if self.request.sampling.prompt_logprobs:
            self.prompt_logprobs = [
                TokenInfo(i, f"p{i}", -0.5 if n else float("nan"))
                for n, i in enumerate(self.request.prompt_ids)
            ]
            tops = [(p,) * self.request.sampling.top_n_tokens for p in self.prompt_logprobs[1:]]
            self.prompt_top_tokens = [(), *tops]
        for n, piece in enumerate(script.texts):
            await asyncio.sleep(script.delay_s if n else script.first_delay_s)
            if script.error is not None and n == script.error_after:
                raise script.error
            if n == script.hang_after:
                await asyncio.Event().wait()
            text += piece
            last = n == len(script.texts) - 1
            yield self._event(n, piece, self._completion(text) if last else None)

    def _event(self, n: int, piece: str, completion: Completion | None) -> TokenEvent:
        self._advance(n + 1, completion)
        special = completion is not None and completion.reason is FinishReason.EOS
        logprob = self._script.logprobs[n] if n < len(self._script.logprobs) else -1.0
        token = TokenInfo(n, "</s>" if special else piece, logprob - self._copy, special)
        top_n = self.request.sampling.top_n_tokens
        top = tuple(TokenInfo(100 + k, f"t{k}", -1.0 - k) for k in range(top_n))
        return TokenEvent(token, "" if special else piece, top, completion)

    def _advance(self, generated: int, completion: Completion | None) -> None:
        progress, now = self.progress, time.perf_counter()
        if progress.first_token_at is None:
            progress.started_at = progress.first_token_at = now
        progress.last_token_at, progress.generated_tokens = now, generated
        progress.finish_reason = completion.reason if completion else None

    def _completion(self, text: str) -> Completion:
        sampling = self.request.sampling
        seed = sampling.seed if sampling.temperature > 0 else None
        if self._script.reason is FinishReason.EOS:
            text = text[: len(text) - len(self._script.texts[-1])]
        return Completion(self._script.reason, text, len(self._script.texts), seed, TIMINGS)

    def _end(self) -> None:
        self.num_closed += 1
        if self._playing is not None:
            self._playing.cancel()


@dataclass
class FakeGenerator:
    """A `Generator` without shards."""

    script: Script = field(default_factory=Script)
    limits: ServingLimits = LIMITS
    ready: bool = True
    full: bool = False
    streams: list[FakeStream] = field(default_factory=list)

    @property
    def takes_requests(self) -> bool:
        return self.ready

    def submit(self, request: Request) -> FakeStream:
        if not self.ready:
            raise NotReadyError("not ready")
        if self.full:
            raise OverloadedError("Model is overloaded")
        stream = FakeStream(self.script, request, len(self.streams))
        self.streams.append(stream)
        return stream.play()

    @property
    def requests(self) -> list[Request]:
        return [stream.request for stream in self.streams]

    @property
    def all_closed(self) -> bool:
        return all(stream.num_closed for stream in self.streams)


def call(app: Starlette, method: str, path: str, **options: Any) -> httpx.Response:
    """One request to `app`, no server in between."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


def post(app: Starlette, path: str, body: Any, **options: Any) -> httpx.Response:
    return call(app, "POST", path, json=body, **options)


def events(response: httpx.Response) -> list[Any]:
    """The payloads of a stream, without its [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block[6:]) for block in blocks if block != "data: [DONE]"]


@contextlib.contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The address of a real server on a free port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def disconnecting(
    body: bytes, leaves_at: str, receive_says_so: bool
) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """ASGI `receive` and `send` of a client that leaves when a message of that type is sent."""
    gone = asyncio.Event()
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        if not receive_says_so:
            await asyncio.Event().wait()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == leaves_at:
            gone.set()
            if not receive_says_so:
                raise OSError("client left")

    return receive, send

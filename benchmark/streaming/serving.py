"""The process that is measured: the router's app, or one that writes constant bytes.

    python -m benchmark.streaming.serving ours|constant SECONDS_PER_STEP

Prints its port. `GET /process-time` answers with the processor seconds it has used.
"""

import asyncio
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.loops.auto import auto_loop_factory

from benchmark.streaming.prepared import PreparedGenerator
from tessera.launcher import demo
from tessera.router.app import create_app
from tessera.router.chat_template import ChatTemplate
from tessera.router.main import server_config
from tessera.router.metrics import Metrics
from tessera.router.model_files import ModelFiles
from tessera.router.settings import RouterSettings
from tessera.router.tokenizer import Tokenizer
from tessera.router.validation import Validator

SETTINGS = RouterSettings(
    max_total_tokens=1 << 20, max_concurrent_requests=1024, graceful_termination_timeout=1
)


def router_app(step_s: float) -> ASGIApp:
    """The whole HTTP side of the router over prepared tokens."""
    folder = Path(demo.__file__).parent / "model"
    generator = PreparedGenerator(step_s)
    files = ModelFiles.read(folder)
    metrics = Metrics()
    validator = Validator(
        SETTINGS,
        generator,
        Tokenizer.from_folder(folder),
        files,
        ChatTemplate.from_folder(folder),
        metrics,
    )
    return create_app(SETTINGS, generator, validator, files, metrics)


class ConstantBytes:
    """The least an ASGI application can do: `?events=N&size=B` sends N messages of B bytes."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._next_step: asyncio.Future[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        asked = parse_qs(scope["query_string"].decode())
        count, size = int(asked["events"][0]), int(asked["size"][0])
        body = b"data: " + b"x" * (size - 8) + b"\n\n"
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(count):
            if self._step_s:
                await self._step()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _step(self) -> None:
        """Wait for the next step, which is the same for all."""
        if self._next_step is None:
            loop = asyncio.get_running_loop()
            self._next_step = loop.create_future()
            loop.call_later(self._step_s, self._end_step)
        await self._next_step

    def _end_step(self) -> None:
        assert self._next_step is not None
        self._next_step.set_result(None)
        self._next_step = None


def with_process_time(app: ASGIApp) -> ASGIApp:
    """`app`, and a route that tells the time used."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/process-time":
            await app(scope, receive, send)
            return
        body = repr(time.process_time()).encode()
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    return serve


async def _serve(kind: str, step_s: float) -> None:
    app = router_app(step_s) if kind == "ours" else ConstantBytes(step_s)
    config = server_config(with_process_time(app), SETTINGS)
    config.host, config.port = "127.0.0.1", 0
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve())
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


def main() -> None:
    """Serve until a signal."""
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(_serve(sys.argv[1], float(sys.argv[2])))


if __name__ == "__main__":
    main()

"""OpenVINO GenAI's continuous batching behind an HTTP server: `FOLDER PORT STREAMS`.

The package index has the library, not its server. This one has what `/v1/completions` streams
need and no more, so the comparison favours it. Runs in OpenVINO's environment.
"""

import asyncio
import itertools
import json
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from aiohttp import web
from gguf_model import write_gguf
from tokenizers import Tokenizer

CACHE_GIB = 2
IDLE_S = 0.5


class Engine:
    """Steps the pipeline on a thread of its own while there is something to generate."""

    def __init__(self, model: Path, streams: int) -> None:
        scheduling = openvino_genai.SchedulerConfig()
        scheduling.cache_size = CACHE_GIB
        scheduling.max_num_seqs = streams
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(model), scheduling, "CPU")
        self._ids = itertools.count()
        self._running: dict[int, tuple[Any, asyncio.Queue[list[int]]]] = {}
        self._arrived = threading.Event()
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, daemon=True).start()

    async def tokens(self, prompt_ids: list[int], count: int) -> AsyncIterator[list[int]]:
        """So many tokens after a prompt, as they come."""
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens, wanted.ignore_eos = count, True
        number = next(self._ids)
        prompt = openvino.Tensor(np.array([prompt_ids], np.int64))
        queue: asyncio.Queue[list[int]] = asyncio.Queue()
        self._running[number] = self._pipeline.add_request(number, prompt, wanted), queue
        self._arrived.set()
        while count > 0:
            found = await queue.get()
            count -= len(found)
            yield found
        del self._running[number]

    def _run(self) -> None:
        while True:
            self._arrived.wait(IDLE_S)
            self._arrived.clear()
            while self._pipeline.has_non_finished_requests():
                self._pipeline.step()
                self._loop.call_soon_threadsafe(self._deal_out)

    def _deal_out(self) -> None:
        for handle, queue in list(self._running.values()):
            while handle.can_read():
                for output in handle.read().values():
                    queue.put_nowait(output.generated_ids)


async def application(folder: Path, streams: int) -> web.Application:
    """The routes, with the model loaded."""
    path = folder / "half.gguf"
    if not path.exists():
        write_gguf(folder, path, half=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine = Engine(path, streams)

    async def health(_: web.Request) -> web.Response:
        return web.Response()

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt_ids = tokenizer.encode(body["prompt"]).ids
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        sent = 0
        async for token_ids in engine.tokens(prompt_ids, body["max_tokens"]):
            sent += len(token_ids)
            event = {
                "choices": [{"text": tokenizer.decode(token_ids, skip_special_tokens=False)}],
                "usage": {"completion_tokens": sent},
            }
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.add_routes([web.get("/health", health), web.post("/v1/completions", completions)])
    return app


def main() -> None:
    folder, port, streams = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    web.run_app(application(folder, streams), host="127.0.0.1", port=port)


if __name__ == "__main__":
    main()

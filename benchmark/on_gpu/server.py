"""The whole server with many streams: launcher, router and one shard."""

import asyncio
import tempfile
from pathlib import Path

import aiohttp
from tokenizers import Tokenizer

from benchmark.load.client import Client
from benchmark.load.measure import Objective, summarise
from benchmark.load.protocol import CompletionApi
from benchmark.load.workload import Conversation, Turn
from benchmark.peer_servers.servers import own_server
from benchmark.peers import LIMIT_S, Prompts

LOG_CHARACTERS = 5000  # of the server's log, that an error tells


def tokens_per_s(
    folder: Path, streams: int, prompt_tokens: int, new_tokens: int, rounds: int
) -> list[float]:
    """Output tokens per second of all streams together, prompts included; the first round warms up.

    Raises:
        OSError: the server does not start, or a request failed.
    """
    prompts = Prompts(Tokenizer.from_file(str(folder / "tokenizer.json")))
    with tempfile.TemporaryDirectory() as folder_of_log:
        log = Path(folder_of_log) / "log"
        try:
            with own_server(folder, log) as url:
                return [
                    asyncio.run(
                        _rate(url, folder.name, _asked(prompts, streams, prompt_tokens), new_tokens)
                    )
                    for _ in range(rounds + 1)
                ][1:]
        except OSError as error:  # the log goes with its folder
            raise OSError(f"{error}\n{log.read_text()[-LOG_CHARACTERS:]}") from error


def _asked(prompts: Prompts, streams: int, prompt_tokens: int) -> list[Conversation]:
    return [Conversation((Turn(prompts.text(prompt_tokens)),)) for _ in range(streams)]


async def _rate(url: str, model: str, asked: list[Conversation], new_tokens: int) -> float:
    async with asyncio.timeout(LIMIT_S), aiohttp.ClientSession() as session:
        client = Client(session, url, CompletionApi(model), max_tokens=new_tokens)
        await client.closed_loop(asked, len(asked))
    summary = summarise(client.records, Objective())
    if summary.errors or summary.output_tokens != len(asked) * new_tokens:
        raise OSError(f"requests failed: {summary.errors}")
    return summary.output_tokens_per_s

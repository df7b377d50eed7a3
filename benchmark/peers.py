"""The same work by this server and by others, HTTP to HTTP, in turn.

    python -m benchmark.peers                                   all peers that can be installed
    python -m benchmark.peers --peers llama.cpp --rounds 6 --out benchmark/results/peers.json

A random llama of 134 million parameters in bfloat16 (`benchmark.checkpoints`): answers of 64 tokens
to prompts of 128, with 1, 8 and 32 streams at once, and the time to the first token after a prompt
of 512. Peers that can see are also asked about a picture that nobody has seen before: the time to
the first token of a LLaVA-NeXT with CLIP's real geometry over that llama, by both through
`/v1/chat/completions`. Peers are installed from the package index into `build/peers/`. Both servers
run at once, one of them idle; each round asks one after the other, and ratios are taken within
rounds. Above 1, this server is faster. A peer that cannot be installed or started is named with the
reason, and so is a measurement that fails or takes too long.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
from tokenizers import Tokenizer

from benchmark.checkpoints import CACHE, checkpoint
from benchmark.load.client import Client, Record
from benchmark.load.measure import Objective, Summary, summarise
from benchmark.load.protocol import Api, ChatApi, CompletionApi
from benchmark.load.workload import WORDS, Conversation, Turn, picture
from benchmark.peer_servers.servers import (
    PEERS,
    end_servers_on_sigterm,
    own_server,
    peer_server,
)
from benchmark.ratios import ratio_of
from benchmark.results_file import provenance, write_json

MODEL = "llama-125m"
STREAMS = (1, 8, 32)
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
FIRST_PROMPT_TOKENS = 512
FIRST_OUTPUT_TOKENS = 4  # where only the first is timed
PICTURE_MODEL = "llava-next-small"
PICTURE_SIDE = 336  # pixels: LLaVA-NeXT's smallest, 3 tiles and 1,176 tokens
QUESTION_TOKENS = 16
LIMIT_S = 120  # of one measurement
Report = dict[str, Any]


class Prompts:
    """Texts of so many tokens, none of which begins like another, and pictures, all different."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rng = Random(0)

    def text(self, num_tokens: int) -> str:
        """The longest beginning of random words that has at most `num_tokens`."""
        words = self._rng.choices(WORDS, k=num_tokens)
        while len(self._tokenizer.encode(" ".join(words)).ids) > num_tokens:
            words.pop()
        return " ".join(words)

    def picture(self) -> str:
        """A square of `PICTURE_SIDE`, as a data: URL."""
        return picture(self._rng, PICTURE_SIDE)


class Load:
    """Asks one server; one measurement at a time."""

    def __init__(self, url: str, model: str, prompts: Prompts) -> None:
        self._url = url
        self._model = model
        self._prompts = prompts
        self.records: list[Record] = []  # of the last measurement, or of the one under way

    async def tokens_per_s(self, streams: int) -> float:
        """Output tokens per second of all streams together, prompts included in the time."""
        turns = [Turn(self._prompts.text(PROMPT_TOKENS)) for _ in range(streams)]
        summary = await self._run(turns, OUTPUT_TOKENS, CompletionApi(self._model))
        expected = streams * OUTPUT_TOKENS
        if summary.output_tokens != expected:
            raise OSError(f"it sent {summary.output_tokens} tokens instead of {expected}")
        return summary.output_tokens_per_s

    async def first_token_s(self) -> float:
        """Seconds to the first text after a prompt of `FIRST_PROMPT_TOKENS`."""
        turn = Turn(self._prompts.text(FIRST_PROMPT_TOKENS))
        return await self._first_text_s(turn, CompletionApi(self._model))

    async def first_token_after_picture_s(self) -> float:
        """Seconds to the first text after a new picture and a short question."""
        turn = Turn(self._prompts.text(QUESTION_TOKENS), (self._prompts.picture(),))
        return await self._first_text_s(turn, ChatApi(self._model))

    async def _first_text_s(self, turn: Turn, api: Api) -> float:
        summary = await self._run([turn], FIRST_OUTPUT_TOKENS, api)
        return summary.ttft_s.p50

    async def _run(self, turns: list[Turn], max_tokens: int, api: Api) -> Summary:
        conversations = [Conversation((turn,)) for turn in turns]
        try:
            async with asyncio.timeout(LIMIT_S), aiohttp.ClientSession() as session:
                client = Client(session, self._url, api, max_tokens=max_tokens)
                self.records = client.records
                await client.closed_loop(conversations, len(conversations))
        except TimeoutError:
            raise OSError(f"not done after {LIMIT_S} s") from None
        summary = summarise(client.records, Objective())
        if summary.errors:
            raise OSError(f"requests failed: {summary.errors}")
        return summary


Loads = tuple[Load, Load]  # this server's and the peer's
Measure = Callable[[Load], Awaitable[float]]
Comparison = Callable[[Loads, int], Coroutine[Any, Any, Report]]


async def compare_text(loads: Loads, rounds: int) -> Report:
    """Rates and the first token, both servers beside each other."""
    rates = {
        str(streams): await _beside(lambda load, n=streams: load.tokens_per_s(n), loads, rounds)  # type: ignore[misc]
        for streams in STREAMS
    }
    first_token = await _beside(Load.first_token_s, loads, rounds, is_time=True)
    return {"output_tokens_per_s": rates, "first_token_ms": first_token}


async def compare_pictures(loads: Loads, rounds: int) -> Report:
    """The first token after a picture, both servers beside each other."""
    row = await _beside(Load.first_token_after_picture_s, loads, rounds, is_time=True)
    return {"first_token_after_picture_ms": row}


async def _beside(measure: Measure, loads: Loads, rounds: int, *, is_time: bool = False) -> Report:
    """Medians, and ratios taken within rounds; each server is warmed up first.

    `measure` tells seconds or a rate; `reason` instead of numbers where one of them fails.
    """
    try:
        for load in loads:
            await measure(load)
        ours, theirs = await _in_turn(measure, loads, rounds)
    except OSError as reason:
        return {"reason": str(reason)}
    if is_time:
        return _side_by_side(ours, theirs, theirs, ours, 3)
    return _side_by_side(ours, theirs, ours, theirs, 1)


async def _in_turn(measure: Measure, loads: Loads, rounds: int) -> tuple[list[float], list[float]]:
    """Every round asks both; who is first changes."""
    series: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            series[side].append(await measure(loads[side]))
    return series


def _side_by_side(
    ours: list[float], theirs: list[float], above: list[float], below: list[float], digits: int
) -> Report:
    """`above` / `below` is the ratio that is larger the faster this server is."""
    scale = 10.0**digits if digits == 3 else 1.0
    return {
        "ours": round(statistics.median(ours) * scale, 1),
        "peer": round(statistics.median(theirs) * scale, 1),
        "ratio": asdict(ratio_of(above, below)),
    }


def measure_peer(name: str, folder: Path, prompts: Prompts, rounds: int) -> Report:
    """Text, and pictures if it can see; `reason` instead of numbers where the peer does not run."""
    peer = PEERS[name]
    try:
        peer.environment.install()
        numbers = _compared(name, folder, prompts, rounds, compare_text)
    except OSError as reason:
        return {"package": peer.package, "reason": str(reason)}
    if peer.sees:
        seeing = checkpoint(PICTURE_MODEL, folder.parent)
        try:
            numbers |= _compared(name, seeing, prompts, rounds, compare_pictures)
        except OSError as reason:
            numbers["first_token_after_picture_ms"] = {"reason": str(reason)}
    return {"package": peer.package, "version": peer.environment.version(peer.package)} | numbers


def _compared(
    name: str, folder: Path, prompts: Prompts, rounds: int, comparison: Comparison
) -> Report:
    """Both servers of the model in `folder` at once."""
    logs = folder.parent
    with (
        own_server(folder, logs / "own.log") as own,
        peer_server(PEERS[name], folder, max(STREAMS), logs / f"{name}.log") as other,
    ):
        loads = Load(own, str(folder), prompts), Load(other, str(folder), prompts)
        return asyncio.run(comparison(loads, rounds))


def lines(name: str, found: Report) -> list[str]:
    """What is printed of a peer."""
    if "reason" in found:
        return [f"{name}: not measured: {found['reason']}"]
    rows = {f"tokens/s, {n} streams": row for n, row in found["output_tokens_per_s"].items()}
    rows["first token, ms"] = found["first_token_ms"]
    if "first_token_after_picture_ms" in found:
        rows["first token, picture, ms"] = found["first_token_after_picture_ms"]
    return [f"{name + ' ' + found['version']:32} {label:24} {_cell(rows[label])}" for label in rows]


def _cell(row: Report) -> str:
    if "reason" in row:
        return f"not measured: {row['reason']}"
    ratio = row["ratio"]
    return (
        f"{row['ours']:9.1f} / {row['peer']:9.1f}: "
        f"{ratio['median']:6.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 if no peer could be measured."""
    asked = _parser().parse_args(arguments)
    end_servers_on_sigterm()
    folder = checkpoint(MODEL, asked.checkpoints)
    prompts = Prompts(Tokenizer.from_file(str(folder / "tokenizer.json")))
    report: Report = {"about": provenance("tessera", "torch"), "peers": {}}
    report["about"] |= {"model": MODEL, "rounds": asked.rounds, "shared_machine": asked.shared}
    report["about"]["picture"] = {"model": PICTURE_MODEL, "side": PICTURE_SIDE}
    for name in asked.peers:
        found = measure_peer(name, folder, prompts, asked.rounds)
        report["peers"][name] = found
        print("\n".join(lines(name, found)), flush=True)
        if asked.out:
            write_json(asked.out, report)
    return 0 if any("reason" not in found for found in report["peers"].values()) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=6, help="6 or more for 95 %% confidence")
    parser.add_argument("--checkpoints", type=Path, default=CACHE, help="where the model is kept")
    parser.add_argument(
        "--shared", action="store_true", help="note that others used the machine meanwhile"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

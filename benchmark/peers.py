"""The same work by this server and by others, HTTP to HTTP, in turn.

    python -m benchmark.peers                                   all peers that can be installed
    python -m benchmark.peers --peers llama.cpp --rounds 6 --out benchmark/results/peers.json

A random llama of 134 million parameters in bfloat16 (`benchmark.checkpoints`): answers of 64 tokens
to prompts of 128, with 1, 8 and 32 streams at once, and the time to the first token after a prompt
of 512. Peers are installed from the package index into `build/peers/`. Both servers run at once,
one of them idle; each round asks one after the other, and ratios are taken within rounds. Above 1,
this server is faster. A peer that cannot be installed or started is named with the reason.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
from tokenizers import Tokenizer

from benchmark.checkpoints import CACHE, checkpoint
from benchmark.load.client import Client, Record
from benchmark.load.measure import Objective, summarise
from benchmark.load.protocol import CompletionApi
from benchmark.load.workload import WORDS, Conversation, Turn
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
TIMEOUT = aiohttp.ClientTimeout(total=600)
Report = dict[str, Any]


class Prompts:
    """Texts of so many tokens, none of which begins like another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._rng = Random(0)

    def text(self, num_tokens: int) -> str:
        """The longest beginning of random words that has at most `num_tokens`."""
        words = self._rng.choices(WORDS, k=num_tokens)
        while len(self._tokenizer.encode(" ".join(words)).ids) > num_tokens:
            words.pop()
        return " ".join(words)


class Load:
    """Asks one server; one measurement at a time."""

    def __init__(self, url: str, model: str, prompts: Prompts) -> None:
        self._url = url
        self._model = model
        self._prompts = prompts
        self.records: list[Record] = []  # of the last measurement

    async def tokens_per_s(self, streams: int) -> float:
        """Output tokens per second of all streams together, prompts included in the time."""
        conversations = [self._ask(PROMPT_TOKENS) for _ in range(streams)]
        summary = await self._run(conversations, OUTPUT_TOKENS)
        expected = streams * OUTPUT_TOKENS
        if summary.output_tokens != expected:
            raise OSError(f"it sent {summary.output_tokens} tokens instead of {expected}")
        return summary.output_tokens_per_s

    async def first_token_s(self) -> float:
        """Seconds to the first text after a prompt of `FIRST_PROMPT_TOKENS`."""
        summary = await self._run([self._ask(FIRST_PROMPT_TOKENS)], 4)
        return summary.ttft_s.p50

    async def _run(self, conversations: list[Conversation], max_tokens: int) -> Any:
        async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
            client = Client(session, self._url, CompletionApi(self._model), max_tokens=max_tokens)
            await client.closed_loop(conversations, len(conversations))
        self.records = client.records
        summary = summarise(client.records, Objective())
        if summary.errors:
            raise OSError(f"requests failed: {summary.errors}")
        return summary

    def _ask(self, num_tokens: int) -> Conversation:
        return Conversation((Turn(self._prompts.text(num_tokens)),))


async def compare(own: Load, peer: Load, rounds: int) -> Report:
    """Medians, and ratios taken within rounds; each server is warmed up first."""
    report: Report = {"output_tokens_per_s": {}}
    for streams in STREAMS:
        await own.tokens_per_s(streams), await peer.tokens_per_s(streams)
        ours, theirs = await _in_turn(
            lambda load, streams=streams: load.tokens_per_s(streams),  # type: ignore[misc]
            (own, peer),
            rounds,
        )
        report["output_tokens_per_s"][str(streams)] = _side_by_side(ours, theirs, ours, theirs, 1)
    await own.first_token_s(), await peer.first_token_s()
    ours, theirs = await _in_turn(lambda load: load.first_token_s(), (own, peer), rounds)
    report["first_token_ms"] = _side_by_side(ours, theirs, theirs, ours, 3)
    return report


async def _in_turn(
    measure: Any, loads: tuple[Load, Load], rounds: int
) -> tuple[list[float], list[float]]:
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
    """Both servers at once; `reason` instead of numbers where the peer does not run."""
    peer, logs = PEERS[name], folder.parent
    try:
        peer.environment.install()
        with (
            own_server(folder, logs / "own.log") as own,
            peer_server(peer, folder, max(STREAMS), logs / f"{name}.log") as other,
        ):
            loads = (Load(own, str(folder), prompts), Load(other, str(folder), prompts))
            numbers = asyncio.run(compare(*loads, rounds))
    except OSError as reason:
        return {"package": peer.package, "reason": str(reason)}
    return {"package": peer.package, "version": peer.environment.version(peer.package)} | numbers


def lines(name: str, found: Report) -> list[str]:
    """What is printed of a peer."""
    if "reason" in found:
        return [f"{name}: not measured: {found['reason']}"]
    rows = {f"tokens/s, {n} streams": row for n, row in found["output_tokens_per_s"].items()}
    rows["first token, ms"] = found["first_token_ms"]
    return [
        f"{name + ' ' + found['version']:32} {label:22} {row['ours']:9.1f} / {row['peer']:9.1f}: "
        f"{row['ratio']['median']:6.2f}x ({row['ratio']['low']:.2f} to {row['ratio']['high']:.2f})"
        for label, row in rows.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 if no peer could be measured."""
    asked = _parser().parse_args(arguments)
    end_servers_on_sigterm()
    folder = checkpoint(MODEL, asked.checkpoints)
    prompts = Prompts(Tokenizer.from_file(str(folder / "tokenizer.json")))
    report: Report = {"about": provenance("tessera", "torch"), "peers": {}}
    report["about"] |= {"model": MODEL, "rounds": asked.rounds, "shared_machine": asked.shared}
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

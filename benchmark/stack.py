"""What the whole server adds to the bare steps of its shard, HTTP to HTTP.

    python -m benchmark.stack --out benchmark/results/stack.json

So many streams decode at once. `gap`: the median time between two tokens of a stream, seen by an
HTTP client on the same machine; `step`: the median time of a decode step of as many sequences over
as long contexts, in a process without router, gRPC and HTTP, with as many threads. They take turns,
the other side being idle, and ratios and differences are taken within rounds.
"""

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmark.checkpoints import CACHE, checkpoint
from benchmark.load.measure import Objective, summarise
from benchmark.peer_servers.servers import end_servers_on_sigterm, own_server
from benchmark.peers import MODEL, OUTPUT_TOKENS, PROMPT_TOKENS, Load, Prompts
from benchmark.ratios import ratio_of
from benchmark.results_file import provenance, write_json
from benchmark.step import times
from benchmark.steps.cases import Case

STREAMS = (32, 64)


def gap_ms(load: Load, streams: int) -> float:
    """Between two tokens of a stream, by the client's clock."""
    asyncio.run(load.tokens_per_s(streams))
    return 1e3 * summarise(load.records, Objective()).itl_s.p50


def step_ms(streams: int, checkpoints: Path) -> float:
    """Of the shard alone, in the middle of such answers."""
    case = Case("decode", streams, PROMPT_TOKENS + OUTPUT_TOKENS // 2)
    (row,) = times(MODEL, [case], checkpoints=checkpoints, threads=0, rounds=4)
    return float(row["median_wall_ms"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    asked = _parser().parse_args(arguments)
    end_servers_on_sigterm()
    folder = checkpoint(MODEL, asked.checkpoints)
    prompts = Prompts(Tokenizer.from_file(str(folder / "tokenizer.json")))
    report: dict[str, Any] = {"about": provenance("tessera", "torch"), "streams": {}}
    report["about"] |= {"model": MODEL, "rounds": asked.rounds}
    with own_server(folder, asked.checkpoints / "own.log") as url:
        load = Load(url, str(folder), prompts)
        for streams in asked.streams:
            gap_ms(load, streams)  # warms up
            gaps, steps = [], []
            for _ in range(asked.rounds):
                gaps.append(gap_ms(load, streams))
                steps.append(step_ms(streams, asked.checkpoints))
            added = [gap - step for gap, step in zip(gaps, steps, strict=True)]
            row = {
                "gap_ms": round(statistics.median(gaps), 2),
                "step_ms": round(statistics.median(steps), 2),
                "added_ms": round(statistics.median(added), 2),
                "ratio": asdict(ratio_of(gaps, steps)),
            }
            report["streams"][str(streams)] = row
            print(f"{streams} streams: {row}", flush=True)
    if asked.out:
        write_json(asked.out, report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.stack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--rounds", type=int, default=6, help="6 or more for 95 %% confidence")
    parser.add_argument("--checkpoints", type=Path, default=CACHE, help="where the model is kept")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

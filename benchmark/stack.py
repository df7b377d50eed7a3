"""What the whole server adds to the steps of its shard, HTTP to HTTP.

    python -m benchmark.stack --out benchmark/results/stack.json

So many streams at once get answers of 64 tokens to prompts of 128. `wall`: from sending the first
request to the end of the last answer, by an HTTP client on the same machine. `computed`: what rank
0 spent meanwhile in the model and in choosing tokens, by the server's own `/metrics`. Both are of
the same run, so a busy machine slows both; the ratio is 1 where everything else costs nothing.
"""

import argparse
import asyncio
import statistics
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmark.checkpoints import CACHE, checkpoint
from benchmark.peer_servers.servers import end_servers_on_sigterm, own_server
from benchmark.peers import MODEL, Load, Prompts
from benchmark.ratios import ratio_of
from benchmark.results_file import provenance, write_json

STREAMS = (32, 64)
COMPUTING = ("tgi_batch_forward_duration_sum", "tgi_batch_decode_duration_sum")
STEPS = ("tgi_batch_forward_duration_count",)


def total(metrics: str, names: Sequence[str]) -> float:
    """The sum of some series over all their labels, from the text of `/metrics`."""
    lines = (line.rpartition(" ") for line in metrics.splitlines() if not line.startswith("#"))
    return sum(float(value) for series, _, value in lines if series.partition("{")[0] in names)


def once(load: Load, url: str, streams: int) -> tuple[float, float, float]:
    """Seconds on the wall, seconds computed, and steps."""
    before = _metrics(url)
    asyncio.run(load.tokens_per_s(streams))
    after = _metrics(url)
    records = load.records
    wall_s = max(each.ended_at for each in records) - min(each.sent_at for each in records)
    computed_s, steps = (total(after, names) - total(before, names) for names in (COMPUTING, STEPS))
    return wall_s, computed_s, steps


def _metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        return str(reply.read().decode())


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
            once(load, url, streams)  # warms up
            runs = [once(load, url, streams) for _ in range(asked.rounds)]
            row = {
                "wall_s": round(statistics.median(wall for wall, _, _ in runs), 3),
                "computed_s": round(statistics.median(each for _, each, _ in runs), 3),
                "added_ms_per_step": round(
                    statistics.median(1e3 * (wall - each) / steps for wall, each, steps in runs), 2
                ),
                "ratio": asdict(ratio_of(*zip(*((run[0], run[1]) for run in runs), strict=True))),
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

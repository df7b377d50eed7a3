"""What the whole server adds to the steps of its shard, HTTP to HTTP.

    python -m benchmark.stack --out benchmark/results/stack.json

So many streams at once get answers of 64 tokens to prompts of 128. `wall`: from sending the first
request to the end of the last answer, by an HTTP client on the same machine. `computed`: what rank
0 spent meanwhile in the model and in choosing tokens, by the server's own `/metrics`. Both are of
the same run, so a busy machine slows both; the ratio is 1 where everything else costs nothing.
`gap`: between two tokens of a stream, by the same client, while all streams decode; what is added
to it is its mean less that of what the steps meanwhile computed.
"""

import argparse
import asyncio
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmark.checkpoints import CACHE, checkpoint
from benchmark.load.client import Record
from benchmark.peer_servers.servers import end_servers_on_sigterm, own_server
from benchmark.peers import MODEL, OUTPUT_TOKENS, Load, Prompts
from benchmark.ratios import ratio_of
from benchmark.results_file import provenance, write_json

STREAMS = (32, 64)
COMPUTING = ("tgi_batch_forward_duration_sum", "tgi_batch_decode_duration_sum")
STEPS = ("tgi_batch_forward_duration_count",)


def total(metrics: str, names: Sequence[str]) -> float:
    """The sum of some series over all their labels, from the text of `/metrics`."""
    lines = (line.rpartition(" ") for line in metrics.splitlines() if not line.startswith("#"))
    return sum(float(value) for series, _, value in lines if series.partition("{")[0] in names)


@dataclass(frozen=True, slots=True)
class Run:
    """One load."""

    wall_s: float
    computed_s: float
    steps: float
    gap_s: float  # mean time between two tokens of a stream while all streams decode
    computed_per_step_s: float  # mean of the steps meanwhile


async def once(load: Load, url: str, streams: int) -> Run:
    """So many streams at once."""
    start, load.records = await _metrics(url), []
    running = asyncio.create_task(load.tokens_per_s(streams))
    await _until(lambda: len(load.records) == streams and _fewest(load.records) > 0, running)
    before, began = await _metrics(url), time.perf_counter()
    await _until(lambda: _most(load.records) > OUTPUT_TOKENS - 4, running)
    after, ended = await _metrics(url), time.perf_counter()
    await running
    end, records = await _metrics(url), load.records
    return Run(
        wall_s=max(each.ended_at for each in records) - min(each.sent_at for each in records),
        computed_s=total(end, COMPUTING) - total(start, COMPUTING),
        steps=total(end, STEPS) - total(start, STEPS),
        gap_s=_gap_s(records, began, ended),
        computed_per_step_s=(total(after, COMPUTING) - total(before, COMPUTING))
        / (total(after, STEPS) - total(before, STEPS)),
    )


async def _until(condition: Callable[[], bool], running: asyncio.Task[float]) -> None:
    while not condition() and not running.done():
        await asyncio.sleep(0.01)


def _fewest(records: Sequence[Record]) -> int:
    return min(len(each.text_times) for each in records)


def _most(records: Sequence[Record]) -> int:
    return max(len(each.text_times) for each in records)


def _gap_s(records: Sequence[Record], began: float, ended: float) -> float:
    """Of streams in which every token was a text of its own."""
    gaps = []
    for record in records:
        times = [at for at in record.text_times if began <= at <= ended]
        if len(record.text_times) == record.num_tokens and len(times) > 1:
            gaps.append((times[-1] - times[0]) / (len(times) - 1))
    return statistics.mean(gaps)


async def _metrics(url: str) -> str:
    return await asyncio.to_thread(_fetch, f"{url}/metrics")


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as reply:
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
            asyncio.run(once(load, url, streams))  # warms up
            runs = [asyncio.run(once(load, url, streams)) for _ in range(asked.rounds)]
            row = _row(runs)
            report["streams"][str(streams)] = row
            print(f"{streams} streams: {row}", flush=True)
            if asked.out:
                write_json(asked.out, report)
    return 0


def _row(runs: Sequence[Run]) -> dict[str, Any]:
    ratio = ratio_of([run.wall_s for run in runs], [run.computed_s for run in runs])

    def median_ms(values: Iterable[float]) -> float:
        return round(1e3 * statistics.median(values), 2)

    return {
        "wall_s": round(statistics.median(run.wall_s for run in runs), 3),
        "computed_s": round(statistics.median(run.computed_s for run in runs), 3),
        "added_ms_per_step": median_ms((run.wall_s - run.computed_s) / run.steps for run in runs),
        "gap_ms": median_ms(run.gap_s for run in runs),
        "added_ms_per_gap": median_ms(run.gap_s - run.computed_per_step_s for run in runs),
        "ratio": asdict(ratio),
    }


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

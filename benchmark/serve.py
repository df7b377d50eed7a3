"""Asks an LLM server over HTTP as many clients do, and says how fast it answered.

    python -m benchmark.serve --url http://127.0.0.1:8000 --rate 4 --requests 100
    python -m benchmark.serve --concurrency 8 --turns 3 --picture-share 0.5
    python -m benchmark.serve --sweep --rate 1 --slo-ttft-ms 1000 --slo-itl-ms 100 \\
        --out benchmark/results/serve.json --plot serve.svg

With --rate, clients arrive at random times at that rate whatever has become of those before them,
and waiting counts from when a request was due; with --concurrency, each client sends its next
request when it has its answer. Needs `pip install -e '.[bench]'`.
"""

import argparse
import asyncio
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
from rich.console import Console

from benchmark.load.arrivals import poisson_times_s
from benchmark.load.client import Client, read_extra
from benchmark.load.measure import Objective, Summary, summarise
from benchmark.load.protocol import APIS, api_named
from benchmark.load.report import Live, plot, table
from benchmark.load.sweep import Sweep, sweep
from benchmark.load.workload import Workload
from benchmark.results_file import provenance, write_json

Report = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 if nothing was answered."""
    asked = _parse(arguments)
    report: Report = {"about": _about(asked)}
    if asked.sweep:
        found = asyncio.run(_sweep(asked))
        report["best_per_s"] = found.best_per_s
        report["runs"] = [
            {"per_s": trial.per_s, "is_met": trial.is_met} | trial.summary.as_json()
            for trial in found.trials
        ]
        best = "none of them" if found.best_per_s is None else f"{found.best_per_s:.2f} requests/s"
        print(f"highest rate that meets the objective: {best}")
    else:
        report["runs"] = [{"per_s": asked.rate} | asyncio.run(_run(asked, asked.rate)).as_json()]
    if asked.out:
        write_json(asked.out, report)
    if asked.plot:
        plot(report["runs"], asked.plot)
    return 0 if any(run["answered"] for run in report["runs"]) else 1


async def _sweep(asked: argparse.Namespace) -> Sweep:
    run = partial(_run, asked)
    return await sweep(run, asked.rate, least_share=asked.slo_share, max_trials=asked.sweep_trials)


async def _run(asked: argparse.Namespace, per_s: float | None) -> Summary:
    """One run at one rate, or with a fixed concurrency."""
    # A rate that is too high shows only once a queue has had the time to grow.
    count = max(asked.requests, math.ceil((per_s or 0) * asked.least_seconds))
    conversations = _workload(asked).conversations(asked.seed, count)
    name = f"{per_s:.2f} conversations/s" if per_s else f"{asked.concurrency} at once"
    headers = {"authorization": f"Bearer {asked.api_key}"} if asked.api_key else {}
    timeout = aiohttp.ClientTimeout(total=asked.timeout)
    connector = aiohttp.TCPConnector(limit=0)  # the load is limited here and nowhere else
    with Live(count * asked.turns, name) as live:
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers
        ) as session:
            client = Client(
                session,
                asked.url,
                api_named(asked.api, asked.model),
                max_tokens=asked.output_tokens,
                extra=asked.body,
                on_end=live.ended,
            )
            if per_s:
                times_s = poisson_times_s(Random(asked.seed), per_s, len(conversations))
                await client.open_loop(conversations, times_s)
            else:
                await client.closed_loop(conversations, asked.concurrency)
    summary = summarise(client.records, _objective(asked))
    Console().print(table(name, summary))
    return summary


def _workload(asked: argparse.Namespace) -> Workload:
    return Workload(
        prompt_words=asked.prompt_words,
        prompt_spread=asked.prompt_spread,
        output_tokens=asked.output_tokens,
        turns=asked.turns,
        picture_share=asked.picture_share,
        picture_sides=tuple(asked.picture_sides),
        shared_words=asked.shared_words,
        num_shared=asked.num_shared,
    )


def _objective(asked: argparse.Namespace) -> Objective:
    limits = (asked.slo_ttft_ms, asked.slo_itl_ms)
    return Objective(*(None if limit is None else limit / 1000 for limit in limits))


def _about(asked: argparse.Namespace) -> Report:
    """The command names the server; keys are not written."""
    about = provenance("tessera", "aiohttp")
    if asked.api_key:
        about["command"] = about["command"].replace(asked.api_key, "KEY")
    loop = "open" if asked.rate else "closed"
    objective = asdict(_objective(asked)) | {"least_share": asked.slo_share}
    workload = asdict(_workload(asked)) | {"seed": asked.seed}
    return about | {"api": asked.api, "loop": loop, "workload": workload, "objective": objective}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.sweep and asked.concurrency:
        parser.error("--sweep varies the rate: leave --concurrency out")
    if asked.sweep and asked.slo_ttft_ms is None and asked.slo_itl_ms is None:
        parser.error("--sweep needs --slo-ttft-ms or --slo-itl-ms: what should be met?")
    if asked.concurrency is None and asked.rate is None:
        asked.rate = 1.0
    if asked.api == "completions" and asked.picture_share:
        parser.error("--api completions takes text only")
    return asked


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("it must be above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("it must be between 0 and 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    server = parser.add_argument_group("the server")
    server.add_argument("--url", default="http://127.0.0.1:8000", help="scheme, host and port")
    server.add_argument("--api", choices=APIS, default="chat")
    server.add_argument("--model", default="tgi", help="what OpenAI bodies call the model")
    server.add_argument("--api-key", default="", help="bearer token")
    server.add_argument("--timeout", type=_positive, default=600.0, help="seconds per request")
    server.add_argument(
        "--body", type=read_extra, default={}, metavar="JSON", help="more fields of every body"
    )
    _add_workload(parser.add_argument_group("what is asked"))
    pace = parser.add_argument_group("how often")
    either = pace.add_mutually_exclusive_group()
    either.add_argument("--rate", type=_positive, help="conversations begun per second; default 1")
    either.add_argument("--concurrency", type=_count, help="conversations at once")
    pace.add_argument(
        "--least-seconds", type=float, default=0.0, help="more requests if they come in less"
    )
    pace.add_argument("--slo-ttft-ms", type=_positive, help="a good request's first token")
    pace.add_argument("--slo-itl-ms", type=_positive, help="its mean time between tokens")
    pace.add_argument("--slo-share", type=_share, default=0.95, help="of requests, for --sweep")
    pace.add_argument(
        "--sweep", action="store_true", help="find the highest rate that is good, from --rate on"
    )
    pace.add_argument("--sweep-trials", type=_count, default=12, help="rates tried at most")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--plot", type=Path, help="write a chart: .svg, .png or .pdf")
    return parser


def _add_workload(group: argparse._ArgumentGroup) -> None:
    plain = Workload()
    group.add_argument("--requests", type=_count, default=50, help="conversations")
    group.add_argument("--turns", type=_count, default=plain.turns, help="of each")
    group.add_argument("--prompt-words", type=_count, default=plain.prompt_words, help="median")
    group.add_argument("--prompt-spread", type=float, default=plain.prompt_spread, help="sigma")
    group.add_argument("--output-tokens", type=_count, default=plain.output_tokens, help="most")
    group.add_argument("--picture-share", type=_share, default=plain.picture_share)
    group.add_argument("--picture-sides", type=_count, nargs="+", default=plain.picture_sides)
    group.add_argument("--shared-words", type=int, default=0, help="of a common beginning")
    group.add_argument("--num-shared", type=_count, default=1, help="different beginnings")
    group.add_argument("--seed", type=int, default=1)


if __name__ == "__main__":
    sys.exit(main())

"""Times steps of a shard, without HTTP and gRPC, beside what the machine allows.

    python -m benchmark.step                                    all models of --models, a table
    python -m benchmark.step --models llama-125m --only 'decode 8x*'
    python -m benchmark.step --growth --out benchmark/results/step.json --plots benchmark/results

A step's limit is the larger of two times: reading the weights and the cached keys and values once
at the rate at which a large tensor is read, and the step's arithmetic at the rate of a large matrix
product. Both rates are measured between the steps of the case, by the same clock: with one thread
on a CPU that is processor time, so that neighbours on the machine count less. The best of each
counts. `overhead` is what a step takes from the message's bytes to the reply's bytes and is neither
in the model nor in the sampler, always by the wall's clock (`Stopwatch`). Models are random
(`benchmark.checkpoints`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmark.checkpoints import CACHE, CHECKPOINTS, checkpoint
from benchmark.results_file import provenance, write_json
from benchmark.steps.cases import GROWTH, PICTURES, TEXT, Case
from benchmark.steps.worker import Order
from tessera.launcher.plan import PASSIVE_OPENMP

Row = dict[str, Any]

MODELS = ("llama-125m", "llama-1.1b", "llava-next-small")
GROWING = "llama-125m"  # the model whose growth is shown
RANKS = (1, 2)


def times(
    model: str,
    cases: Sequence[Case],
    *,
    checkpoints: Path,
    threads: int,
    rounds: int,
    device: str = "cpu",
    ranks: int = 1,
) -> list[Row]:
    """Run the cases on as many processes as there are ranks, printing each."""
    folder = checkpoint(model, checkpoints)
    environment = os.environ | PASSIVE_OPENMP
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    rows = []
    with tempfile.TemporaryDirectory() as meeting:
        workers = []
        for rank in range(ranks):
            order = Order(
                str(folder),
                device,
                threads,
                rank,
                ranks,
                f"file://{meeting}/ranks",
                rounds,
                [asdict(case) for case in cases],
            )
            command = [sys.executable, "-m", "benchmark.steps.worker", json.dumps(asdict(order))]
            workers.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
            )
        try:
            for line in workers[0].stdout or ():
                rows.append({"model": model} | json.loads(line))
                print(_line(rows[-1]), flush=True)
            if any(worker.wait(60) for worker in workers):
                raise SystemExit(f"a shard of {model} failed")
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    return rows


def _line(row: Row) -> str:
    ranks = f", {row['ranks']} ranks" if row["ranks"] > 1 else ""
    return (
        f"{row['model'] + ranks:18} {row['name']:20} {row['ms']:10.2f} ms, limit "
        f"{row['limit_ms']:9.2f} ms ({row['bound']}): {row['times_limit']:5.2f}x, "
        f"overhead {row['overhead_ms']:6.3f} ms"
    )


def cases_of(model: str, only: str) -> list[Case]:
    """What is timed of a model."""
    kind = CHECKPOINTS[model][0]
    cases = PICTURES if kind.startswith("next-") else TEXT
    return [case for case in cases if fnmatch(case.name, only)]


def growth(rows: Sequence[Row], **settings: Any) -> dict[str, list[Row]]:
    """How times grow with batch, context, tiles and ranks. Pictures were timed before (`rows`)."""
    panels = {name: times(GROWING, cases, **settings) for name, cases in GROWTH.items()}
    if tiles := [row for row in rows if row["kind"] == "pictures"]:
        panels["tiles"] = tiles
    case = Case("decode", 8, 128)
    panels["ranks"] = [times(GROWING, [case], **settings, ranks=ranks)[0] for ranks in RANKS]
    return panels


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    asked = _parser().parse_args(arguments)
    rows: list[Row] = []
    settings = {"device": asked.device, "threads": asked.threads, "rounds": asked.rounds}
    of_times = settings | {"checkpoints": asked.checkpoints}
    for model in asked.models:
        if cases := cases_of(model, asked.only):
            rows += times(model, cases, **of_times)
    if not rows:
        print(f"no case is called {asked.only!r}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "about": provenance("tessera", "torch") | settings | {"shared_machine": asked.shared},
        "steps": rows,
    }
    if asked.growth:
        report["growth"] = growth(rows, **of_times)
    if asked.out:
        write_json(asked.out, report)
    if asked.plots:
        # matplotlib is needed by those who want pictures only.
        from benchmark.steps.plots import write_growth, write_roofline

        write_roofline(rows, asked.plots / "roofline.svg")
        if asked.growth:
            write_growth(report["growth"], asked.plots / "growth.svg")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=CHECKPOINTS, default=MODELS)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases with such a name")
    parser.add_argument("--checkpoints", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on cpu; 0: torch's own choice")
    parser.add_argument("--rounds", type=int, default=5, help="of steps and limits in turn")
    parser.add_argument("--growth", action="store_true", help="also over batch, context, ranks")
    parser.add_argument(
        "--shared", action="store_true", help="note that others used the machine meanwhile"
    )
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--plots", type=Path, help="folder of charts")
    return parser


if __name__ == "__main__":
    sys.exit(main())

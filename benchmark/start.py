"""How long a server takes until it is ready, and loading a model against reading its files.

    python -m benchmark.start --out benchmark/results/start.json

`ready`: from starting the launcher with the demo model to the first 200 of /health. `load`: from
the checkpoint's folder to a model that computes, in a process of its own, against reading the
files' bytes into memory. Before each of the two, the files are dropped from the page cache, so that
both come from the disk; they take turns, and the ratio is taken within rounds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.checkpoints import CACHE, CHECKPOINTS, checkpoint
from benchmark.peer_servers.servers import end_servers_on_sigterm, own_server
from benchmark.ratios import ratio_of
from benchmark.results_file import provenance, write_json
from tessera.launcher.model_folder import DEMO_FOLDER

READ_BYTES = 16 << 20
LOAD = """
import sys, time
from pathlib import Path
import torch
from tessera.shard.backends import load_backend
from tessera.shard.models import load_model, resolve_dtype
from tessera.shard.models.base import Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.parallel import Group

folder, backend = Path(sys.argv[1]), load_backend("cpu")
dtype = resolve_dtype("auto", read_config(folder), backend.device.type)
start = time.perf_counter()
load_model(folder, Placement(backend, Group(), dtype))
print(time.perf_counter() - start)
"""


def read_s(folder: Path) -> float:
    """Seconds to read the tensors' files into memory that nobody has used before."""
    size = sum(path.stat().st_size for path in _files(folder))
    start = time.perf_counter()
    memory = memoryview(bytearray(size))
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while taken := file.readinto(memory[:READ_BYTES]):  # type: ignore[attr-defined]
                memory = memory[taken:]
    return time.perf_counter() - start


def load_s(folder: Path) -> float:
    """Seconds to load the model, in a new process whose imports are not counted."""
    command = [sys.executable, "-c", LOAD, str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(told.stdout)


def ready_s(folder: Path, log: Path) -> float:
    """Seconds from starting the launcher to the first 200 of /health."""
    start = time.perf_counter()
    with own_server(folder, log):
        return time.perf_counter() - start


def forget(folder: Path) -> None:
    """Drop the tensors' files from the page cache."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Loading against reading, in turn; who is first changes."""
    series: dict[Any, list[float]] = {read_s: [], load_s: []}
    for number in range(rounds):
        for measure in (read_s, load_s) if number % 2 == 0 else (load_s, read_s):
            forget(folder)
            series[measure].append(measure(folder))
    reads, loads = series[read_s], series[load_s]
    return {
        "model": folder.name,
        "gib": round(sum(path.stat().st_size for path in _files(folder)) / 2**30, 2),
        "read_s": round(statistics.median(reads), 3),
        "load_s": round(statistics.median(loads), 3),
        "ratio": asdict(ratio_of(loads, reads)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    asked = _parser().parse_args(arguments)
    end_servers_on_sigterm()
    folder = checkpoint(asked.model, asked.checkpoints)
    report: dict[str, Any] = {"about": provenance("tessera", "torch", "safetensors")}
    report["about"] |= {"rounds": asked.rounds}
    times = [ready_s(DEMO_FOLDER, asked.checkpoints / "start.log") for _ in range(asked.rounds)]
    report["ready"] = {
        "median_s": round(statistics.median(times), 2),
        "best_s": round(min(times), 2),
    }
    print(f"ready: {report['ready']['median_s']} s, at best {report['ready']['best_s']} s")
    report["load"] = compare(folder, asked.rounds)
    load = report["load"]
    print(
        f"{load['model']}: loaded in {load['load_s']} s, its {load['gib']} GiB are read in "
        f"{load['read_s']} s: {load['ratio']['median']:.2f}x"
    )
    if asked.out:
        write_json(asked.out, report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=CHECKPOINTS, default="llama-1.1b", help="to load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoints", type=Path, default=CACHE, help="where models are kept")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Is one state of this repository faster than another? Runs a benchmark in both, in turn.

    python -m benchmark.ab main .                               a decode step, main against here
    python -m benchmark.ab HEAD~5 HEAD --value steps.0.overhead_ms
    python -m benchmark.ab main . --rounds 9 -- python -m benchmark.sse --out {out}

A state is any name git knows, or `.` for the files as they are here. The command is run here, once
with each state's `tessera` in turn, and writes JSON to {out}; --value says which number counts.
So both are measured by the same benchmark. What is printed is the median of the rounds' ratios
B / A with an interval: where it leaves 1 out, the difference is no accident.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark.ratios import ratio_of
from benchmark.results_file import provenance, write_json

ROOT = Path(__file__).parents[1]
COPIES = ROOT / "build" / "ab"
PACKAGES = ("launcher", "proto", "router", "shard")
COMMAND = (
    "python -m benchmark.step --models llama-125m --only 'decode 8x128' --rounds 3 --out {out}"
)


def copy_of(state: str) -> Path:
    """A folder with the files of a state; the same commit is copied once.

    Raises:
        subprocess.CalledProcessError: git knows no such state.
    """
    if state == ".":
        return _prepared(ROOT)
    commit = _git("rev-parse", "--verify", f"{state}^{{commit}}").decode().strip()
    folder = COPIES / commit[:12]
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        subprocess.run(
            ["tar", "-x", "-C", str(unfinished)], input=_git("archive", commit), check=True
        )
        unfinished.rename(folder)
    return _prepared(folder)


def _prepared(folder: Path) -> Path:
    """Import layout and CPU kernels, made where they are missing; kernels take a minute."""
    layout = folder / ".typed" / "tessera"
    layout.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        if not (layout / package).exists():
            (layout / package).symlink_to(Path("../..") / package)
    for kernels in (ROOT / "shard" / "backends").glob("*.so"):  # named after their sources
        if not (folder / "shard" / "backends" / kernels.name).exists():
            shutil.copy2(kernels, folder / "shard" / "backends")
    build = [sys.executable, "-m", "tessera.shard.backends.build"]
    subprocess.run(build, env=environment(folder), check=True, capture_output=True)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Variables with which `tessera` is that of a copy; it comes before an installed one."""
    return os.environ | {"PYTHONPATH": f"{folder / '.typed'}{os.pathsep}{ROOT}"}


def measure(folder: Path, command: Sequence[str], out: Path, value: str) -> float:
    """Run the command with a copy's `tessera` and read its number.

    Raises:
        SystemExit: it fails, or there is no such number.
    """
    out.unlink(missing_ok=True)
    words = [word.replace("{out}", str(out)) for word in command]
    if words[0] == "python":
        words[0] = sys.executable
    told = subprocess.run(words, cwd=ROOT, env=environment(folder), capture_output=True, text=True)
    if told.returncode or not out.exists():
        raise SystemExit(f"the command failed in {folder}:\n{told.stdout}{told.stderr}")
    return number_at(json.loads(out.read_text()), value)


def number_at(report: Any, path: str) -> float:
    """The number at a path such as `steps.0.ms`.

    Raises:
        SystemExit: there is none.
    """
    found = report
    try:
        for key in path.split("."):
            found = found[int(key)] if isinstance(found, list) else found[key]
        return float(found)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise SystemExit(f"the results have no number at {path}") from error


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = shlex.split(COMMAND)
    if "--" in given:
        at = given.index("--")
        given, command = given[:at], given[at + 1 :]
    asked = _parser().parse_args(given)
    try:
        folders = (copy_of(asked.a), copy_of(asked.b))
    except subprocess.CalledProcessError as error:
        print((error.stderr or b"").decode() or error, file=sys.stderr)
        return 2
    out = COPIES / "out.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    series: tuple[list[float], list[float]] = ([], [])
    for number in range(asked.rounds):
        # Whoever comes first may find the machine in another state: they change places.
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            series[side].append(measure(folders[side], command, out, asked.value))
        print(f"A {series[0][-1]:.4g}, B {series[1][-1]:.4g}", flush=True)
    ratio = ratio_of(series[1], series[0])
    verdict = "" if ratio.is_decided else ": no difference shown"
    print(
        f"{asked.value}: {asked.b} / {asked.a} = {ratio.median:.3f}, between {ratio.low:.3f} and "
        f"{ratio.high:.3f} with {ratio.confidence:.1%} confidence{verdict}"
    )
    if asked.out:
        about = provenance("tessera", "torch") | {"a": asked.a, "b": asked.b}
        values = {"value": asked.value, "values_a": series[0], "values_b": series[1]}
        write_json(asked.out, {"about": about, "ratio": asdict(ratio)} | values)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.ab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", help="the state to compare with")
    parser.add_argument("b", help="the state in question")
    parser.add_argument("--rounds", type=int, default=7, help="6 or more for 95 %% confidence")
    parser.add_argument("--value", default="steps.0.ms", help="path of the number in the JSON")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Compares scheduling policies without a device: replays request traces on a virtual clock.

    python -m benchmark.simulate                        every scenario, every policy
    python -m benchmark.simulate --scenario chat bursts --policy tessera --set lookahead=0
    python -m benchmark.simulate --out benchmark/results/simulation.json --readme \\
        --plots benchmark/results

The scheduler is the router's own, the device is a cost model (`simulation/device.py`), and the
peers are models of the policies of text-generation-inference (`simulation/tgi.py`) and vLLM v1
(`simulation/vllm.py`), not that software.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

from benchmark.results_file import provenance, write_json
from benchmark.simulation.scenarios import POLICIES, SCENARIOS, Scenario, changed, simulate
from benchmark.simulation.table import README, console_table, with_ratios

Report = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    asked = _parse(arguments)
    policies = POLICIES if asked.policy == "all" else (asked.policy,)
    names = asked.scenario or list(SCENARIOS)
    changes = dict(asked.set or [])
    report: Report = {"about": _about(asked), "scenarios": {}}
    for name in names:
        scenario = SCENARIOS[name]
        started = time.perf_counter()
        result = _run(scenario, policies, changes, asked.seed, asked.scale)
        report["scenarios"][name] = result
        print(console_table(name, result))
        print(f"({time.perf_counter() - started:.1f} s)\n")
    if asked.out:
        write_json(asked.out, report)
    if asked.readme:
        README.write_text(with_ratios(README.read_text(), report))
    if asked.plots:
        _plot(report, asked.plots)
    return 0


def _plot(report: Report, folder: Path) -> None:
    # Nothing else needs matplotlib, so that everything else works without it.
    from benchmark.simulation.plots import write_plots

    for path in write_plots(report, folder):
        print(f"{path}: {path.stat().st_size:,} bytes")


def _run(
    scenario: Scenario,
    policies: tuple[str, ...],
    changes: dict[str, float],
    seed: int,
    scale: float,
) -> Report:
    trace = scenario.make_trace(seed, scale)
    options = changed(scenario.options, changes)
    results = {policy: simulate(policy, scenario, trace, options) for policy in policies}
    return {"about": scenario.about, "device": scenario.device.name, "policies": results}


def _about(asked: argparse.Namespace) -> Report:
    note = "a simulation; `tgi` and `vllm` are models of policies, not measurements"
    return {"note": note, "seed": asked.seed, "scale": asked.scale} | provenance()


def _assignment(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name.lower(), float(value)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    asked = parser.parse_args(arguments)
    if asked.readme and (asked.policy != "all" or asked.scenario):
        parser.error("--readme writes about every scenario and policy: leave those options out")
    if asked.plots and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib: pip install -e '.[bench]'")
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--policy", choices=("all", *POLICIES), default="all")
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, metavar="NAME")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="of each scenario's duration")
    parser.add_argument(
        "--set", action="append", type=_assignment, metavar="SETTING=VALUE", help="e.g. lookahead=0"
    )
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--readme", action="store_true", help="write the table of ratios")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write charts, with matplotlib")
    return parser


if __name__ == "__main__":
    sys.exit(main())

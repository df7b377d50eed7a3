"""Results as text: a table for the terminal and the table of ratios in README."""

from pathlib import Path
from typing import Any

from benchmark.simulation.report import Numbers

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- ratios: written by `python -m benchmark.simulate --readme` -->\n"
END = "<!-- /ratios -->"

CONSOLE_COLUMNS = (
    "requests",
    "good_share",
    "ttft_p50_s",
    "ttft_p90_s",
    "ttft_p99_s",
    "itl_p50_s",
    "itl_p99_s",
    "longest_stall_s",
    "queue_p99_s",
    "e2e_p50_s",
    "e2e_p99_s",
)
CONSOLE_SUMS = (
    "output_tokens_per_s",
    "goodput_per_s",
    "kv_mean_share",
    "kv_max_share",
    "preemptions",
    "prefix_hit_share",
    "encodes_saved_share",
    "max_step_tokens",
    "max_running",
    "max_feature_tokens",
    "device_busy_share",
    "refused",
    "left",
)


def console_table(name: str, result: dict[str, Any]) -> str:
    """One scenario: latencies by kind of request and policy, then the sums."""
    lines = [f"{name}: {result['about']} ({result['device']})"]
    lines.append(" " * 22 + "".join(_head(column) for column in CONSOLE_COLUMNS))
    for policy, by_kind in result["policies"].items():
        for kind, numbers in by_kind.items():
            cells = "".join(f"{numbers[column]:>9.4g}" for column in CONSOLE_COLUMNS)
            lines.append(f"{policy:<9}{kind:<13}{cells}")
    for column in CONSOLE_SUMS:
        cells = "".join(f"{p['all'][column]:>12.4g}" for p in result["policies"].values())
        lines.append(f"  {column:<20}{cells}")
    return "\n".join(lines)


def ratio_table(report: dict[str, Any]) -> str:
    """The markdown table of README, from a report of all policies: a row for each peer."""
    lines = [
        "| scenario | peer | TTFT p50 | TTFT p99 | gap p99 | longest stall | end-to-end p50 "
        "| good | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, result in report["scenarios"].items():
        by_policy = dict(result["policies"])
        ours = by_policy.pop("tessera")["all"]
        for peer, by_kind in by_policy.items():
            lines.append(f"| {name} | {peer} | {_cells(ours, by_kind['all'])} |")
            name = ""
    return "\n".join(lines) + "\n"


def with_ratios(text: str, report: dict[str, Any]) -> str:
    """README's text with the table between its markers replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{ratio_table(report)}{END}{after}"


_RATIO_COLUMNS = ("ttft_p50_s", "ttft_p99_s", "itl_p99_s", "longest_stall_s", "e2e_p50_s")


def _cells(ours: Numbers, peer: Numbers) -> str:
    times = [_times(ours, peer, column) for column in _RATIO_COLUMNS]
    good = f"{ours['good_share']:.1%} / {peer['good_share']:.1%}"
    rate = f"{ours['output_tokens_per_s'] / peer['output_tokens_per_s']:.2f}x"
    return " | ".join([*times, good, rate])


def _times(ours: Numbers, peer: Numbers, column: str) -> str:
    return (
        f"{_seconds(ours[column])} / {_seconds(peer[column])} = {ours[column] / peer[column]:.2f}"
    )


def _seconds(value: float) -> str:
    digits = 1 if value < 0.01 else 0
    return f"{value * 1000:.{digits}f} ms" if value < 1 else f"{value:.1f} s"


def _head(column: str) -> str:
    return f"{column.removesuffix('_s').replace('longest_', '').replace('_share', ''):>9}"

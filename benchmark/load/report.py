"""Runs as a table, as a live line and as charts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmark.load.client import Record
from benchmark.load.measure import Percentiles, Summary

LATENCIES = (
    ("time to first token", "ttft_s"),
    ("between tokens", "itl_s"),
    ("end to end", "e2e_s"),
    ("sent late", "late_s"),
)


class Live:
    """A bar that moves with every request that ends; to be used in a `with` block."""

    def __init__(self, total: int, name: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]:,} tokens, {task.fields[errors]} errors"),
            TimeElapsedColumn(),
        )
        self._task = self._progress.add_task(name, total=total, tokens=0, errors=0)
        self._tokens = self._errors = 0

    def __enter__(self) -> "Live":
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def ended(self, record: Record) -> None:
        """Count one more."""
        self._tokens += record.num_tokens
        self._errors += bool(record.error)
        self._progress.update(self._task, advance=1, tokens=self._tokens, errors=self._errors)


def table(name: str, summary: Summary) -> Table:
    """One run."""
    shown = Table(title=name)
    for column in ("", "p50", "p90", "p99"):
        shown.add_column(column, justify="right" if column else "left")
    for label, field in LATENCIES:
        values: Percentiles = getattr(summary, field)
        shown.add_row(label, *(_ms(value) for value in (values.p50, values.p90, values.p99)))
    shown.add_section()
    for label, text in _counts(summary).items():
        shown.add_row(label, text)
    return shown


def _counts(summary: Summary) -> dict[str, str]:
    errors = ", ".join(f"{count} {kind}" for kind, count in summary.errors.items())
    return {
        "requests": f"{summary.answered} of {summary.requests}",
        "requests/s": f"{summary.requests_per_s:.2f}",
        "output tokens/s": f"{summary.output_tokens_per_s:.1f}",
        "good": f"{summary.good_share:.1%}",
        "goodput, requests/s": f"{summary.goodput_per_s:.2f}",
        "errors": errors or "none",
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms"


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Latencies and goodput over the rates of a sweep, or the percentiles of a single run.

    Args:
        runs: entries of a result file's `runs`.
        path: what is written; its ending says the format.
    """
    # Nothing else needs matplotlib, so that everything else works without it.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = sorted(runs, key=lambda run: run["per_s"] or 0)
    rates = [run["per_s"] or run["requests_per_s"] for run in ordered]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for axis, (label, field) in zip(axes, LATENCIES[:2], strict=False):
        for share in ("p50", "p90", "p99"):
            axis.plot(rates, [run[field][share] * 1000 for run in ordered], "o-", label=share)
        axis.set(title=label, ylabel="ms", xlabel="requests/s", ylim=(0, None))
        axis.legend()
    axes[2].plot(rates, [run["goodput_per_s"] for run in ordered], "o-", label="good requests/s")
    axes[2].plot(rates, [run["requests_per_s"] for run in ordered], "o--", label="answered/s")
    axes[2].set(title="goodput", xlabel="requests/s", ylim=(0, None))
    axes[2].legend()
    figure.savefig(path)
    pyplot.close(figure)

"""Results as pictures. The one module that needs matplotlib (`pip install -e '.[bench]'`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmark.simulation.report import Numbers

LABELS = {"tessera": "tessera", "tgi": "tgi (model)", "vllm": "vllm (model)"}
COLOURS = {"tessera": "#0072b2", "tgi": "#e69f00", "vllm": "#009e73"}  # told apart by all eyes
BAR = 0.26  # of the height that a scenario has
SIZE_IN = (9.0, 4.6)


@dataclass(frozen=True, slots=True)
class Panel:
    """One number over all scenarios."""

    column: str
    title: str
    factor: float = 1.0  # from the result's unit to the axis's
    is_log: bool = True


CHARTS = {
    "ttft": (
        Panel("ttft_p50_s", "time to first token, median (ms)", 1e3),
        Panel("ttft_p99_s", "time to first token, p99 (ms)", 1e3),
    ),
    "tokens": (
        Panel("itl_p99_s", "time between tokens, p99 (ms)", 1e3),
        Panel("longest_stall_s", "longest stall of any stream (ms)", 1e3),
    ),
    "rates": (
        Panel("output_tokens_per_s", "tokens/s"),
        Panel("good_share", "requests within the objective (%)", 100, is_log=False),
    ),
    "memory": (
        Panel("kv_mean_share", "cache held, mean over busy time (%)", 100, is_log=False),
        Panel("kv_max_share", "cache held, peak (%)", 100, is_log=False),
    ),
}


def write_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every chart as an SVG file in `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_chart(name, panels, report, folder) for name, panels in CHARTS.items()]


def _write_chart(
    name: str, panels: tuple[Panel, ...], report: dict[str, Any], folder: Path
) -> Path:
    path = folder / f"{name}.svg"
    style = matplotlib.rc_context(
        {
            "font.size": 8,
            "svg.fonttype": "none",  # letters, not outlines: a tenth of the bytes
            "svg.hashsalt": "tessera",  # the same results give the same file
        }
    )
    with style:
        figure = Figure(figsize=SIZE_IN, layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(panels), sharey=True)
        for panel, one in zip(panels, axes, strict=True):
            _draw(one, panel, report["scenarios"])
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
        figure.supxlabel("simulated; the peers are models of their policies", fontsize=7)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def _draw(axes: Axes, panel: Panel, scenarios: dict[str, Any]) -> None:
    policies = list(next(iter(scenarios.values()))["policies"])
    for place, policy in enumerate(policies):
        numbers: list[Numbers] = [s["policies"][policy]["all"] for s in scenarios.values()]
        values = [panel.factor * of_one[panel.column] for of_one in numbers]
        offset = (place - (len(policies) - 1) / 2) * BAR
        at = [index + offset for index in range(len(values))]
        if panel.is_log:  # where a bar would begin says nothing
            axes.plot(values, at, "o", markersize=5, label=LABELS[policy], color=COLOURS[policy])
        else:
            axes.barh(at, values, BAR, label=LABELS[policy], color=COLOURS[policy])
    axes.set_yticks(range(len(scenarios)), list(scenarios))
    axes.set_ylim(len(scenarios) - 0.5, -0.5)  # the first scenario at the top
    if panel.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(panel.title, fontsize=9)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    for edge in range(1, len(scenarios)):
        axes.axhline(edge - 0.5, linewidth=0.4, color="0.8")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)

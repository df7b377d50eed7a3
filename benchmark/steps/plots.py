"""Results of `benchmark.step` as pictures; needs matplotlib (`pip install -e '.[bench]'`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]  # a `worker.Result`, and the model it is of

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")  # told apart by all eyes
MARKERS = {"decode": "o", "prefill": "s", "pictures": "^"}
STYLE = {
    "font.size": 8,
    "svg.fonttype": "none",  # letters, not outlines: a tenth of the bytes
    "svg.hashsalt": "tessera",  # the same results give the same file
}


def write_roofline(rows: Sequence[Row], path: Path) -> None:
    """What each case computes per second over what it computes per byte, under the limits."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 4.6), layout="constrained", facecolor="white")
        axes = figure.subplots()
        read = max(row["read_gb_per_s"] for row in rows)
        matrix = max(row["matrix_gflop_per_s"] for row in rows)
        intensities = [row["num_flops"] / row["num_bytes"] for row in rows]
        ends = (min(intensities) / 2, matrix / read, max(intensities) * 2)
        axes.plot(ends, [min(read * end, matrix) for end in ends], color="0.3", label="limit")
        for place, model in enumerate(_in_order(row["model"] for row in rows)):
            for kind, marker in MARKERS.items():
                _points(axes, rows, intensities, model, kind, COLOURS[place % 4], marker)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte that must be moved")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(f"limits: {read:.0f} GB/s read, {matrix:.0f} GFLOP/s matrix products")
        axes.legend(frameon=False, fontsize=7)
        _finish(axes)
        _save(figure, path)


def _points(
    axes: Axes,
    rows: Sequence[Row],
    intensities: Sequence[float],
    model: str,
    kind: str,
    colour: str,
    marker: str,
) -> None:
    """The cases of one kind and model, if there are any."""
    points = [
        (intensity, row["num_flops"] / row["ms"] / 1e6)
        for row, intensity in zip(rows, intensities, strict=True)
        if row["model"] == model and row["kind"] == kind
    ]
    if points:
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=f"{model}, {kind}")


def write_growth(panels: dict[str, Sequence[Row]], path: Path) -> None:
    """How a step's time grows with one thing: `panels` has the cases for each."""
    fields = {"batch": "batch", "context": "length", "tiles": "tiles", "ranks": "ranks"}
    titles = {
        "batch": "sequences, {length} tokens each",
        "context": "tokens of each of {batch} sequences",
        "tiles": "tiles of a picture",
        "ranks": "ranks, {batch} sequences of {length} tokens",
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 2.9), layout="constrained", facecolor="white")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (name, rows) in zip(all_axes, panels.items(), strict=True):
            x = [row[fields[name]] for row in rows]
            time = "wall_ms" if name == "ranks" else "ms"
            axes.plot(x, [row[time] for row in rows], "o-", color=COLOURS[0], label="a step")
            if name != "ranks":  # the limit is one processor's
                limits = [row["limit_ms"] for row in rows]
                axes.plot(x, limits, "--", color="0.4", label="its limit")
            axes.set_xticks(x if len(x) < 5 else x[-3:])
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_xlabel(titles[name].format(**rows[0]))
            axes.set_title(rows[0]["model"])
            axes.legend(frameon=False, fontsize=7)
            _finish(axes)
        all_axes[0].set_ylabel("ms")
        _save(figure, path)


def _in_order(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def _finish(axes: Axes) -> None:
    axes.grid(linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})

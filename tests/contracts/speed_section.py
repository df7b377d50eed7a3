"""Writes what `make bench` and `benchmark.peers` measured into README.md; `make docs` runs it."""

import json
import textwrap
from typing import Any

from pages import README, ROOT, between

RESULTS = "benchmark/results"
BEGIN, END = "<!-- speed: written by `make docs` -->\n", "<!-- /speed -->"
MODELS = ("llama-125m", "llama-1.1b")
STEPS = {
    "decode 1x128": "decode, 1 sequence of 128 tokens",
    "decode 8x128": "decode, 8 of 128",
    "decode 32x128": "decode, 32 of 128",
    "decode 32x1024": "decode, 32 of 1024",
    "prefill 1x128": "prompt of 128",
    "prefill 1x512": "prompt of 512",
}
STREAMS = (1, 8, 32)
STEP_HEAD = """\
One shard without HTTP, on one thread: the processor time of a step, and how many times the limit
it takes, which is reading weights and cache once or the arithmetic, whichever is longer, both at
rates measured beside it.
{source}

"""
CHARTS = """
![Steps under the limits of memory and arithmetic](benchmark/results/roofline.svg)
![How a step's time grows](benchmark/results/growth.svg)
"""
PEER_HEAD = """\
HTTP to HTTP beside other servers of `{model}` on the same cores, in turn: ours / theirs, and in
brackets how many times as fast this server is. Tokens per second of all streams together, and the
time to the first token after a longer prompt.
{picture}{source}

"""
PICTURE = """\
The last column is `{model}`'s first token after a picture of {side} x {side} pixels.
"""
STACK = """\
The whole server, with router, gRPC, HTTP and the measuring client on the same cores, takes
{ratios} as long as its shard computes meanwhile; it adds
at most {gap:.1f} ms to the time between two tokens.
{source}
"""
START = """\
The demo model is ready {median:.1f} s after the launcher is started (median; at best {best:.1f} s),
and loading `{model}` takes {ratio:.2f} times as long as reading its files.
{source}
"""
Found = dict[str, Any]


def with_speed(text: str) -> str:
    """`text` with what the result files say between its markers."""
    parts = steps(_result("step")), peers(_result("peers")), stack(_result("stack"))
    return between(text, BEGIN, END, "\n".join([*parts, start(_result("start"))]))


def steps(found: Found) -> str:
    """A row per step, and the charts."""
    rows = {(row["model"], row["name"]): row for row in found["steps"]}
    table = [["step"]]
    for model in MODELS:
        table[0] += [model, "times the limit"]
    for name, label in STEPS.items():
        timed = [rows[model, name] for model in MODELS]
        cells = [(f"{row['ms']:.1f} ms", f"{row['times_limit']:.2f}") for row in timed]
        table.append([label, *(cell for pair in cells for cell in pair)])
    return STEP_HEAD.format(source=_source("step", found)) + _table(table) + CHARTS


def peers(found: Found) -> str:
    """A row per server, and why others have none."""
    table = [["server", *(_count(number, "stream") for number in STREAMS)]]
    table[0] += ["first token", "first token, picture"]
    reasons = []
    for name, peer in found["peers"].items():
        if "reason" in peer:
            reasons.append(f"`{name}` ({_as_code(peer['reason'])})")
            continue
        rows = {
            _count(number, "stream"): peer["output_tokens_per_s"][str(number)] for number in STREAMS
        }
        rows["first token"] = peer["first_token_ms"]
        rows["first token, picture"] = peer.get("first_token_after_picture_ms")
        reasons += [
            f"`{name}, {label}` ({_as_code(row['reason'])})"
            for label, row in rows.items()
            if row and "reason" in row
        ]
        cells = [_beside(row, " ms" if "token" in label else "") for label, row in rows.items()]
        # One package can be two peers.
        label = name if name.startswith(peer["package"]) else peer["package"]
        table.append([f"`{label} {peer['version']}`", *cells])
    about = found["about"]
    picture = PICTURE.format(**about["picture"]) if "picture" in about else ""
    head = PEER_HEAD.format(model=about["model"], picture=picture, source=_source("peers", found))
    return head + _table(table) + _missing(reasons)


def stack(found: Found) -> str:
    """What the server adds to its shard."""
    ratios = " and ".join(
        f"{row['ratio']['median']:.2f} times ({_count(int(number), 'stream')})"
        for number, row in found["streams"].items()
    )
    gap = max(row["added_ms_per_gap"] for row in found["streams"].values())
    return STACK.format(ratios=ratios, gap=gap, source=_source("stack", found))


def start(found: Found) -> str:
    """Until the server is ready, and loading a model."""
    ready, load = found["ready"], found["load"]
    return START.format(
        median=ready["median_s"],
        best=ready["best_s"],
        model=load["model"],
        ratio=load["ratio"]["median"],
        source=_source("start", found),
    )


def _result(name: str) -> Found:
    found: Found = json.loads((ROOT / RESULTS / f"{name}.json").read_text())
    return found


def _source(name: str, found: Found) -> str:
    """The command, how often, the machine and its load in the last minute, the file."""
    about = found["about"]
    rounds, cores = _count(about["rounds"], "round"), _count(about["machine"]["cpus"], "core")
    return (
        f"`python -m benchmark.{name}`, {rounds}, {cores} with a load of "
        f"{about['machine']['load_average'][0]:.1f}: [{name}.json]({RESULTS}/{name}.json)"
    )


def _beside(row: Found | None, unit: str = "") -> str:
    """A cell; `-` for what was not measured."""
    if row is None or "reason" in row:
        return "-"
    return f"{row['ours']:.0f} / {row['peer']:.0f}{unit} ({row['ratio']['median']:.1f})"


def _as_code(message: str) -> str:
    """A message may hold what Markdown reads as its own."""
    plain = " ".join(message.replace("`", "'").split())
    return f"`{plain}`"


def _missing(reasons: list[str]) -> str:
    if not reasons:
        return ""
    sentence = f"Without figures, for the reason in brackets: {', '.join(reasons)}."
    return f"\n{textwrap.fill(sentence, 100, break_long_words=False, break_on_hyphens=False)}\n"


def _table(rows: list[list[str]]) -> str:
    rows.insert(1, ["---"] * len(rows[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    README.write_text(with_speed(README.read_text()))

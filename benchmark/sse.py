"""How many server-sent events the router's HTTP side writes per second of one core.

    python -m benchmark.sse                                     the table
    python -m benchmark.sse --out benchmark/results/sse.json    and the file

The router's real application runs over a generator whose tokens are prepared. The peer is the least
an ASGI application can do: constant bytes of the same size, the same number of messages, under the
same uvicorn with the same settings. Servers are processes of their own, take turns within the run,
and are measured in processor time, so that neighbours on the machine and the client count little.

Two paces: `at once`, all events are there before the first is written, as for a client that lags
behind; and `in steps`, one event for every stream and step, as a model makes them.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.results_file import provenance, write_json
from benchmark.streaming.drain import Drained, drain, get, post_bytes
from benchmark.streaming.event_cost import event_costs_us

PACES = {"at once": 0.0, "in steps": 0.004}  # seconds per step
CHAT = {"messages": [{"role": "user", "content": "What do you see?"}], "stream": True}


@dataclass(frozen=True)
class Kind:
    """One kind of stream the router writes."""

    path: str
    body: dict[str, Any]
    length_field: str

    def request(self, num_events: int) -> bytes:
        """What asks for a stream of so many tokens."""
        return post_bytes(self.path, json.dumps(self.body | self._length(num_events)).encode())

    def _length(self, num_events: int) -> dict[str, Any]:
        if self.length_field == "max_tokens":
            return {"max_tokens": num_events}
        return {"parameters": self.body.get("parameters", {}) | {"max_new_tokens": num_events}}


KINDS = {
    "generate_stream": Kind("/generate_stream", {"inputs": "Hello"}, "max_new_tokens"),
    "generate_stream, top 5": Kind(
        "/generate_stream", {"inputs": "Hello", "parameters": {"top_n_tokens": 5}}, "max_new_tokens"
    ),
    "chat": Kind("/v1/chat/completions", CHAT, "max_tokens"),
    "chat, logprobs": Kind("/v1/chat/completions", CHAT | {"logprobs": True}, "max_tokens"),
}


@dataclass(frozen=True)
class Run:
    """One turn of one server."""

    drained: Drained
    cpu_s: float
    wall_s: float

    @property
    def events_per_cpu_s(self) -> float:
        """Events written per second of processor time."""
        return self.drained.num_events / self.cpu_s


def measure(port: int, request: bytes, connections: int) -> Run:
    """The same request over several connections at once."""
    cpu_before, wall_before = float(get(port, "/process-time")), time.perf_counter()
    drained = drain(port, [request] * connections)
    wall_s = time.perf_counter() - wall_before
    return Run(drained, float(get(port, "/process-time")) - cpu_before, wall_s)


def compare(
    ports: tuple[int, int], kind: Kind, connections: int, events: int, rounds: int
) -> dict[str, float]:
    """Medians over rounds in which the router and the peer take turns."""
    request = kind.request(events)
    first = measure(ports[0], request, connections).drained  # also warms up
    size = first.num_bytes // first.num_events
    per_stream = first.num_events // connections
    constant = post_bytes(f"/?events={per_stream}&size={size}", b"")
    ours, peer = [], []
    for _ in range(rounds):
        ours.append(measure(ports[0], request, connections))
        peer.append(measure(ports[1], constant, connections))
    ratios = [a.events_per_cpu_s / b.events_per_cpu_s for a, b in zip(ours, peer, strict=True)]
    return {
        "bytes_per_event": size,
        "events_per_cpu_s": round(statistics.median(run.events_per_cpu_s for run in ours)),
        "peer_events_per_cpu_s": round(statistics.median(run.events_per_cpu_s for run in peer)),
        "ratio": round(statistics.median(ratios), 3),
        "least_ratio": round(min(ratios), 3),
        "us_per_event": round(statistics.median(1e6 / run.events_per_cpu_s for run in ours), 2),
    }


@contextlib.contextmanager
def server(kind: str, step_s: float) -> Iterator[int]:
    """A server process; its port."""
    command = [sys.executable, "-m", "benchmark.streaming.serving", kind, str(step_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    asked = _parser().parse_args(arguments)
    packages = ("tessera", "uvicorn", "uvloop", "httptools", "starlette")
    report: dict[str, Any] = {"about": provenance(*packages) | _sizes(asked), "paces": {}}
    for pace, step_s in PACES.items():
        with server("ours", step_s) as ours, server("constant", step_s) as peer:
            events = asked.events if not step_s else asked.steps
            report["paces"][pace] = {}
            for name, kind in KINDS.items():
                numbers = compare((ours, peer), kind, asked.connections, events, asked.rounds)
                report["paces"][pace][name] = numbers
                print(
                    f"{pace:9} {name:24} {numbers['events_per_cpu_s']:8,.0f} events/s of a core, "
                    f"peer {numbers['peer_events_per_cpu_s']:8,.0f}: {numbers['ratio']:.2f}x"
                )
    report["event_us"] = event_costs_us()
    for name, cost in report["event_us"].items():
        print(f"making the bytes of one event: {name:24} {cost:6.2f} us")
    if asked.out:
        write_json(asked.out, report)
    return 0


def _sizes(asked: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(asked, name) for name in ("connections", "events", "steps", "rounds")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.sse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--connections", type=int, default=32, help="streams at once")
    parser.add_argument("--events", type=int, default=2000, help="per stream, at once")
    parser.add_argument("--steps", type=int, default=300, help="per stream, in steps")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())

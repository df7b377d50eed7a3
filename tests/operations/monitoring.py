"""Prometheus, Alertmanager and whoever is told, for one test, on free ports of this machine.

They run with the files in docker/; only addresses and intervals are changed.
"""

import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
PROMETHEUS = DOCKER / "prometheus"
ALERTMANAGER = DOCKER / "alertmanager" / "alertmanager.yml"
TOOLS = ("prometheus", "promtool", "prometheus-alertmanager", "amtool")

needs_tools = pytest.mark.skipif(
    not all(map(shutil.which, TOOLS)),
    reason="NOT TESTED: Prometheus and Alertmanager are not installed (`make test-ops` as root)",
)


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.2)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@dataclass
class Webhook:
    """Notes what it is told, and serves one file."""

    served: bytes
    told: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # status, labels
    port: int = 0

    def heard(self, status: str, alert: str) -> list[dict[str, str]]:
        """The labels of what came with that status of that alert."""
        return [
            labels for found, labels in self.told if (found, labels["alertname"]) == (status, alert)
        ]


@contextmanager
def webhook(served: bytes) -> Iterator[Webhook]:
    hook = Webhook(served)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["content-length"])
            for alert in json.loads(self.rfile.read(length))["alerts"]:
                hook.told.append((alert["status"], alert["labels"]))
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(hook.served)))
            self.end_headers()
            self.wfile.write(hook.served)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hook.port = server.server_port
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hook
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    url: str

    def query(self, text: str) -> list[tuple[dict[str, str], float]]:
        """The labels and value of every series in the answer; fails if the query is wrong."""
        url = f"{self.url}/api/v1/query"
        body = httpx.get(url, params={"query": text}, timeout=10, verify=False).json()
        assert body["status"] == "success", (text, body)
        return [(one["metric"], float(one["value"][1])) for one in body["data"]["result"]]

    def value(self, text: str) -> float:
        """The one number there is; nan: none."""
        found = self.query(text)
        return found[0][1] if len(found) == 1 else math.nan


@contextmanager
def monitoring(folder: Path, scraped_port: int, told_port: int) -> Iterator[Prometheus]:
    """Both of them, ready; ended at the end of the block."""
    ports = free_port(), free_port()
    _write_settings(folder, scraped_port, told_port, ports[1])
    commands = [
        [
            "prometheus",
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/series",
            f"--web.listen-address=127.0.0.1:{ports[0]}",
        ],
        [
            "prometheus-alertmanager",
            f"--config.file={folder}/alertmanager.yml",
            f"--storage.path={folder}/alerts",
            f"--web.listen-address=127.0.0.1:{ports[1]}",
            "--cluster.listen-address=",
        ],
    ]
    with ExitStack() as ending:
        for command, port in zip(commands, ports, strict=True):
            log = folder / f"{command[0]}.log"
            process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
            ending.callback(process.wait, 20)
            ending.callback(process.terminate)
            ready = f"http://127.0.0.1:{port}/-/ready"
            wait_for(f"{command[0]}: {log.read_text()}", lambda url=ready: _answers(url), 30)
        yield Prometheus(f"http://127.0.0.1:{ports[0]}")


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, verify=False).status_code == 200
    except httpx.TransportError:
        return False


def _write_settings(folder: Path, scraped: int, told: int, alertmanager: int) -> None:
    rules = (PROMETHEUS / "alerts.yml").read_text()
    rules = re.sub(r"(?m)^( +for:) \d+s$", r"\1 2s", rules)
    (folder / "alerts.yml").write_text(rules.replace("[10m]", "[10s]"))
    settings = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    job = settings["scrape_configs"][0]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{scraped}"]}]
    peers = settings["alerting"]["alertmanagers"][0]["static_configs"][0]
    peers["targets"] = [f"127.0.0.1:{alertmanager}"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    routes = yaml.safe_load(ALERTMANAGER.read_text())
    routes["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    routes["receivers"][0]["webhook_configs"][0]["url"] = f"http://127.0.0.1:{told}/"
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routes))

"""The real processes for tests: launcher, router and shards on a tiny checkpoint."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_TIMEOUT_S = 110
STOP_TIMEOUT_S = 30


@dataclass
class Stack:
    """A launcher under test and what it printed."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def read_output(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if found := re.search(r"ready: (http://\S+)", self.log):
                self.url = found[1]
                return
            if self.process.poll() is not None:
                raise AssertionError(f"launcher exited {self.process.returncode}:\n{self.log}")
            time.sleep(0.05)
        raise AssertionError(f"not ready after {START_TIMEOUT_S} s:\n{self.log}")

    def stop(self) -> int:
        """SIGTERM, and the exit code; never leaves the process running."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        finally:
            self.process.kill()

    def metric(self, name: str) -> float:
        """One sample of /metrics; labels, if it has any, belong to its name."""
        text = httpx.get(f"{self.url}/metrics", verify=False).text  # loads no certificates
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, f"{name} is not in /metrics"
        return float(found[1])

    def wait_metric(self, name: str, value: float, timeout_s: float = 20) -> None:
        deadline = time.monotonic() + timeout_s
        while (seen := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {seen}, not {value}"
            time.sleep(0.05)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60, verify=False)

    def post(self, path: str, body: object, timeout: float = 60) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=timeout)

    def generate(self, inputs: str, **parameters: object) -> str:
        reply = self.post("/generate", {"inputs": inputs, "parameters": parameters})
        assert reply.status_code == 200, reply.text
        return str(json.loads(reply.text)["generated_text"])


def start(model: Path | None, *flags: str, **environ: str) -> Stack:
    """Start a launcher, with the demo model if none is named; the caller stops it."""
    command = [sys.executable, "-m", "tessera.launcher.main"]
    command += [] if model is None else ["--model-id", str(model)]
    command += ["--hostname", "127.0.0.1", "--port", "0", *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environ},
    )
    stack = Stack(process)
    threading.Thread(target=stack.read_output, daemon=True).start()
    return stack


@contextlib.contextmanager
def running(model: Path | None, *flags: str, **environ: str) -> Iterator[Stack]:
    """A ready stack, stopped at the end of the block."""
    stack = start(model, *flags, **environ)
    try:
        stack.wait_ready()
        yield stack
    finally:
        if stack.process.poll() is None:
            stack.stop()

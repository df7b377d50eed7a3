"""One server for all clients, and each client's script run once, in its own environment."""

import functools
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.clients import environments
from tests.end_to_end.stack import Stack, running

SCRIPTS = Path(__file__).parent / "scripts"
DEMO = environments.ROOT / "launcher" / "demo"
SCRIPT_TIMEOUT_S = 100
VERSIONS_RUN = pytest.StashKey[list[str]]()


@dataclass(frozen=True)
class Report:
    """What a script printed: versions, and per feature a result or an error."""

    versions: dict[str, str]
    features: dict[str, dict[str, Any]]

    def __getitem__(self, feature: str) -> Any:
        seen = self.features[feature]
        assert "error" not in seen, f"{self.versions}, {feature}: {seen['error']}"
        return seen["result"]

    @property
    def working(self) -> list[str]:
        return [name for name, seen in self.features.items() if "error" not in seen]


Reports = Callable[[str, str], Report]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="session")
def picture_host() -> Iterator[str]:
    """`host:port` of a web server with the demo's pictures."""
    handler = functools.partial(_Quiet, directory=str(DEMO))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def server(picture_host: str) -> Iterator[Stack]:
    """The demo model, allowed to read the demo's pictures by URL and by path."""
    environ = {
        "ALLOWED_IMAGE_DOMAINS": picture_host,
        "ALLOW_PRIVATE_IMAGE_HOSTS": "true",
        "ALLOWED_IMAGE_PATHS": str(DEMO),
    }
    with running(None, "--num-shard", "2", **environ) as stack:
        yield stack


@pytest.fixture(scope="session")
def reports(server: Stack, pytestconfig: pytest.Config) -> Reports:
    """`reports("hub-1", "hub")`: what scripts/hub.py printed in that environment."""

    def run(environment: str, script: str) -> Report:
        python = environments.interpreter(environment)
        command = [str(python), str(SCRIPTS / f"{script}.py"), server.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SCRIPT_TIMEOUT_S)
        assert done.returncode == 0, done.stderr[-4000:]
        printed = json.loads(done.stdout.splitlines()[-1])
        names = [f"{name} {version}" for name, version in printed["versions"].items()]
        pytestconfig.stash.setdefault(VERSIONS_RUN, []).extend(names)
        return Report(printed["versions"], printed["features"])

    seen: dict[tuple[str, str], Report | Exception] = {}

    def report(environment: str, script: str) -> Report:
        if (environment, script) not in seen:
            try:
                seen[environment, script] = run(environment, script)
            except Exception as error:  # every test of this client says it; none tries again
                seen[environment, script] = error
        outcome = seen[environment, script]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return report


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if names := config.stash.get(VERSIONS_RUN, []):
        terminalreporter.write_line(f"clients run against the server: {', '.join(names)}")

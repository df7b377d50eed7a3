"""A container of the server under test."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
from huggingface_hub import InferenceClient

from tests.docker.engine import LABEL, Engine

START_TIMEOUT_S = 100
HARDENED = (
    *("--read-only", "--tmpfs=/tmp", "--user=10001", "--cap-drop=ALL"),
    *("--security-opt=no-new-privileges", "--shm-size=64m", "--memory=2g"),
)


@dataclass(frozen=True)
class Container:
    """One that was started, perhaps ended since."""

    engine: Engine
    name: str

    @property
    def log(self) -> str:
        """What it has printed, stdout and stderr."""
        told = self.engine.try_run("logs", self.name)
        return told.stdout + told.stderr

    @property
    def health(self) -> str:
        """What its HEALTHCHECK says: starting, healthy or unhealthy."""
        return str(self.engine.inspect(self.name)["State"]["Health"]["Status"])

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        state = self.engine.inspect(self.name)["State"]
        return None if state["Running"] else int(state["ExitCode"])

    @property
    def url(self) -> str:
        """Where its port 80 is on this machine."""
        return f"http://{self.engine.run('port', self.name, '80').splitlines()[0]}"

    def wait_ready(self) -> None:
        """Until it says so itself."""
        self.wait_log("ready: http://")

    def wait_healthy(self) -> None:
        """Until the engine says so."""
        self._wait(lambda: self.health == "healthy", "healthy")

    def wait_log(self, text: str) -> None:
        """Until it has said `text`."""
        self._wait(lambda: text in self.log, text)

    def wait_exit(self) -> int:
        """Its exit code."""
        self._wait(lambda: self.exit_code is not None, "over", may_end=True)
        code = self.exit_code
        assert code is not None
        return code

    def generate(self, inputs: str, **parameters: object) -> str:
        """The answer to a native request."""
        body = {"inputs": inputs, "parameters": parameters}
        reply = httpx.post(f"{self.url}/generate", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["generated_text"])

    def _wait(self, condition: object, what: str, *, may_end: bool = False) -> None:
        assert callable(condition)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            ended = self.exit_code is not None and not may_end and not condition()
            assert not ended, f"exited before it was {what!r}:\n{self.log}"
            assert time.monotonic() < deadline, f"never {what!r}:\n{self.log}"
            time.sleep(0.1)


def streamed(url: str, inputs: str) -> list[str]:
    """The pieces of a short answer, as huggingface_hub's client streams it."""
    client = InferenceClient(url)
    told = client.text_generation(inputs, max_new_tokens=20, stream=True, details=True)
    return [piece.token.text for piece in told if not piece.token.special]


@contextlib.contextmanager
def started(
    engine: Engine, image: str, *options: str, flags: tuple[str, ...] = ()
) -> Iterator[Container]:
    """`docker run` with these options and flags of the launcher; removed at the end."""
    published = () if "--network=none" in options else ("--publish=127.0.0.1::80",)
    name = engine.run("run", "--detach", f"--label={LABEL}", *published, *options, image, *flags)
    try:
        yield Container(engine, name)
    finally:
        engine.run("rm", "--force", "--volumes", name)

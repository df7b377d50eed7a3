"""Start a server, ask it one question about a picture, and keep serving: what `make run` does."""

import argparse
import base64
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from huggingface_hub import InferenceClient
from PIL import Image

from tessera.launcher.devices import Machine, find_devices
from tessera.launcher.errors import LaunchError
from tessera.launcher.foreground import terminal_to_ourselves
from tessera.launcher.settings import Settings
from tessera.launcher.terminal_picture import half_blocks
from tessera.proto.env import SettingsError, process_environment
from tessera.proto.lifeline import LAUNCHER_PID, die_with_parent

LAUNCHER = (sys.executable, "-m", "tessera.launcher.main")
PICTURE = Path(__file__).parent / "demo" / "picture.png"
QUESTION = "Describe what you see in this image in detail."
TEXT_QUESTION = "What is the capital of France?"
VISION_TASK = "image-text-to-text"
MAX_NEW_TOKENS = 100
ANSWER_TIMEOUT_S = 600.0  # a large model on a small cpu takes its time
READY = re.compile(r"ready: (https?://[^\s\"]+)")
DEMO_PORT = "8000"
DEMO_SHARDS = "2"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and how long it took."""

    text: str
    num_tokens: int
    seconds: float


class Server:
    """A launcher as a child process, its log relayed to our stdout."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        self._ready: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.stopping = False
        self._process = subprocess.Popen(
            argv,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C comes to us, and we pass it on once
        )
        self._reader = threading.Thread(target=self._relay, daemon=True)
        self._reader.start()

    def stop(self, number: int = signal.SIGTERM, _frame: FrameType | None = None) -> None:
        """Pass a signal on; also a signal handler."""
        self.stopping = True
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait_until_ready(self) -> str | None:
        """Where the server answers; None when it ended instead."""
        return self._ready.get()

    def wait(self) -> int:
        """Its exit code, once all it said is printed."""
        code = self._process.wait()
        self._reader.join()
        return code

    def _relay(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                text = line.decode("utf-8", "replace").rstrip()
                say(text)
                if found := READY.search(text):
                    self._ready.put(found[1])
        self._ready.put(None)


def say(text: str) -> None:
    """Print, and let a closed pipe be."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = None  # print() then does nothing


def main(arguments: Sequence[str] | None = None, launcher: Sequence[str] = LAUNCHER) -> int:
    """Serve, ask, print the answer, serve on until Ctrl-C.

    Args:
        arguments: our own flags, and any of the launcher's; those of this process if left out.
        launcher: the command that starts it; tests have another.

    Returns:
        0 after Ctrl-C or `--once`, 1 when something failed; nothing is left running.
    """
    die_with_parent(death=signal.SIGTERM)
    given, flags = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        environ = demo_environment(flags, process_environment())
        settings = Settings.read(flags, environ)
    except (SettingsError, LaunchError) as error:
        return _fail(str(error))
    if not given.picture.is_file():
        return _fail(f"there is no picture {given.picture}.")
    server = Server([*launcher, *flags], environ)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, server.stop)
    url = server.wait_until_ready()
    if url is not None and not server.stopping:
        failure = _try_to_ask(url, settings, given)
        if failure and not server.stopping:
            server.stop()
            server.wait()
            return _fail(failure)
        if given.once:
            server.stop()
        else:
            if settings.router.playground:
                say(f"chat about pictures at {url}/ui")
            say(f"serving {url}; Ctrl-C stops it")
    return server.wait()  # when it failed, it has said why


def demo_environment(flags: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for the launcher: the port of the examples, and two shards on a cpu.

    Two shards although one would do: the demonstration is of a sharded server. What the user said,
    by flag, variable or environment file, stays as it is.
    """
    ours = dict(environ) | {LAUNCHER_PID: str(os.getpid())}
    said = Settings.read(flags, environ)
    named = said.environ
    if not named.get("PORT"):
        ours["PORT"] = DEMO_PORT
    is_split = named.get("NUM_SHARD") or said.launcher.sharded is not None
    if not said.router.model_id and not is_split:
        devices = find_devices(said.shard.device, Machine.here(named))
        if devices.kind == "cpu":
            ours["NUM_SHARD"] = DEMO_SHARDS
    return ours


def ask(client: InferenceClient, question: str, picture: Path | None) -> Answer:
    """One question in the spelling of text-generation-inference's clients.

    Args:
        picture: put before the question as base64 between image tags; None: no picture.
    """
    prompt = question
    if picture is not None:
        prompt = f"<image>{_base64(picture)}</image>\n{question}"
    begun = time.monotonic()  # the first token comes before the client has the stream
    pieces = [
        token.token.text
        for token in client.text_generation(
            prompt, max_new_tokens=MAX_NEW_TOKENS, stream=True, details=True
        )
        if not token.token.special
    ]
    return _answer(pieces, begun)


def chat(client: InferenceClient, question: str, picture: Path) -> Answer:
    """The same as a chat message, for a model with a chat template of its own."""
    data = f"data:image/{picture.suffix.lstrip('.')};base64,{_base64(picture)}"
    content = [
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": question},
    ]
    begun = time.monotonic()
    chunks = client.chat_completion(
        [{"role": "user", "content": content}], max_tokens=MAX_NEW_TOKENS, stream=True
    )
    pieces = [
        text
        for chunk in chunks
        if chunk.choices and (text := chunk.choices[0].delta.content) is not None
    ]
    return _answer(pieces, begun)


def _answer(pieces: Sequence[str], begun: float) -> Answer:
    return Answer("".join(pieces).strip(), len(pieces), time.monotonic() - begun)


def _try_to_ask(url: str, settings: Settings, given: argparse.Namespace) -> str:
    """Ask and print. Returns why it failed, empty when it did not."""
    try:
        _ask_and_print(url, settings, given)
    except Exception as error:  # whatever the client's HTTP library raises
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"the question failed: {' '.join(lines)}"
    return ""


def _ask_and_print(url: str, settings: Settings, given: argparse.Namespace) -> None:
    key = settings.router.api_key
    # Without a key the client would send the hub's token, which is nobody's business here.
    headers = {"Authorization": f"Bearer {key}" if key else ""}
    client = InferenceClient(url, headers=headers, timeout=ANSWER_TIMEOUT_S)
    is_demo = not settings.router.model_id
    sees = is_demo or _task(url) == VISION_TASK
    question = given.question or (QUESTION if sees else TEXT_QUESTION)
    if sees:
        _show(given.picture)
    say(f"question: {question}")
    if is_demo or not sees:
        answer = ask(client, question, given.picture if sees else None)
    else:
        answer = chat(client, question, given.picture)
    rate = answer.num_tokens / max(answer.seconds, 1e-9)
    say(f"answer: {answer.text}")
    say(f"{answer.num_tokens} tokens in {answer.seconds:.2f} s ({rate:.1f} tokens/s)")


def _task(url: str) -> str:
    """What the model is for, in the hub's words."""
    with urllib.request.urlopen(f"{url}/info", timeout=ANSWER_TIMEOUT_S) as reply:
        return str(json.load(reply).get("model_pipeline_tag"))


def _show(path: Path) -> None:
    with Image.open(path) as picture:
        width, height = picture.size
    say(f"picture: {path} ({width} x {height})")
    if sys.stdout is not None and sys.stdout.isatty():
        say(half_blocks(path))


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m tessera.launcher.ask",
        description=__doc__,
        epilog="Every other flag is the launcher's.",
        allow_abbrev=False,
    )
    parser.add_argument("--once", action="store_true", help="stop after the answer")
    parser.add_argument("--question", help="what to ask")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="what to ask about")
    return parser.parse_known_args(arguments)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _fail(message: str) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    with terminal_to_ourselves():
        code = main()
    sys.exit(code)

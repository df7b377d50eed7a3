"""tessera-chat over the real processes and the demo model, at a terminal and in a pipe."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

PICTURE = Path(__file__).parents[2] / "launcher" / "demo" / "picture.png"
CHAT = (sys.executable, "-m", "tessera.launcher.chat.main", "--temperature", "0")
ENDLESS = ("--temperature", "100", "--seed", "3")  # noise, 2,000 tokens before its end
NOISE = "\ufffd"  # stands for the control characters in it
PATIENCE_S = 30
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[()][A-Z0-9]|[=>])")


class Terminal:
    """A program at a terminal: what is typed and what is seen."""

    def __init__(self, *arguments: str) -> None:
        environ = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [*CHAT, *arguments], environ)
        size = struct.pack("HHHH", 40, 160, 0, 0)
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)
        self._unseen = ""

    def press(self, keys: bytes) -> None:
        os.write(self._terminal, keys)

    def type(self, line: str) -> None:
        self.press(line.encode() + b"\r")

    def interrupt(self) -> None:
        self.press(b"\x03")

    def until(self, text: str) -> str:
        """What was printed since the last call, up to `text`."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in (seen := ESCAPES.sub("", self._unseen)):
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._terminal], [], [], left)
            assert ready, f"no {text!r} in {seen!r}"
            self._unseen += os.read(self._terminal, 65536).decode("utf-8", "replace")
        before, _, self._unseen = seen.partition(text)
        return before

    def end(self) -> int:
        """The exit code of a program that has been told to leave."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if select.select([self._terminal], [], [], 0.05)[0]:
                try:
                    os.read(self._terminal, 65536)
                except OSError:  # it is gone
                    break
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._terminal)


OpenChat = Callable[..., Terminal]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running(None, "--num-shard", "1") as stack:
        yield stack


@pytest.fixture
def open_chat(stack: Stack) -> Iterator[OpenChat]:
    """Start a chat at a terminal of its own."""
    terminals: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        terminals.append(Terminal("--url", stack.url, *arguments))
        terminals[-1].until("you>")
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def ask(stack: Stack, *arguments: str, piped: str = "") -> subprocess.CompletedProcess[str]:
    command = [*CHAT, "--url", stack.url, *arguments]
    return subprocess.run(command, input=piped, capture_output=True, text=True, timeout=60)


def test_a_session(open_chat: OpenChat, tmp_path: Path) -> None:
    terminal = open_chat()
    terminal.type(f"/image {PICTURE}")
    terminal.until("picture.png (640 x 480)")
    terminal.until("you [1 picture]>")
    terminal.type("What is shown in this image? <image>")  # as one writes it elsewhere
    terminal.until("A red circle, a blue star and a green triangle")
    numbers = terminal.until("you>")
    assert re.search(
        r"first token [\d.]+ s · \d+ tokens in [\d.]+ s \([\d.]+ tokens/s\) · ", numbers
    )
    assert "image 90" in numbers
    terminal.type("How many shapes are there?")
    terminal.until("Three.")
    terminal.until("you>")
    terminal.type("/nothing")
    terminal.until("Error: there is no command /nothing")
    terminal.type(f"/save {tmp_path / 'chat.json'}")
    terminal.until("saved")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [one["role"] for one in saved] == ["user", "assistant", "user", "assistant"]
    terminal.until("you>")
    terminal.type("/clear")
    terminal.until("you>")
    terminal.type("/history")
    terminal.until("nothing was said yet")
    terminal.until("you>")
    terminal.type("/quit")
    assert terminal.end() == 0


def test_ctrl_c_ends_the_answer_and_not_the_session(stack: Stack, open_chat: OpenChat) -> None:
    dropped = 'tgi_request_failure{err="dropped"}'
    before, done = stack.metric(dropped), stack.metric("tgi_request_success")
    terminal = open_chat(*ENDLESS)
    terminal.type("Hello")
    terminal.until(NOISE)
    terminal.interrupt()
    terminal.until("stopped")
    stack.wait_metric(dropped, before + 1)
    stack.wait_metric("tgi_batch_current_size", 0)
    assert stack.metric("tgi_request_success") == done  # it was cut off, not waited for
    terminal.until("you>")
    terminal.interrupt()  # at the prompt: nothing happens
    terminal.until("you>")
    terminal.type("/history")
    terminal.until("You: Hello")
    terminal.until("Answer: ")  # as far as it came
    terminal.until("you>")
    terminal.press(b"\x04")
    assert terminal.end() == 0


def test_questions_from_arguments_and_pipes(stack: Stack) -> None:
    picture = ("--image", str(PICTURE))
    asked = ask(stack, *picture, "How many shapes are there?")
    assert (asked.returncode, asked.stdout) == (0, "Three.\n")
    assert "image 90" in asked.stderr
    piped = ask(stack, *picture, piped="What color is the star?\n")
    assert (piped.returncode, piped.stdout) == (0, "Blue.\n")
    nothing = ask(stack, *picture)
    assert (nothing.returncode, nothing.stdout) == (1, "")
    assert "there is no question" in nothing.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--max-tokens", "1000000", "Hello"), "1000000"),
        (("--image", "http://127.0.0.1/x.png", "Hello"), "Error: "),
    ],
)
def test_refusals_are_told_in_one_line(stack: Stack, arguments: tuple[str, ...], told: str) -> None:
    refused = ask(stack, *arguments)
    assert (refused.returncode, refused.stdout) == (1, "")
    errors = [line for line in refused.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and told in errors[0] and "Traceback" not in refused.stderr

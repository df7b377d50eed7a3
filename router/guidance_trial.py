"""Compiles grammars of unknown intent in a process that may be lost, and follows them for a while.

A grammar can be small and yet take minutes, gigabytes, or the whole stack of whoever compiles it.
So each is first compiled by a fork of a process that has nothing but the tokenizer, within limits
that the kernel keeps. What passes is harmless to compile again in the router.

First the process is told the vocabulary, then each grammar in a line of JSON, which it answers by a
line with a `Verdict`. It ends with its input.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import pydantic
from llguidance import LLTokenizer

from tessera.router.grammar import Grammar, GrammarKind
from tessera.router.guidance_compile import GrammarError, Vocabulary, compile_grammar
from tessera.router.guidance_walk import Walker

MEMORY_BYTES = 512 * 2**20
STACK_BYTES = 2**20
"""Threads of the router have twice as much wherever it runs, so what passes here fits there."""

NICENESS = 5
"""On a busy machine it gets a third of what the router and the shards get."""

WALL_FACTOR = 4
"""Seconds on the clock for each second of computation; on a busy machine one takes longer."""

START_S = 30.0
"""The first answer also waits for the process to read its tokenizer."""

MAX_REPLY_BYTES = 64 * 1024

TOO_LONG = "it takes too long to compile and to try (GRAMMAR_TIMEOUT); make it smaller or simpler"
TOO_LARGE = "it takes too much memory to compile, or is nested too deep; make it smaller or simpler"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a grammar."""

    error: str | None  # a sentence that is safe to show; None: it may be used
    timed_out: bool = False
    may_change: bool = False  # the machine was slow, so perhaps not the grammar
    num_bytes: int = 0  # of memory that compiling took
    token_s: float = 0.0  # seconds of computation for each token of an answer


_VERDICT = pydantic.TypeAdapter(Verdict)


class TrialLost(Exception):
    """The process is gone, or speaks nonsense, for a reason that is not the grammar's."""


class Trial:
    """One such process, started by the first grammar. One thread at a time may use it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def check(self, grammar: Grammar, timeout_s: float) -> Verdict:
        """Compile it once and follow it for a while.

        Args:
            timeout_s: seconds of computation that this may take.

        Raises:
            TrialLost: try again, unless this is closed.
        """
        if self._is_closed:
            raise TrialLost
        question = {"kind": grammar.kind.value, "source": grammar.source, "timeout_s": timeout_s}
        try:
            process = self._process or self._start()
            _write(process, json.dumps(question).encode() + b"\n")
            line = _read_line(process, WALL_FACTOR * timeout_s + START_S)
            return _VERDICT.validate_json(line, strict=True, extra="forbid")
        except (OSError, ValueError) as error:  # ended from outside, it hangs, or what it says is
            self._end()  # no verdict
            raise TrialLost from error

    def close(self) -> None:
        """End the process, for good."""
        self._is_closed = True
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the library's own words for a grammar it gives up on
            bufsize=0,
        )
        vocabulary = self._vocabulary
        definition = vocabulary.definition.encode()  # as it is: JSON of it would take the
        sizes = [len(definition), vocabulary.size, *vocabulary.eos_ids]  # interpreter too long
        _write(process, json.dumps(sizes).encode() + b"\n" + definition)
        if self._is_closed:  # perhaps meanwhile
            raise ConnectionAbortedError
        return process


def _write(process: "subprocess.Popen[bytes]", content: bytes) -> None:
    """Send all of it.

    Raises:
        OSError: nobody reads it, perhaps not for long enough.
    """
    assert process.stdin is not None
    left = memoryview(content)
    while left:
        if not select.select([], [process.stdin], [], START_S)[1]:
            raise TimeoutError
        left = left[os.write(process.stdin.fileno(), left[: select.PIPE_BUF]) :]


def _read_line(process: "subprocess.Popen[bytes]", timeout_s: float) -> bytes:
    """One line of what it says.

    Raises:
        OSError: it does not come in time, or not at all, or has no end.
    """
    assert process.stdout is not None
    deadline, line = time.monotonic() + timeout_s, b""
    while not line.endswith(b"\n"):
        left_s = max(0.0, deadline - time.monotonic())
        if len(line) > MAX_REPLY_BYTES or not select.select([process.stdout], [], [], left_s)[0]:
            raise TimeoutError
        more = os.read(process.stdout.fileno(), MAX_REPLY_BYTES)
        if not more:
            raise ConnectionResetError
        line += more
    return line


def main() -> None:
    """Answer grammars until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the router ends this process by its input
    os.nice(NICENESS)
    num_bytes, size, *eos_ids = json.loads(sys.stdin.buffer.readline())
    definition = sys.stdin.buffer.read(num_bytes).decode()
    tokenizer = Vocabulary(definition, size, tuple(eos_ids)).load()
    walker = Walker.of(tokenizer, tuple(eos_ids))
    for line in sys.stdin.buffer:
        child = os.fork()
        if not child:
            _answer(tokenizer, walker, json.loads(line))
        status = os.waitpid(child, 0)[1]
        if status:
            _reply(_died_of(os.WTERMSIG(status)))


def _died_of(number: int) -> Verdict:
    """What the signal that ended a fork tells; 0: it found no memory, or the library panicked."""
    if number in (signal.SIGPROF, signal.SIGALRM):
        return Verdict(TOO_LONG, timed_out=True, may_change=number == signal.SIGALRM)
    return Verdict(TOO_LARGE)


def _answer(tokenizer: LLTokenizer, walker: Walker, message: dict[str, str]) -> None:
    """Try a grammar within the limits, reply, and end this process; a limit reached kills it."""
    try:
        grammar = Grammar(GrammarKind(message["kind"]), message["source"])
        verdict = _judge(tokenizer, walker, grammar, float(message["timeout_s"]))
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)  # from here on this process has the only say
        _reply(verdict)
        os._exit(0)
    finally:
        os._exit(1)  # no memory, or a panic of the library


def _judge(tokenizer: LLTokenizer, walker: Walker, grammar: Grammar, timeout_s: float) -> Verdict:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _limit(timeout_s)
    try:
        matcher = compile_grammar(tokenizer, grammar, is_trial=True)
        num_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        return Verdict(None, num_bytes=num_bytes, token_s=walker.walk(matcher))
    except GrammarError as reason:
        return Verdict(error=str(reason))


def _limit(timeout_s: float) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    signal.setitimer(signal.ITIMER_PROF, timeout_s)
    signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * timeout_s)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reply(verdict: Verdict) -> None:
    os.write(1, (json.dumps(asdict(verdict)) + "\n").encode())


if __name__ == "__main__":
    main()

"""Compiles grammars of unknown intent in a process that may be lost.

A grammar can be small and yet take minutes, gigabytes, or the whole stack of whoever compiles it.
So each is first compiled by a fork of a process that has nothing but the tokenizer, within limits
that the kernel keeps. What passes is harmless to compile again in the router.

The process speaks JSON lines: first it is told the vocabulary and the limit, then each grammar is
answered by a `_Reply`. It ends with its input.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass

from llguidance import LLTokenizer

from tessera.router.grammar import Grammar, GrammarKind
from tessera.router.guidance_compile import (
    GrammarError,
    GrammarTimeout,
    Vocabulary,
    compile_grammar,
)

MEMORY_BYTES = 512 * 2**20
STACK_BYTES = 2**20
"""Threads of the router have twice as much wherever it runs, so what passes here fits there."""

WALL_FACTOR = 4
"""Seconds on the clock for each second of computation; on a busy machine one takes longer."""

START_S = 30.0
"""The first answer also waits for the process to read its tokenizer."""

TOO_COMPLEX = "it takes too long or too much memory to compile; make it smaller or simpler"


@dataclass(frozen=True, slots=True)
class _Reply:
    error: str | None  # a sentence that is safe to show
    num_bytes: int  # of memory that compiling took
    may_change: bool = False  # the machine was slow, so perhaps not the grammar


class TrialLost(Exception):
    """The process is gone for a reason that is not the grammar's."""


class Trial:
    """One such process, started by the first grammar. One thread at a time may use it."""

    def __init__(self, vocabulary: Vocabulary, timeout_s: float) -> None:
        self._vocabulary = vocabulary
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None

    def check(self, grammar: Grammar) -> int:
        """Compile once; returns the bytes of memory that it took.

        Raises:
            GrammarError: it cannot be compiled within the limits, or at all.
            GrammarTimeout: not within the time on the clock; another try may succeed.
            TrialLost: try again.
        """
        try:
            process = self._process = self._process or self._start()
            reply = _ask(process, grammar, WALL_FACTOR * self._timeout_s + START_S)
        except (OSError, ValueError):  # ended from outside, or it hangs
            self.close()
            raise TrialLost from None
        if reply.error is not None:
            raise GrammarTimeout(reply.error) if reply.may_change else GrammarError(reply.error)
        return reply.num_bytes

    def close(self) -> None:
        """End the process; a later `check` starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the library's own words for a grammar it gives up on
            text=True,
        )
        _write(process, {"timeout_s": self._timeout_s, **asdict(self._vocabulary)})
        return process


def _ask(process: "subprocess.Popen[str]", grammar: Grammar, timeout_s: float) -> "_Reply":
    assert process.stdout is not None
    _write(process, {"kind": grammar.kind.value, "source": grammar.source})
    if not select.select([process.stdout], [], [], timeout_s)[0]:
        raise TimeoutError
    return _Reply(**json.loads(process.stdout.readline()))


def _write(process: "subprocess.Popen[str]", message: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def main() -> None:
    """Answer grammars until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the router ends this process by its input
    start = json.loads(sys.stdin.readline())
    timeout_s = start.pop("timeout_s")
    tokenizer = Vocabulary(**start).load()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _answer(tokenizer, json.loads(line), timeout_s)
        if status := os.waitpid(child, 0)[1]:
            _reply(_Reply(TOO_COMPLEX, 0, may_change=os.WTERMSIG(status) == signal.SIGALRM))


def _answer(tokenizer: LLTokenizer, message: dict[str, str], timeout_s: float) -> None:
    """Compile within the limits, reply, and end this process; a limit that is reached kills it."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _limit(timeout_s)
    error = None
    try:
        compile_grammar(tokenizer, Grammar(GrammarKind(message["kind"]), message["source"]))
    except GrammarError as reason:
        error = str(reason)
    except BaseException:
        os._exit(1)  # a panic of the library
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _reply(_Reply(error, (after - before) * 1024))
    os._exit(0)


def _limit(timeout_s: float) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    signal.setitimer(signal.ITIMER_PROF, timeout_s)
    signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * timeout_s)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reply(reply: _Reply) -> None:
    os.write(1, (json.dumps(asdict(reply)) + "\n").encode())


if __name__ == "__main__":
    main()

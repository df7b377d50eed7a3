"""Grammars compiled off the event loop, within limits, and kept for the next who ask for them."""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from queue import LifoQueue
from typing import TypeVar

from tessera.router.errors import OverloadedError, ValidationError
from tessera.router.fair_threads import FairThreads
from tessera.router.grammar import Grammar
from tessera.router.guidance_compile import GrammarError, Guide, Vocabulary, compile_grammar
from tessera.router.guidance_trial import WALL_FACTOR, Trial, TrialLost, Verdict

T = TypeVar("T")

NUM_QUICK, NUM_SLOW = 2, 1
QUICK_S = 0.5
"""Every grammar is first given so much computation where nobody takes longer, and only then its
full time, where all wait that need it: slow grammars delay each other, and no others."""

MAX_KNOWN, MAX_KEPT_BYTES = 512, 256 * 2**20

SLOW_S, MAX_USES = 0.05, 16
"""Requests that follow one guide share its lexer, and the bound on what that may learn. So everyone
gets a guide of their own, unless compiling takes longer than this; then so many share one."""

SLOW_TOKEN_S = 0.002
"""Guides that take longer for a token get their masks before their steps, which wait for none."""


class GuideCompiler:
    """Compiles grammars for one tokenizer. Its methods are for the event loop's thread."""

    def __init__(self, vocabulary: Vocabulary, timeout_s: float, max_bytes: int) -> None:
        """Reads the tokenizer, which holds up the event loop for a second if it is large.

        Args:
            timeout_s: seconds of computation one grammar may take.
            max_bytes: longest grammar, in UTF-8.
        """
        self._mask_bytes = vocabulary.mask_bytes
        self._tokenizer = vocabulary.load()
        self._max_bytes = max_bytes
        patience_s = 2 * WALL_FACTOR * timeout_s  # two grammars that are as slow as can be
        self._quick = _Lane(NUM_QUICK, vocabulary, min(QUICK_S, timeout_s), patience_s)
        self._slow = _Lane(NUM_SLOW, vocabulary, timeout_s, patience_s)
        self._lock = threading.Lock()  # of what follows
        self._known: OrderedDict[Grammar, _Passed | str] = OrderedDict()  # asked for last: last

    def close(self) -> None:
        """Stop threads and processes; what has not begun is dropped."""
        self._quick.close()
        self._slow.close()

    async def compile(self, grammar: Grammar, owner: str = "") -> Guide:
        """The grammar, ready for use.

        Args:
            owner: whose turn it counts for where grammars wait for each other.

        Raises:
            ValidationError: it cannot be compiled, or not within the limits.
            OverloadedError: others' grammars take all the time there is.
        """
        num_bytes = len(grammar.source.encode("utf-8", "surrogatepass"))
        if num_bytes > self._max_bytes:
            raise ValidationError(
                f"grammar is too long: {num_bytes} bytes, and the longest is {self._max_bytes} "
                "(MAX_GRAMMAR_BYTES)",
                "grammar",
            )
        found = self._take(grammar) or await self._compiled(grammar, owner)
        if isinstance(found, str):
            raise ValidationError(f"grammar is not valid: {found}", "grammar")
        return found

    async def _compiled(self, grammar: Grammar, owner: str) -> Guide | str:
        try:
            found = await self._quick.run(owner, partial(self._compile, grammar, self._quick))
            if found is None:
                found = await self._slow.run(owner, partial(self._compile, grammar, self._slow))
        except TimeoutError:
            raise OverloadedError(
                "Model is overloaded: too many grammars are being compiled. Retry later."
            ) from None
        except TrialLost:
            raise OverloadedError(
                "Model is overloaded: the process that tries grammars was lost twice. Retry later."
            ) from None
        assert found is not None  # the slow lane always has an answer
        return found

    def _compile(self, grammar: Grammar, lane: "_Lane", trial: Trial) -> Guide | str | None:
        """A guide, why there is none, or None: this lane has no time for it. In a thread."""
        if found := self._take(grammar):  # somebody else has been faster
            return found
        with self._lock:
            known = self._known.get(grammar)
        passed = known if isinstance(known, _Passed) else None
        if passed is None:
            verdict = lane.try_(trial, grammar)
            if verdict.timed_out and lane is self._quick:
                return None
            if verdict.error is not None:
                if not verdict.may_change:
                    self._keep(grammar, verdict.error)
                return verdict.error
            passed = _Passed(verdict.num_bytes, verdict.token_s > SLOW_TOKEN_S, lane is self._quick)
        elif lane is self._quick and not passed.is_quick:
            return None
        return self._compile_passed(grammar, passed)

    def _compile_passed(self, grammar: Grammar, passed: "_Passed") -> Guide | str:
        started = time.thread_time()
        try:
            matcher = compile_grammar(self._tokenizer, grammar)
        except GrammarError as error:
            self._keep(grammar, str(error))
            return str(error)
        guide = Guide(matcher, self._mask_bytes, grammar.digest, passed.is_slow)
        is_shared = time.thread_time() - started > SLOW_S
        self._keep(grammar, replace(passed, guide=guide if is_shared else None, num_uses=1))
        return guide

    def _take(self, grammar: Grammar) -> Guide | str | None:
        """What need not be compiled: a guide that is not used up, or a refusal."""
        with self._lock:
            known = self._known.get(grammar)
            if known is None:
                return None
            self._known.move_to_end(grammar)
            return known if isinstance(known, str) else known.take()

    def _keep(self, grammar: Grammar, found: "_Passed | str") -> None:
        """Remember it, and forget what was asked for longest ago."""
        with self._lock:
            self._known[grammar] = found
            self._known.move_to_end(grammar)
            while len(self._known) > MAX_KNOWN or self._num_kept_bytes > MAX_KEPT_BYTES:
                self._known.popitem(last=False)

    @property
    def _num_kept_bytes(self) -> int:
        guides = (known for known in self._known.values() if isinstance(known, _Passed))
        return sum(known.num_bytes for known in guides if known.guide is not None)


class _Lane:
    """Some threads that owners take turns in, each with a trial process."""

    def __init__(
        self, size: int, vocabulary: Vocabulary, timeout_s: float, patience_s: float
    ) -> None:
        """
        Args:
            timeout_s: seconds of computation one grammar may take here.
            patience_s: seconds that one may wait for its turn.
        """
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self.trials = [Trial(vocabulary) for _ in range(size)]
        self._threads = FairThreads(size, "grammar")
        self._free: LifoQueue[Trial] = LifoQueue()  # the second is started when two are needed
        for trial in self.trials:
            self._free.put(trial)

    def close(self) -> None:
        self._threads.close()
        for trial in self.trials:
            trial.close()

    async def run(self, owner: str, job: Callable[[Trial], T]) -> T:
        """What `job` returns or raises, in a thread, once it is the owner's turn.

        Raises:
            TimeoutError: that did not come in time.
        """
        has_begun = False

        def work() -> T:
            nonlocal has_begun
            has_begun = True
            return self._with_trial(job)

        running = asyncio.ensure_future(self._threads.run(owner, work))
        try:
            await asyncio.wait([running], timeout=self._patience_s)
            if not running.done() and not has_begun:
                raise TimeoutError
            return await running
        finally:
            running.cancel()

    def _with_trial(self, job: Callable[[Trial], T]) -> T:
        trial = self._free.get()
        try:
            return job(trial)
        finally:
            self._free.put(trial)

    def try_(self, trial: Trial, grammar: Grammar) -> Verdict:
        """Try a grammar, once more if the process is lost, which is not the grammar's fault.

        Raises:
            TrialLost: twice.
        """
        try:
            return trial.check(grammar, self._timeout_s)
        except TrialLost:
            return trial.check(grammar, self._timeout_s)


@dataclass(eq=False, slots=True)
class _Passed:
    """A grammar that can be compiled and followed."""

    num_bytes: int
    is_slow: bool  # to follow
    is_quick: bool  # to compile
    guide: Guide | None = None  # kept where compiling took long
    num_uses: int = 0

    def take(self) -> Guide | None:
        """The guide, unless enough requests have followed it."""
        if self.num_uses >= MAX_USES:
            self.guide = None
        self.num_uses += 1
        return self.guide

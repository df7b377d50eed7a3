"""Grammars compiled off the event loop, within limits, and kept for the next who ask for them."""

import asyncio
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from llguidance import LLTokenizer

from tessera.router.errors import OverloadedError, ValidationError
from tessera.router.grammar import Grammar
from tessera.router.guidance_compile import (
    GrammarError,
    GrammarTimeout,
    Guide,
    Vocabulary,
    compile_grammar,
)
from tessera.router.guidance_trial import WALL_FACTOR, Trial, TrialLost

NUM_COMPILERS = 2
"""Grammars compiled at once: one that takes its full time does not keep the others waiting."""

MAX_KNOWN, MAX_KEPT_BYTES = 512, 256 * 2**20

SLOW_S, MAX_USES = 0.05, 16
"""Requests that follow one guide share its lexer, and the bound on what that may learn. So everyone
gets a guide of their own, unless compiling takes longer than this; then so many share one."""


class GuideCompiler:
    """Compiles grammars for one tokenizer. Its methods are for the event loop's thread."""

    def __init__(self, vocabulary: Vocabulary, timeout_s: float, max_bytes: int) -> None:
        """
        Args:
            timeout_s: seconds of computation one grammar may take.
            max_bytes: longest grammar, in UTF-8.
        """
        self._vocabulary = vocabulary
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(NUM_COMPILERS, "grammar")
        self._trials: SimpleQueue[Trial] = SimpleQueue()
        self._all_trials = [Trial(vocabulary, timeout_s) for _ in range(NUM_COMPILERS)]
        for trial in self._all_trials:
            self._trials.put(trial)
        self._lock = threading.Lock()  # of what follows
        self._tokenizer: LLTokenizer | None = None
        self._known: OrderedDict[Grammar, _Passed | str] = OrderedDict()  # asked for last: last

    def close(self) -> None:
        """Stop threads and processes; who still waits is refused."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for trial in self._all_trials:
            trial.close()

    async def compile(self, grammar: Grammar) -> Guide:
        """The grammar, ready for use.

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
        found = self._take(grammar) or await self._compiled(grammar)
        if isinstance(found, str):
            raise ValidationError(f"grammar is not valid: {found}", "grammar")
        return found

    async def _compiled(self, grammar: Grammar) -> Guide | str:
        loop = asyncio.get_running_loop()
        # One grammar before this one and itself, both as slow as can be.
        patience_s = 2 * WALL_FACTOR * self._timeout_s
        try:
            async with asyncio.timeout(patience_s):
                return await loop.run_in_executor(self._threads, self._compile, grammar)
        except (TimeoutError, TrialLost):
            raise OverloadedError(
                "Model is overloaded: too many grammars are being compiled. Retry later."
            ) from None

    def _compile(self, grammar: Grammar) -> Guide | str:
        """A guide, or why there is none; in a thread."""
        if found := self._take(grammar):  # somebody else has been faster
            return found
        try:
            num_bytes = self._try(grammar)
            started = time.thread_time()
            matcher = compile_grammar(self._load(), grammar)
            guide = Guide(matcher, self._vocabulary.mask_bytes)
            is_slow = time.thread_time() - started > SLOW_S
            self._keep(grammar, _Passed(num_bytes, guide if is_slow else None))
            return guide
        except GrammarError as error:
            if not isinstance(error, GrammarTimeout):
                self._keep(grammar, str(error))
            return str(error)

    def _try(self, grammar: Grammar) -> int:
        """The bytes that compiling it takes, found out where it can do no harm."""
        with self._lock:
            known = self._known.get(grammar)
        if isinstance(known, _Passed):
            return known.num_bytes
        trial = self._trials.get()
        try:
            return trial.check(grammar)
        finally:
            self._trials.put(trial)

    def _load(self) -> LLTokenizer:
        with self._lock:
            self._tokenizer = self._tokenizer or self._vocabulary.load()
            return self._tokenizer

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


@dataclass(eq=False, slots=True)
class _Passed:
    """A grammar that can be compiled."""

    num_bytes: int
    guide: Guide | None  # kept where it took long
    num_uses: int = 1

    def take(self) -> Guide | None:
        """The guide, unless enough requests have followed it."""
        if self.num_uses >= MAX_USES:
            self.guide = None
        self.num_uses += 1
        return self.guide

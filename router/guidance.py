"""Grammars compiled off the event loop, within limits, and kept for the next who ask for them."""

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from llguidance import LLTokenizer

from tessera.router.errors import OverloadedError, ValidationError
from tessera.router.grammar import Grammar
from tessera.router.guidance_compile import GrammarError, Guide, Vocabulary, compile_grammar
from tessera.router.guidance_trial import WALL_FACTOR, Trial, TrialLost

NUM_COMPILERS = 2
"""Grammars compiled at once: one that takes its full time does not keep the others waiting."""

MAX_KEPT, MAX_KEPT_BYTES = 256, 256 * 2**20
MAX_REFUSED = 256


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
        self._kept = _Kept()

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
        found = self._find(grammar)
        if found is None:
            found = await self._compiled(grammar)
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

    def _find(self, grammar: Grammar) -> Guide | str | None:
        with self._lock:
            return self._kept.find(grammar)

    def _compile(self, grammar: Grammar) -> Guide | str:
        """The guide, or why there is none; in a thread."""
        trial = self._trials.get()
        found: Guide | str | None = self._find(grammar)  # somebody else may have been faster
        try:
            if found is None:
                num_bytes = trial.check(grammar)
                matcher = compile_grammar(self._load(), grammar)
                found = Guide(matcher, self._vocabulary.mask_bytes, num_bytes)
        except GrammarError as error:
            found = str(error)
        finally:
            self._trials.put(trial)
        with self._lock:
            self._kept.add(grammar, found)
        return found

    def _load(self) -> LLTokenizer:
        with self._lock:
            self._tokenizer = self._tokenizer or self._vocabulary.load()
            return self._tokenizer


class _Kept:
    """Guides, and refusals, of the grammars asked for last."""

    def __init__(self) -> None:
        self._guides: OrderedDict[Grammar, Guide] = OrderedDict()
        self._refusals: OrderedDict[Grammar, str] = OrderedDict()
        self._num_bytes = 0

    def find(self, grammar: Grammar) -> Guide | str | None:
        """What is known of a grammar, None if nothing is."""
        for entries in (self._guides, self._refusals):
            if grammar in entries:
                entries.move_to_end(grammar)
        return self._guides.get(grammar) or self._refusals.get(grammar)

    def add(self, grammar: Grammar, found: Guide | str) -> None:
        """Keep it, and forget what was asked for longest ago."""
        if self.find(grammar) is not None:
            return
        if isinstance(found, str):
            self._refusals[grammar] = found
            if len(self._refusals) > MAX_REFUSED:
                self._refusals.popitem(last=False)
            return
        self._guides[grammar] = found
        self._num_bytes += found.num_bytes
        while len(self._guides) > MAX_KEPT or self._num_bytes > MAX_KEPT_BYTES:
            self._num_bytes -= self._guides.popitem(last=False)[1].num_bytes

"""Follows a grammar by chance for a while, to find out what would fail or crawl in an answer.

A grammar that compiles may still need more than there is once it is followed: states of its
expressions, or time for each token. Both show soon, because most such grammars grow token by token.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from tessera.router.guidance_compile import GrammarError, described

DEEP_TOKENS, LONG_TOKENS = 24, 96
"""Of the two walks that go as deep into objects and into arrays as they can, and of one that goes
anywhere. A walk takes them in one answer, or in as many as it takes."""

NUM_TOKENS = 2 * DEEP_TOKENS + LONG_TOKENS

MAX_TOKEN_S = 0.02
"""Most seconds of computation for a token, on average."""

_STRUCTURAL = frozenset(b"\"{}[]():,;<>\n'=")


Kind = NDArray[np.bool_]
"""Some of the token ids: [vocabulary]."""


@dataclass(frozen=True, slots=True)
class Walker:
    """Walks for one tokenizer, whose tokens it knows by kind."""

    objects_V: Kind  # begin an object
    arrays_V: Kind
    structural_V: Kind  # have a character that begins or ends something
    single_V: Kind  # are single bytes, which go where longer ones go past
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: LLTokenizer, eos_ids: tuple[int, ...]) -> "Walker":
        """Look at all tokens; takes half a second for large vocabularies."""
        texts = [tokenizer.decode_bytes([id_]) for id_ in range(tokenizer.vocab_size)]
        return cls(
            np.array([text.startswith(b"{") for text in texts]),
            np.array([text.startswith(b"[") for text in texts]),
            np.array([not _STRUCTURAL.isdisjoint(text) for text in texts]),
            np.array([len(text) == 1 for text in texts]),
            eos_ids,
        )

    def walk(self, matcher: LLMatcher) -> float:
        """Take some tokens; returns the mean seconds of computation for one.

        Args:
            matcher: stands before the first token, and will afterwards.

        Raises:
            GrammarError: it failed, or took too long.
        """
        chance = random.Random(0)  # the same grammar is judged alike
        anything = ((), (self.structural_V,), (self.single_V,))
        spent_s = self._walk(matcher, DEEP_TOKENS, [(self.objects_V, self.structural_V)], chance, 0)
        spent_s = self._walk(
            matcher, DEEP_TOKENS, [(self.arrays_V, self.structural_V)], chance, spent_s
        )
        return self._walk(matcher, LONG_TOKENS, anything, chance, spent_s) / NUM_TOKENS

    def _walk(
        self,
        matcher: LLMatcher,
        num_tokens: int,
        tastes: Sequence[Sequence[Kind]],
        chance: random.Random,
        spent_s: float,
    ) -> float:
        """Each token by one of the tastes; returns the seconds spent, those before included."""
        current = matcher.deep_copy()
        for _ in range(num_tokens):
            started = time.thread_time()
            ids = self._next_ids(current, chance.choice(tastes))
            if ids.size:
                current.consume_token(int(ids[chance.randrange(ids.size)]))
            spent_s += time.thread_time() - started
            _check(current, spent_s)
            if not ids.size or current.is_stopped():
                current = matcher.deep_copy()
        return spent_s

    def _next_ids(self, matcher: LLMatcher, taste: Sequence[Kind]) -> NDArray[np.intp]:
        """The tokens to choose from, without the end of the answer: those of the first kind of
        which some are allowed, or else all that are."""
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(mask, count=self.single_V.size, bitorder="little") != 0
        allowed_V[list(self.eos_ids)] = False
        for kind_V in taste:
            found = np.flatnonzero(allowed_V & kind_V)
            if found.size:
                return found
        return np.flatnonzero(allowed_V)


def _check(matcher: LLMatcher, spent_s: float) -> None:
    if matcher.is_error():
        raise GrammarError(described(matcher.get_error()))
    if spent_s > NUM_TOKENS * MAX_TOKEN_S:
        raise GrammarError(
            f"following it takes more than {1000 * MAX_TOKEN_S:.0f} ms of computation for a token; "
            "use rules with one reading, fewer alternatives, or fewer optional properties"
        )

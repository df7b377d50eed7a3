"""Follows a grammar by chance for a while, to find out what would fail or crawl in an answer.

A grammar that compiles may still need more than there is once it is followed: states of its
expressions, or time for each token. Both show soon, because most such grammars grow token by token.
"""

import random
import time
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from tessera.router.guidance_compile import GrammarError, described

WALK_TOKENS = 128
"""In one answer, or in as many as it takes."""

MAX_TOKEN_S = 0.02
"""Most seconds of computation for a token, on average."""

_STRUCTURAL = frozenset(b"\"{}[]():,;<>\n'=")


@dataclass(frozen=True, slots=True)
class Walker:
    """Walks for one tokenizer."""

    is_structural_V: NDArray[np.bool_]  # ids with a character that begins or ends something
    is_single_V: NDArray[np.bool_]  # ids of single bytes, which go where longer ones go past
    eos_ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: LLTokenizer, eos_ids: tuple[int, ...]) -> "Walker":
        """Look at all tokens; takes half a second for large vocabularies."""
        texts = [tokenizer.decode_bytes([id_]) for id_ in range(tokenizer.vocab_size)]
        is_structural_V = np.array([not _STRUCTURAL.isdisjoint(text) for text in texts])
        return cls(is_structural_V, np.array([len(text) == 1 for text in texts]), eos_ids)

    def walk(self, matcher: LLMatcher) -> float:
        """Take `WALK_TOKENS` tokens; returns the mean seconds of computation for one.

        Args:
            matcher: stands before the first token, and will afterwards.

        Raises:
            GrammarError: it failed, or took too long.
        """
        chance = random.Random(0)  # the same grammar is judged alike
        spent_s, num_tokens, current = 0.0, 0, matcher.deep_copy()
        while num_tokens < WALK_TOKENS:
            started = time.thread_time()
            ids = self._next_ids(current, chance)
            if ids.size:
                current.consume_token(int(ids[chance.randrange(ids.size)]))
            spent_s += time.thread_time() - started
            if current.is_error():
                raise GrammarError(described(current.get_error()))
            if spent_s > WALK_TOKENS * MAX_TOKEN_S:
                raise GrammarError(
                    f"following it takes {1000 * spent_s / (num_tokens + 1):.0f} ms of computation "
                    f"for a token, and at most {1000 * MAX_TOKEN_S:.0f} are allowed; use rules "
                    "with one reading, fewer alternatives, or fewer optional properties"
                )
            num_tokens += 1
            if not ids.size or current.is_stopped():
                current = matcher.deep_copy()
        return spent_s / num_tokens

    def _next_ids(self, matcher: LLMatcher, chance: random.Random) -> NDArray[np.intp]:
        """The tokens to choose from, without the end of the answer: all that are allowed, or those
        that bring it on, which are few among all that a string may hold, or single bytes."""
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(mask, count=self.is_single_V.size, bitorder="little") != 0
        allowed_V[list(self.eos_ids)] = False
        wanted_V = chance.choice((self.is_structural_V, self.is_single_V, True))
        wanted = np.flatnonzero(allowed_V & wanted_V)
        return wanted if wanted.size else np.flatnonzero(allowed_V)

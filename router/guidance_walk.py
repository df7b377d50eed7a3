"""Follows a grammar by chance for a while, to find out what would fail or crawl in an answer.

A grammar that compiles may still need more than there is once it is followed: states of its
expressions, or time for each token. Both show soon, because most such grammars grow token by token.
"""

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llguidance import LLMatcher, LLTokenizer

from tessera.router.guidance_compile import GrammarError, described

DEEP_TOKENS, LONG_TOKENS = 24, 96
"""Of the two walks that go as deep into objects and into arrays as they can, and of one that goes
anywhere. A walk takes them in one answer, or in as many as it takes."""

NUM_TOKENS = 2 * DEEP_TOKENS + LONG_TOKENS

MAX_TOKEN_S = 0.02
"""Most seconds of computation for a token, on average."""

_STRUCTURAL = frozenset(b"\"{}[]():,;<>\n'=")


Ids = int
"""A set of token ids: bit i stands for id i."""


@dataclass(frozen=True, slots=True)
class Walker:
    """Walks for one tokenizer, whose tokens it knows by kind."""

    objects: Ids  # begin an object
    arrays: Ids
    structural: Ids  # have a character that begins or ends something
    single: Ids  # are single bytes, which go where longer ones go past
    ends: Ids  # end an answer

    @classmethod
    def of(cls, tokenizer: LLTokenizer, eos_ids: Sequence[int]) -> "Walker":
        """Look at all tokens; takes half a second for large vocabularies."""
        texts = [tokenizer.decode_bytes([id_]) for id_ in range(tokenizer.vocab_size)]
        return cls(
            _ids(text.startswith(b"{") for text in texts),
            _ids(text.startswith(b"[") for text in texts),
            _ids(not _STRUCTURAL.isdisjoint(text) for text in texts),
            _ids(len(text) == 1 for text in texts),
            _ids(id_ in eos_ids for id_ in range(len(texts))),
        )

    def walk(self, matcher: LLMatcher) -> float:
        """Take some tokens; returns the mean seconds of computation for one.

        Args:
            matcher: stands before the first token, and will afterwards.

        Raises:
            GrammarError: it failed, or took too long.
        """
        chance = random.Random(0)  # the same grammar is judged alike
        spent_s = 0.0
        for first in (self.objects, self.arrays):
            taste = (first, self.structural)
            spent_s = self._walk(matcher, DEEP_TOKENS, [taste], chance, spent_s)
        anything = ((), (self.structural,), (self.single,))
        return self._walk(matcher, LONG_TOKENS, anything, chance, spent_s) / NUM_TOKENS

    def _walk(
        self,
        matcher: LLMatcher,
        num_tokens: int,
        tastes: Sequence[Sequence[Ids]],
        chance: random.Random,
        spent_s: float,
    ) -> float:
        """Each token by one of the tastes; returns the seconds spent, those before included."""
        current = matcher.deep_copy()
        for _ in range(num_tokens):
            started = time.thread_time()
            token_id = self._next_id(current, chance.choice(tastes), chance)
            if token_id is not None:
                current.consume_token(token_id)
            spent_s += time.thread_time() - started
            _check(current, spent_s)
            if token_id is None or current.is_stopped():
                current = matcher.deep_copy()
        return spent_s

    def _next_id(
        self, matcher: LLMatcher, taste: Sequence[Ids], chance: random.Random
    ) -> int | None:
        """One that is allowed, of the first kind of which some are, if any; not the end."""
        allowed = int.from_bytes(matcher.compute_bitmask(), "little") & ~self.ends
        if not allowed:
            return None
        found = next((allowed & kind for kind in taste if allowed & kind), allowed)
        place = chance.randrange(found.bit_length())
        rest = found >> place
        return place + (rest & -rest).bit_length() - 1


def _ids(flags: Iterable[bool]) -> Ids:
    digits = "".join("01"[flag] for flag in flags)
    return int(digits[::-1], 2)


def _check(matcher: LLMatcher, spent_s: float) -> None:
    if matcher.is_error():
        raise GrammarError(described(matcher.get_error()))
    if spent_s > NUM_TOKENS * MAX_TOKEN_S:
        raise GrammarError(
            f"following it takes more than {1000 * MAX_TOKEN_S:.0f} ms of computation for a token; "
            "use rules with one reading, fewer alternatives, or fewer optional properties"
        )

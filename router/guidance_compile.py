"""From a client's grammar to what tells, token by token, how an answer may go on.

Runs wherever it is called and may take long, or crash: only call it on what `guidance_trial` let
pass.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from tessera.router.grammar import Grammar, GrammarKind

MAX_MESSAGE = 200
MAX_QUOTED = 40

MAX_LEXER_STATES = 40_000
"""Of one guide: some 40 MB."""

TRIAL_SHARE = 4
"""What a grammar is tried with is so much less: its states are found bit by bit."""

# Room for a line break and its indentation, or one space: a model can lay its answer out, but
# cannot fill it with blanks for ever.
_WHITESPACE = r"( |\n {0,32})?"

# These win over the client's own `x-guidance`: what cannot be kept is refused, never ignored.
_JSON_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "lenient": False,
    "coerce_one_of": False,
}

_SENTENCES = {  # by part of the library's own message, which speaks of what clients cannot change
    " items; max is ": "it allows too much at the same place; use fewer optional properties in one "
    "object (about 900 are possible), fewer alternatives, or rules with one reading",
    "Too many items": "it allows too much at the same place; use fewer alternatives that begin "
    "alike, or longer terminals",
    "too many states": "its expressions have too many states (at most "
    f"{MAX_LEXER_STATES // TRIAL_SHARE} when it is tried, {MAX_LEXER_STATES} in an answer); "
    "shorten counted repetitions such as {1,1000}, or what stands before them",
    "too many expressions": "its expressions are too complex; shorten counted repetitions such as "
    "{1,1000}, do not nest them, and intersect less",
    "lexer_fuel": "its expressions are too complex; split them, shorten counted repetitions such "
    "as {1,1000}, and intersect less",
    "coerce_one_of": "`oneOf` needs alternatives of which only one can match, such as different "
    "types or a property with different constants; use `anyOf`",
    "not present in a registry": "`$ref` can only point into the schema itself",
    "NoExtension": "it allows no answer",
    "panic: ": "it is too large or too complex",
}


class GrammarError(Exception):
    """The grammar cannot be used. The message is safe to show to a client."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer's library needs to know of it."""

    definition: str  # a tokenizer.json
    size: int  # token ids of the model; those that the tokenizer does not know are never allowed
    eos_ids: tuple[int, ...]

    @property
    def mask_bytes(self) -> int:
        """Of a mask with a bit per token id, in whole 32-bit words."""
        return -(-self.size // 32) * 4

    def load(self) -> LLTokenizer:
        """Build the trie of all tokens; takes a second for large ones."""
        eos = list(self.eos_ids) or None
        return LLTokenizer(self.definition, n_vocab=self.size, eos_token=eos)


@dataclass(frozen=True, slots=True, eq=False)
class Guide:
    """A compiled grammar that several requests can follow."""

    _matcher: LLMatcher  # stands before the first token, and always will
    mask_bytes: int  # of one mask: a bit per token id of the model, in whole 32-bit words
    digest: str = ""  # of the grammar, for logs
    is_slow: bool = False  # its masks take longer than a step should wait

    def start(self) -> LLMatcher:
        """A matcher of one's own; the tables its lexer builds are shared."""
        return self._matcher.deep_copy()


def compile_grammar(
    tokenizer: LLTokenizer, grammar: Grammar, *, is_trial: bool = False
) -> LLMatcher:
    """A matcher that stands before the first token.

    Args:
        is_trial: with less room than requests have, so that what passes leaves some to spare.

    Raises:
        GrammarError: the grammar is damaged, asks for something unknown, is too large, or allows no
            answer at all.
    """
    limits = _limits(grammar.kind, TRIAL_SHARE if is_trial else 1)
    try:
        matcher = LLMatcher(tokenizer, _definition(grammar), limits=limits, log_level=0)
    except (ValueError, TypeError, RecursionError) as error:
        raise GrammarError(described(str(error))) from None
    first = matcher.deep_copy()
    if not first.is_error():
        first.compute_bitmask()
    if first.is_error():
        raise GrammarError(described(first.get_error()))
    return matcher


def _limits(kind: GrammarKind, share: int) -> LLParserLimits:
    """How far the library goes for one token, and for one guide.

    An object's optional properties take four items of a row each. Schemas have many items that cost
    little; in a grammar of rules that many come from ambiguity, whose cost grows with their square.
    """
    is_schema = kind in (GrammarKind.JSON_SCHEMA, GrammarKind.TOOLS)
    return LLParserLimits(
        max_items_in_row=4000 if is_schema else 1000,
        step_max_items=1_000_000 if is_schema else 50_000,
        max_lexer_states=MAX_LEXER_STATES // share,
        verbose_errors=False,
    )


def _definition(grammar: Grammar) -> str:
    """The grammar as the library writes it."""
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            if not isinstance(json.loads(grammar.source), dict):
                raise GrammarError("a JSON schema must be an object")
            options: Any = _JSON_OPTIONS  # the library does not export their type
            return LLMatcher.grammar_from_json_schema(grammar.source, overrides=options)
        case GrammarKind.REGEX:
            return LLMatcher.grammar_from_regex(grammar.source)
        case GrammarKind.LARK | GrammarKind.TOOLS:
            return LLMatcher.grammar_from_lark(grammar.source)
        case GrammarKind.CHOICE:
            return LLMatcher.grammar_from_lark(_alternatives(grammar.source))


def _alternatives(source: str) -> str:
    choices = json.loads(source)
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise GrammarError("a choice is a list of strings that are not empty")
    if not choices:
        raise GrammarError("a choice needs at least one string")
    return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def described(message: str) -> str:
    """What the library says went wrong, without the grammar itself, which it likes to quote."""
    if known := known_reason(message):
        return known
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("error: ")]
    text = reasons[-1].removeprefix("error: ") if reasons else (lines or ["it cannot be read"])[0]
    text = text.split("; following special tokens")[0]
    text = re.sub(r"^(at )?\d+\(\d+\): ", "", text)
    text = re.sub(rf'"[^"]{{{MAX_QUOTED},}}"?', '"..."', text)
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def known_reason(message: str) -> str | None:
    """Our own sentence for what the library says, without a word of the grammar."""
    return next((text for part, text in _SENTENCES.items() if part in message), None)


def eos_of(eos_ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The ids that end an answer, in order, as far as the model has them."""
    return tuple(sorted(id_ for id_ in eos_ids if id_ < vocab_size))

"""Grammars that compile and are followed for a while: which pass, and what the others are told."""

import json
import random
from itertools import product
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tessera.router import guidance_compile
from tessera.router.grammar import Grammar, GrammarKind
from tessera.router.guidance_compile import GrammarError, Vocabulary, compile_grammar
from tessera.router.guidance_walk import MAX_TOKEN_S, Walker
from tests.router.guided_shards import allowed_ids
from tests.router.json_schemas import Schema, object_of, supported

EOS = 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    """Some thousand tokens, of which many are long or end one part of JSON and begin the next.

    Real vocabularies have thousands and hundreds of those, the checkpoints' tiny ones have none.
    """
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += map("".join, product(LETTERS, LETTERS))
    words += map("".join, product('":,{}[]Ġ', '":,{}[]Ġ'))
    words += map("".join, product(['"', ""], LETTERS, ['"', '":', '",']))
    words += ["".join(word) for length in range(3, 11) for word in product("ab", repeat=length)]
    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(dict.fromkeys(words))}, []))
    bpe.decoder = decoders.ByteLevel()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return Vocabulary(bpe.to_str(), bpe.get_vocab_size(), (EOS,)).load()


@pytest.fixture(scope="module")
def walker(tokenizer: LLTokenizer) -> Walker:
    return Walker.of(tokenizer, (EOS,))


def walked(tokenizer: LLTokenizer, walker: Walker, kind: GrammarKind, source: str) -> float:
    return walker.walk(compile_grammar(tokenizer, Grammar(kind, source), is_trial=True))


def variants(count: int, **properties: Schema) -> list[Schema]:
    """Objects that are told apart by their last property."""
    return [object_of(**properties, type={"const": f"t{i}"}) for i in range(count)]


def deep(depth: int) -> Schema:
    """References, each to an object of two more."""
    both = [object_of(a={"$ref": f"#/$defs/d{i}"}, b={"type": "null"}) for i in range(1, depth)]
    definitions = {f"d{i}": schema for i, schema in enumerate([*both, {"type": "integer"}])}
    return {"$defs": definitions, "$ref": "#/$defs/d0"}


LARGE: dict[str, Schema] = {
    "union of 400 objects": {"anyOf": variants(400)},
    "one of 300 objects": {"oneOf": variants(300, a={"type": "string"})},
    "300 objects that begin alike": {
        "anyOf": [
            {
                "properties": {"a": {"type": "string"}, "type": {"const": f"t{i}"}},
                "required": ["a", "type"],
            }
            for i in range(300)
        ]
    },
    "list of 400 kinds": {"type": "array", "items": {"anyOf": variants(400, n={"type": "null"})}},
    "enum of 900 objects": {"enum": [{"id": i, "name": f"n{i}"} for i in range(900)]},
    "enum of 5000 words": {"enum": [f"w{i * 7919 % 100_003}" for i in range(5000)]},
    "300 dates": {
        "properties": {f"p{i}": {"type": "string", "format": "date"} for i in range(300)}
    },
    "600 optional properties": {"properties": {f"p{i}": {"type": "integer"} for i in range(600)}},
    "40 levels": deep(40),
    "long strings": {"type": "string", "minLength": 500, "maxLength": 20_000},
    "long lists": {"items": {"type": "integer"}, "minItems": 5000, "maxItems": 9000},
}


@pytest.mark.parametrize("name", LARGE)
def test_large_schemas_can_be_followed(tokenizer: LLTokenizer, walker: Walker, name: str) -> None:
    source = json.dumps(LARGE[name])
    assert walked(tokenizer, walker, GrammarKind.JSON_SCHEMA, source) < MAX_TOKEN_S
    matcher = compile_grammar(tokenizer, Grammar(GrammarKind.JSON_SCHEMA, source))
    for seed in range(3):
        follow(matcher.deep_copy(), seed)


def follow(matcher: LLMatcher, seed: int) -> None:
    """An answer as a request would get it, or 100 tokens of one."""
    chance = random.Random(seed)
    for _ in range(100):
        ids = allowed_ids(matcher.compute_bitmask())
        assert not matcher.is_error(), matcher.get_error()
        token_id = chance.choice(ids)
        if token_id == EOS:
            return
        assert matcher.consume_token(token_id)


def test_schemas_of_every_kind_pass(tokenizer: LLTokenizer, walker: Walker) -> None:
    for schema in supported():
        walked(tokenizer, walker, GrammarKind.JSON_SCHEMA, json.dumps(schema))


ORDINARY = {
    "email": (GrammarKind.REGEX, r"[\w.+-]{1,64}@[\w-]{1,63}(\.[\w-]{2,63}){1,4}"),
    "nested repetition": (GrammarKind.REGEX, "([a-z]{1,100}[0-9]){1,100}"),
    "greedy": (GrammarKind.REGEX, "(a+)+b"),
    "ambiguous expression": (GrammarKind.REGEX, "(a|aa|a*)+"),
    "left recursion": (GrammarKind.LARK, 'start: e\ne: e "+" e | e "*" e | "a" | "(" e ")"'),
    "palindromes": (GrammarKind.LARK, 'start: p\np: "a" p "a" | "b" p "b" | "a" | "b" | '),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_grammars_pass(tokenizer: LLTokenizer, walker: Walker, name: str) -> None:
    assert 0 < walked(tokenizer, walker, *ORDINARY[name]) < MAX_TOKEN_S


HOSTILE = {
    "nested counts": (GrammarKind.REGEX, "(a{1,1000}){1,1000}", "too complex"),
    "three levels": (GrammarKind.REGEX, "((a{1,30}){1,30}){1,30}", "too complex"),
    "exponential": (GrammarKind.REGEX, "(.*a.{25}|.*b.{30}|.*c.{35})", "too many states"),
    "in a schema": (
        GrammarKind.JSON_SCHEMA,
        json.dumps(
            object_of(z={"type": "null"}, a={"type": "string", "pattern": "^(.*a.{25}|.*b.{30})$"})
        ),
        "too many states",
    ),
    "in a terminal": (
        GrammarKind.LARK,
        "start: A\nA: /.*a.{25}/ | /.*b.{30}/ | /.*x.{35}/",
        "too many states",
    ),
    "ambiguous sums": (GrammarKind.LARK, 'start: s\ns: s s | s s s | "a" | "b" | ', "same place"),
    "counted rules": (
        GrammarKind.LARK,
        'start: x{1,1000}\nx: y{1,1000}\ny: "a" | "b"',
        "same place",
    ),
    "3000 optional properties": (
        GrammarKind.JSON_SCHEMA,
        json.dumps({"properties": {f"p{i}": {} for i in range(3000)}}),
        "about 900 are possible",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_fail_in_an_answer_is_found(
    tokenizer: LLTokenizer, walker: Walker, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance_compile, "MAX_LEXER_STATES", 3200)  # for a small vocabulary
    kind, source, told = HOSTILE[name]
    with pytest.raises(GrammarError, match=told):
        walked(tokenizer, walker, kind, source)


def test_what_takes_too_long_is_told_how_long(
    tokenizer: LLTokenizer, walker: Walker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.thread_time", lambda: 0.021 * next(ticks))
    with pytest.raises(GrammarError) as refused:
        walked(tokenizer, walker, GrammarKind.REGEX, "a*")
    assert "more than 20 ms of computation for a token" in str(refused.value)


def test_a_walk_leaves_the_matcher_where_it_was(tokenizer: LLTokenizer, walker: Walker) -> None:
    matcher = compile_grammar(tokenizer, Grammar(GrammarKind.REGEX, "abc|abd"))
    before: Any = matcher.compute_bitmask()
    walker.walk(matcher)
    assert matcher.compute_bitmask() == before and not matcher.is_error()

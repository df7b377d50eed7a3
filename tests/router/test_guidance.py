"""Compiling grammars: what clients are told, and what hostile ones cannot do."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from llguidance import LLMatcher, LLParserLimits

from tessera.router import guidance, guidance_compile, guidance_trial
from tessera.router.errors import OverloadedError, ValidationError
from tessera.router.grammar import Grammar, GrammarKind
from tessera.router.guidance import GuideCompiler
from tessera.router.guidance_compile import Vocabulary, eos_of
from tessera.router.guidance_trial import Trial, TrialLost, Verdict
from tessera.router.tokenizer import Tokenizer
from tests.router.guided_shards import allowed_ids
from tests.router.json_schemas import UNSUPPORTED

T = TypeVar("T")
EOS = 2
SIZE = 1003  # more than the tokenizer has, and no whole number of bytes
INTEGER = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "integer"}')


@pytest.fixture(scope="module")
def vocabulary(checkpoint: Callable[[str], Path]) -> Vocabulary:
    tokenizer = Tokenizer.from_folder(checkpoint("next-mistral"))
    return Vocabulary(tokenizer.definition(), SIZE, (EOS,))


def with_compiler(
    vocabulary: Vocabulary,
    use: Callable[[GuideCompiler], Awaitable[T]],
    timeout_s: float = 10.0,
    max_bytes: int = 200_000,
) -> T:
    async def go() -> T:
        compiler = GuideCompiler(vocabulary, timeout_s, max_bytes)
        try:
            return await asyncio.wait_for(use(compiler), 100)
        finally:
            compiler.close()

    return asyncio.run(go())


def refusal(
    vocabulary: Vocabulary, grammar: Grammar, timeout_s: float = 10.0, max_bytes: int = 200_000
) -> str:
    """What a client is told; afterwards others' grammars must still compile."""

    async def use(compiler: GuideCompiler) -> str:
        with pytest.raises(ValidationError) as refused:
            await compiler.compile(grammar)
        assert refused.value.status == 422 and refused.value.error_type == "validation"
        assert refused.value.param == "grammar"
        await compiler.compile(INTEGER)
        return str(refused.value)

    told = with_compiler(vocabulary, use, timeout_s, max_bytes)
    assert len(told) < 400 and told.isprintable() and "<image-" not in told
    return told


def chain(of: Callable[[str], object], length: int = 3000) -> str:
    """A schema of definitions each of which needs the next."""
    definitions = {f"d{i}": of(f"#/$defs/d{i + 1}") for i in range(length)}
    return json.dumps({"$defs": {**definitions, f"d{length}": {}}, "$ref": "#/$defs/d0"})


def rules(name: str, length: int = 3000) -> str:
    """A Lark grammar of rules, or of terminals, each of which needs the next twice."""
    lines = [f"{name}{i}: {name}{i + 1} {name}{i + 1}" for i in range(length)]
    return "\n".join([f"start: {name}0", *lines, f'{name}{length}: "a"'])


MULTIPLES = {
    "allOf": [
        {"type": "integer", "multipleOf": n, "minimum": -(10**15), "maximum": 10**17}
        for n in (999983, 1000003, 17)
    ]
}
EXPLOSIVE = {
    "references in a row": (GrammarKind.JSON_SCHEMA, chain(lambda d: {"$ref": d})),
    "allOf in a row": (GrammarKind.JSON_SCHEMA, chain(lambda d: {"allOf": [{"$ref": d}]})),
    "arrays in a row": (GrammarKind.JSON_SCHEMA, chain(lambda d: {"items": {"$ref": d}})),
    "huge common multiple": (GrammarKind.JSON_SCHEMA, json.dumps(MULTIPLES)),
    "rules in a row": (GrammarKind.LARK, rules("r")),
    "terminals in a row": (GrammarKind.LARK, rules("T")),
    "intersections": (
        GrammarKind.LARK,
        "start: A\nA: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(40)),
    ),
}


@pytest.mark.parametrize("name", EXPLOSIVE)
def test_what_would_take_the_process_with_it_is_refused(vocabulary: Vocabulary, name: str) -> None:
    told = refusal(vocabulary, Grammar(*EXPLOSIVE[name]), timeout_s=0.5)
    assert re.search("too long|too much memory|Unable to determine|too big|too complex", told)


REFUSED = {
    "30000 brackets": (GrammarKind.REGEX, "(" * 30_000 + "a" + ")" * 30_000, "nested"),
    "19000 levels": (GrammarKind.JSON_SCHEMA, '{"items":' * 19_000 + "{}" + "}" * 19_000, "recurs"),
    "look-ahead": (GrammarKind.REGEX, "(?=a)b", "look-around"),
    "open bracket": (GrammarKind.REGEX, "(a", "unclosed group"),
    "nothing matches": (GrammarKind.REGEX, r"[^\s\S]", "allows no answer"),
    "half a character": (GrammarKind.REGEX, "\ud800", "surrogates"),
    "remote": (GrammarKind.JSON_SCHEMA, '{"$ref": "http://localhost/x"}', "only point into"),
    "a file": (GrammarKind.JSON_SCHEMA, '{"$ref": "file:///etc/passwd"}', "only point into"),
    "endless": (GrammarKind.JSON_SCHEMA, '{"$ref": "#"}', "allows no answer"),
    "no JSON": (GrammarKind.JSON_SCHEMA, "{", "Expecting property name"),
    "no schema": (GrammarKind.JSON_SCHEMA, "[1]", "must be an object"),
    "no type": (GrammarKind.JSON_SCHEMA, '{"type": "foo"}', "Invalid type"),
    "contradiction": (
        GrammarKind.JSON_SCHEMA,
        '{"allOf": [{"type": "string"}, {"type": "integer"}]}',
        "Unsatisfiable",
    ),
    "unknown rule": (GrammarKind.LARK, "start: foo", "unknown name"),
    "unknown token": (GrammarKind.LARK, "start: <foo>", "unknown special token"),
    "no grammar": (GrammarKind.LARK, "", "Empty grammar"),
    "defect of the library": (GrammarKind.LARK, 'start: a "x"\na[lazy]: /.*/', "too complex"),
    "no choice": (GrammarKind.CHOICE, "[]", "at least one"),
    "choice of numbers": (GrammarKind.CHOICE, "[1]", "list of strings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_client_is_told_what_is_wrong(vocabulary: Vocabulary, name: str) -> None:
    kind, source, reason = REFUSED[name]
    told = refusal(vocabulary, Grammar(kind, source))
    assert told.startswith("Input validation error: grammar is not valid: ")
    assert reason in told and "/etc" not in told and "localhost" not in told


@pytest.mark.parametrize("schema", UNSUPPORTED, ids=json.dumps)
def test_keywords_that_cannot_be_kept_are_refused(
    vocabulary: Vocabulary, schema: dict[str, object]
) -> None:
    told = refusal(vocabulary, Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)))
    assert re.search("Unimplemented keys|oneOf|Unknown format", told)


def test_the_length_is_limited_in_bytes(vocabulary: Vocabulary) -> None:
    told = refusal(vocabulary, Grammar(GrammarKind.REGEX, "é" * 51), max_bytes=100)
    assert "102 bytes" in told and "100 (MAX_GRAMMAR_BYTES)" in told


def test_a_slow_grammar_does_not_hold_up_the_event_loop_or_another_grammar(
    vocabulary: Vocabulary,
) -> None:
    slow = Grammar(*EXPLOSIVE["huge common multiple"])

    async def use(compiler: GuideCompiler) -> bool:
        waiting = asyncio.create_task(compiler.compile(slow))
        await asyncio.sleep(0)
        await compiler.compile(INTEGER)  # needs its own process, thread and many turns of the loop
        is_first = not waiting.done()
        with pytest.raises(ValidationError):
            await waiting
        return is_first

    assert with_compiler(vocabulary, use, timeout_s=3)


class SlowTrial:
    """Stands in for `Trial.check`: "slow..." takes as long as the gate is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun: list[str] = []

    def check(self, trial: Trial, grammar: Grammar, timeout_s: float) -> Verdict:
        is_slow = grammar.source.startswith("slow")
        if is_slow and timeout_s <= guidance.QUICK_S:
            return Verdict("it takes too long", timed_out=True)
        self.begun.append(grammar.source)
        if is_slow:
            assert self.gate.wait(10)
        return Verdict(None)


@pytest.fixture
def slow_trial(monkeypatch: pytest.MonkeyPatch) -> SlowTrial:
    slow = SlowTrial()
    check = lambda *args: slow.check(*args)  # noqa: E731
    monkeypatch.setattr(Trial, "check", check)
    return slow


def test_slow_grammars_delay_no_quick_ones_and_keys_take_turns(
    vocabulary: Vocabulary, slow_trial: SlowTrial
) -> None:
    async def use(compiler: GuideCompiler) -> None:
        def ask(source: str, owner: str) -> asyncio.Task[object]:
            return asyncio.create_task(compiler.compile(Grammar(GrammarKind.REGEX, source), owner))

        greedy = [ask(f"slow{n}", "greedy") for n in range(6)]
        while not slow_trial.begun:
            await asyncio.sleep(0.01)
        modest = ask("slow-modest", "modest")
        await asyncio.gather(*(ask(f"quick{n}", "greedy") for n in range(4)), ask("q", "modest"))
        assert not any(task.done() for task in [*greedy, modest])
        while ("modest", 1) not in waiting_slow(compiler):
            await asyncio.sleep(0.01)
        slow_trial.gate.set()
        await asyncio.gather(*greedy, modest)
        begun = [source for source in slow_trial.begun if source.startswith("slow")]
        assert begun[0] == "slow0" and begun.index("slow-modest") <= 2 and len(begun) == 7

    with_compiler(vocabulary, use)


def waiting_slow(compiler: GuideCompiler) -> list[tuple[object, int]]:
    queues = compiler._slow._threads._queues
    return [(owner, len(queue)) for owner, queue in list(queues.items())]


def test_who_waits_too_long_for_a_turn_is_told_so(
    vocabulary: Vocabulary, slow_trial: SlowTrial
) -> None:
    async def use(compiler: GuideCompiler) -> None:
        compiler._slow._patience_s = 0.3
        asked = [
            asyncio.create_task(compiler.compile(Grammar(GrammarKind.REGEX, f"slow{n}")))
            for n in range(2)
        ]
        with pytest.raises(OverloadedError) as refused:
            await asked[1]
        assert refused.value.status == 429
        assert not asked[0].done()  # its turn has come; it is bounded by its own time
        slow_trial.gate.set()
        await asked[0]
        await compiler.compile(Grammar(GrammarKind.REGEX, "slow-again"))

    with_compiler(vocabulary, use)
    assert slow_trial.begun == ["slow0", "slow-again"]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compiled in the router, and with a "?" what is tried before."""
    compiled: list[str] = []
    compile_grammar = guidance.compile_grammar

    def counting(tokenizer: object, grammar: Grammar) -> object:
        compiled.append(grammar.source)
        return compile_grammar(tokenizer, grammar)  # type: ignore[arg-type]

    check = guidance.Trial.check

    def counting_check(self: Trial, grammar: Grammar, timeout_s: float) -> Verdict:
        compiled.append(grammar.source + "?")
        return check(self, grammar, timeout_s)

    monkeypatch.setattr(guidance, "compile_grammar", counting)
    monkeypatch.setattr(guidance.Trial, "check", counting_check)
    return compiled


def compile_all(vocabulary: Vocabulary, *sources: str) -> None:
    async def use(compiler: GuideCompiler) -> None:
        for source in sources:
            await compiler.compile(Grammar(GrammarKind.REGEX, source))

    with_compiler(vocabulary, use)


def test_a_grammar_is_tried_once(
    vocabulary: Vocabulary, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance, "MAX_KNOWN", 2)
    monkeypatch.setattr(guidance, "SLOW_S", 60.0)
    compile_all(vocabulary, *"abaacab")  # c takes the place of b, which was not asked for again
    assert compiled == ["a?", "a", "b?", "b", "a", "a", "c?", "c", "a", "b?", "b"]


def test_what_takes_long_to_compile_is_shared_by_some(
    vocabulary: Vocabulary, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance, "SLOW_S", -1.0)
    monkeypatch.setattr(guidance, "MAX_USES", 3)
    compile_all(vocabulary, *"aaaaaaa")
    assert compiled == ["a?", "a", "a", "a"]


def test_memory_bounds_what_is_kept(
    vocabulary: Vocabulary, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance, "SLOW_S", -1.0)
    monkeypatch.setattr(guidance, "MAX_KEPT_BYTES", 1)
    compile_all(vocabulary, *"aa")
    assert compiled == ["a?", "a"] * 2


def test_a_request_that_exhausts_its_lexer_leaves_the_next_one_its_own(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = LLParserLimits(max_lexer_states=500, verbose_errors=False)
    monkeypatch.setattr(guidance_compile, "_limits", lambda kind, share: limits)
    monkeypatch.setattr(guidance, "SLOW_S", 60.0)
    many_states = Grammar(GrammarKind.REGEX, "(.{1,2000}x){1,5}")

    async def use(compiler: GuideCompiler) -> list[int]:
        return [num_steps((await compiler.compile(many_states)).start()) for _ in range(2)]

    first, second = with_compiler(vocabulary, use)
    assert 1 < first == second < 400


def num_steps(matcher: LLMatcher) -> int:
    """Tokens, chosen by chance, until the matcher gives up."""
    chance = random.Random(0)
    for step in range(400):
        allowed = allowed_ids(matcher.compute_bitmask())
        if matcher.is_error():
            return step
        matcher.consume_token(chance.choice([i for i in allowed if i != EOS]))
    return 400


def test_a_refusal_that_the_clock_made_is_not_remembered(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(trial: Trial, grammar: Grammar, timeout_s: float) -> Verdict:
        return Verdict("it takes too long", timed_out=True, may_change=True)

    async def use(compiler: GuideCompiler) -> None:
        with monkeypatch.context() as busy:
            busy.setattr(Trial, "check", late)
            with pytest.raises(ValidationError, match="it takes too long"):
                await compiler.compile(INTEGER)
        await compiler.compile(INTEGER)

    with_compiler(vocabulary, use)


def all_trials(compiler: GuideCompiler) -> list[Trial]:
    return [*compiler._quick.trials, *compiler._slow.trials]


def test_a_lost_process_is_no_fault_of_the_grammar(vocabulary: Vocabulary) -> None:
    async def use(compiler: GuideCompiler) -> None:
        for source in "abc":
            await compiler.compile(Grammar(GrammarKind.REGEX, source))
            for trial in all_trials(compiler):
                if trial._process is not None:
                    os.kill(trial._process.pid, signal.SIGKILL)
                    trial._process.wait()

    with_compiler(vocabulary, use)


NONSENSE = {
    "no JSON": 'print("Traceback")',
    "cut short": "sys.stdout.write('{\"error\": nu')",
    "not an object": "print([1])",
    "an empty object": 'print("{}")',
    "an unknown field": 'print(\'{"error": null, "verdict": 1}\')',
    "another type": 'print(\'{"error": null, "num_bytes": "many"}\')',
    "without end": 'sys.stdout.write("x" * 10**6)',
    "nothing": "sys.exit(3)",
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_process_that_speaks_nonsense_is_lost_and_replaced(
    vocabulary: Vocabulary, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"import sys; sys.stdin.readline(); sys.stdin.readline(); {NONSENSE[name]}"
    start, popen, num_bad = Trial._start, subprocess.Popen, 0

    def bad_start(self: Trial) -> Any:
        nonlocal num_bad
        num_bad += 1
        bad = lambda command, **options: popen([sys.executable, "-c", program], **options)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", bad)
            return start(self)

    async def use(compiler: GuideCompiler) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Trial, "_start", bad_start)
            with pytest.raises(OverloadedError) as refused:
                await compiler.compile(INTEGER)
            assert refused.value.status == 429 and "lost twice" in str(refused.value)
        await compiler.compile(INTEGER)

    with_compiler(vocabulary, use)
    assert num_bad == 2


def test_no_request_waits_for_the_tokenizer_to_be_read(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(compiler: GuideCompiler) -> None:
        monkeypatch.setattr(Vocabulary, "load", None)  # it would hold up the event loop
        await compiler.compile(INTEGER)

    with_compiler(vocabulary, use)


def test_a_process_that_stops_reading_is_lost(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guidance_trial, "START_S", 0.2)
    trial = Trial(vocabulary)
    process = trial._process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    with pytest.raises(TrialLost):
        trial.check(Grammar(GrammarKind.REGEX, "a" * 200_000), 0.1)
    assert process.wait(10) == -signal.SIGKILL
    trial.close()
    with pytest.raises(TrialLost):
        trial.check(INTEGER, 0.1)


def test_a_mask_covers_the_models_vocabulary(vocabulary: Vocabulary) -> None:
    async def use(compiler: GuideCompiler) -> tuple[bytes, int]:
        guide = await compiler.compile(Grammar(GrammarKind.REGEX, r"(?s).*"))
        return guide.start().compute_bitmask(), guide.mask_bytes

    mask, mask_bytes = with_compiler(vocabulary, use)
    assert len(mask) == mask_bytes == 128
    allowed = allowed_ids(mask)
    tokenizer_size = len(json.loads(vocabulary.definition)["model"]["vocab"])
    assert EOS in allowed and len(allowed) > 500
    assert max(allowed) < tokenizer_size  # padding is never sampled
    assert eos_of({5, 2, SIZE}, SIZE) == (2, 5)


def test_every_end_of_text_token_may_end_an_answer(vocabulary: Vocabulary) -> None:
    two = Vocabulary(vocabulary.definition, SIZE, (2, 5))

    async def use(compiler: GuideCompiler) -> list[int]:
        matcher = (await compiler.compile(Grammar(GrammarKind.REGEX, "a"))).start()
        (start,) = allowed_ids(matcher.compute_bitmask())
        assert matcher.consume_token(start)
        return allowed_ids(matcher.compute_bitmask())

    assert with_compiler(two, use) == [2, 5]

"""Guided requests in the loop: valid answers, under every interleaving, and nobody else disturbed.

The shards sample by chance among what the masks allow, so an answer is valid only by its masks.
"""

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLExecutor, LLParserLimits

from tessera.router import guidance_compile, guidance_masks
from tessera.router.blocks import BlockPool
from tessera.router.core import Core
from tessera.router.errors import GenerationError
from tessera.router.generation import ServingLimits
from tessera.router.grammar import Grammar, GrammarKind
from tessera.router.guidance_compile import Guide
from tessera.router.metrics import Metrics
from tessera.router.request import FinishReason
from tessera.router.scheduler import SchedulerLimits
from tests.router.guided_shards import (
    EOS,
    SOON_S,
    GuidedShards,
    Guides,
    events_of,
    guided_request,
)
from tests.router.json_schemas import supported

T = TypeVar("T")
PROMPT = 400


@pytest.fixture(scope="module")
def guides(checkpoint: Callable[[str], Path]) -> Guides:
    return Guides(checkpoint("llama"))


def with_core(
    guides: Guides,
    make_shards: Callable[[], GuidedShards],
    use: Callable[[Core], Awaitable[T]],
    lookahead: int = 1,
    num_blocks: int = 400,
) -> T:
    """Run `use`; afterwards every block and every sequence must be given back."""

    async def go() -> T:
        shards = make_shards()
        eos = frozenset({EOS})
        core = Core(shards, guides.tokenizer, eos, Metrics(), lookahead)  # type: ignore[arg-type]
        pool = BlockPool(num_blocks, 4)
        core.open(ServingLimits(99, 999, 16, 999, 4), SchedulerLimits(16, 4, 2, 0.5, 4), pool)
        running = asyncio.create_task(core.run())
        try:
            got = await asyncio.wait_for(use(core), 100)
            for _ in range(200):  # what is under way comes back
                await asyncio.sleep(0)
                if shards.num_live == 0 and pool.num_free == num_blocks:
                    break
            assert not core._masks._guided
            assert pool.num_free == num_blocks
            return got
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return asyncio.run(go())


def answers(
    guides: Guides, grammars: Sequence[Grammar], max_new_tokens: int = 150
) -> list[tuple[str, FinishReason]]:
    """One answer for each grammar, all at the same time."""

    async def one(core: Core, index: int, guide: Guide) -> tuple[str, FinishReason]:
        stream = core.submit(guided_request((PROMPT, PROMPT + index), guide, max_new_tokens))
        async for event in events_of(stream):
            if event.completion is not None:
                return event.completion.text, event.completion.reason
        raise AssertionError("no completion")

    async def use(core: Core) -> list[tuple[str, FinishReason]]:
        compiled = [guides.compile(grammar) for grammar in grammars]
        return list(await asyncio.gather(*(one(core, i, g) for i, g in enumerate(compiled))))

    closing = guides.closing_ids()
    return with_core(guides, lambda: GuidedShards(closing), use)


def json_grammar(schema: dict[str, Any]) -> Grammar:
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def test_answers_to_two_hundred_schemas_are_valid(guides: Guides) -> None:
    schemas = supported()
    assert len(schemas) >= 200
    got = answers(guides, [json_grammar(schema) for schema in schemas])
    num_complete = 0
    for schema, (text, reason) in zip(schemas, got, strict=True):
        if reason is FinishReason.EOS:
            num_complete += 1
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.validate(json.loads(text), schema, format_checker=checker)
    assert num_complete >= 0.9 * len(schemas)


@pytest.mark.parametrize(
    "pattern", ["[0-9]{3}-[0-9]{2}", "(yes|no)", "a{1,5}b?", "[^a-z]{4}", "x|", "é+日{2}"]
)
def test_answers_match_a_regex_as_a_whole(guides: Guides, pattern: str) -> None:
    [(text, reason)] = answers(guides, [Grammar(GrammarKind.REGEX, pattern)])
    assert reason is FinishReason.EOS or len(text) > 50
    assert reason is not FinishReason.EOS or re.fullmatch(pattern, text)


def test_an_answer_is_one_of_the_choices(guides: Guides) -> None:
    choices = ["red", "green", 'a "quoted" one', "日本", "line\nbreak", "red light"]
    got = answers(guides, [Grammar(GrammarKind.CHOICE, json.dumps(choices))] * 20)
    assert {text for text, _ in got} <= set(choices)
    assert len({text for text, _ in got}) > 2
    assert {reason for _, reason in got} == {FinishReason.EOS}


def test_an_answer_follows_a_lark_grammar_with_json_inside(guides: Guides) -> None:
    source = 'start: "<call>" %json {"type":"integer","minimum":0,"maximum":99} "</call>"'
    [(text, _)] = answers(guides, [Grammar(GrammarKind.LARK, source)])
    assert re.fullmatch(r"<call>\d{1,2}</call>", text)


def test_masks_take_no_more_threads_than_cpus_may_be_used(
    guides: Guides, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def executor(num_threads: int) -> LLExecutor:
        asked.append(num_threads)
        return LLExecutor(num_threads)

    monkeypatch.setattr(guidance_masks, "LLExecutor", executor)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3}, raising=False)
    answers(guides, [Grammar(GrammarKind.REGEX, "[0-9]{3}")])
    assert asked == [1]


@pytest.mark.parametrize("token", ["<s>", "<[1]>"])
def test_a_lark_grammar_can_ask_for_a_special_token(guides: Guides, token: str) -> None:
    compiled = [guides.compile(Grammar(GrammarKind.LARK, f'start: {token} "x"'))]
    client = Client((PROMPT, 500), 0, 9, False, None, None, 0)
    [(ids, reason)] = serve(guides, compiled, [client], 1, 0, 24)
    assert ids[0] == 1 and ids[-1] == EOS and reason == "eos_token"
    assert guides.tokenizer.decode(ids) == "x"


def test_any_json_object(guides: Guides) -> None:
    got = answers(guides, [json_grammar({"type": "object"})] * 20)
    objects = [json.loads(text) for text, reason in got if reason is FinishReason.EOS]
    assert len(objects) > 10
    assert all(isinstance(value, dict) for value in objects)


def test_json_has_no_room_for_endless_blanks(guides: Guides) -> None:
    """A model that prefers blanks to anything else comes to an end all the same."""
    blanks = frozenset(
        i for i in range(guides.tokenizer.vocab_size) if guides.tokenizer.token_text(i).isspace()
    )

    async def use(core: Core) -> FinishReason:
        guide = guides.compile(
            json_grammar({"type": "array", "items": {"const": 1}, "maxItems": 2})
        )
        async for event in events_of(core.submit(guided_request((PROMPT,), guide, 300))):
            if event.completion is not None:
                return event.completion.reason
        raise AssertionError("no completion")

    assert blanks
    shards = lambda: GuidedShards(blanks)  # noqa: E731
    assert with_core(guides, shards, use) is FinishReason.EOS


@dataclass(frozen=True)
class Client:
    """One request and what its client does."""

    prompt: tuple[int, ...]
    grammar: int | None  # index into `all_guides`
    max_new_tokens: int
    has_stop: bool
    fails_at: int | None  # its sequence fails at this generated token
    leaves_after: int | None  # the client closes after reading so many
    arrives_at: int  # turns of the event loop before it asks


GRAMMARS = (
    Grammar(GrammarKind.REGEX, "[a-d]{0,12}"),
    Grammar(GrammarKind.REGEX, "abc"),
    json_grammar({"type": "array", "items": {"enum": ["a", 1]}, "maxItems": 3}),
)
Outcome = tuple[list[int], str]


def all_guides(guides: Guides) -> list[Guide]:
    """Those of GRAMMARS, and once more as if each of their masks took long."""
    return [
        guides.compile(grammar, is_slow=is_slow)
        for is_slow in (False, True)
        for grammar in GRAMMARS
    ]


@st.composite
def clients_strategy(draw: st.DrawFn) -> list[Client]:
    maybe = st.none() | st.integers(1, 12)
    return [
        Client(
            prompt=(PROMPT,) * draw(st.integers(0, 20)) + (500 + number,),
            grammar=draw(st.none() | st.integers(0, 2 * len(GRAMMARS) - 1)),
            max_new_tokens=draw(st.integers(1, 16)),
            has_stop=draw(st.booleans()),
            fails_at=draw(maybe),
            leaves_after=draw(maybe),
            arrives_at=draw(st.integers(0, 40)),
        )
        for number in range(draw(st.integers(1, 7)))
    ]


async def read(core: Core, client: Client, compiled: Sequence[Guide]) -> Outcome:
    for _ in range(client.arrives_at):
        await asyncio.sleep(0)
    guide = None if client.grammar is None else compiled[client.grammar]
    stop = ("b",) if client.has_stop else ()
    stream = core.submit(guided_request(client.prompt, guide, client.max_new_tokens, stop))
    ids: list[int] = []
    try:
        async for event in events_of(stream):
            ids.append(event.token.id)
            if event.completion is not None:
                return ids, event.completion.reason.value
            if len(ids) == client.leaves_after:
                return ids, "left"
    except GenerationError:
        return ids, "failed"
    finally:
        stream.close()
    raise AssertionError("the stream ended without a word")


def serve(
    guides: Guides,
    compiled: Sequence[Guide],
    clients: Sequence[Client],
    lookahead: int,
    delay: int,
    num_blocks: int,
) -> list[Outcome]:
    fails = {client.prompt: client.fails_at for client in clients if client.fails_at}

    async def use(core: Core) -> list[Outcome]:
        return list(await asyncio.gather(*(read(core, client, compiled) for client in clients)))

    make = lambda: GuidedShards(delay=delay, fails_at=fails)  # noqa: E731
    return with_core(guides, make, use, lookahead, num_blocks)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    clients=clients_strategy(),
    lookahead=st.integers(0, 2),
    delay=st.integers(0, 3),
    num_blocks=st.integers(10, 24),
)
def test_everybody_reads_what_they_would_read_alone(
    guides: Guides, clients: list[Client], lookahead: int, delay: int, num_blocks: int
) -> None:
    compiled = all_guides(guides)
    alone = [serve(guides, compiled, [client], 0, 0, 24)[0] for client in clients]
    assert serve(guides, compiled, clients, lookahead, delay, num_blocks) == alone


def test_neighbours_of_guided_requests_read_what_they_always_do(guides: Guides) -> None:
    plain = [Client((PROMPT, 500 + n), None, 12, False, None, None, n) for n in range(3)]
    guided = [Client((PROMPT, 600 + n), n, 12, False, None, None, 0) for n in range(3)]
    compiled = all_guides(guides)
    alone = serve(guides, compiled, plain, 1, 1, 100)
    assert serve(guides, compiled, [*plain, *guided], 1, 1, 100)[:3] == alone
    assert all(len(ids) > 1 for ids, _ in alone)


def test_a_slow_guide_says_the_same_whatever_else_is_going_on(guides: Guides) -> None:
    clients = [Client((PROMPT, 500 + n), n, 12, False, None, None, n) for n in range(6)]
    quick = serve(guides, all_guides(guides)[:3] * 2, clients, 1, 1, 100)
    assert serve(guides, all_guides(guides), clients, 1, 1, 100) == quick


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_nobody_waits_for_a_slow_mask(
    guides: Guides, monkeypatch: pytest.MonkeyPatch, lookahead: int
) -> None:
    gate, timed_mask = threading.Event(), guidance_masks._timed_mask

    def waiting(*job: Any) -> tuple[bytes | None, float]:
        assert gate.wait(SOON_S)
        return timed_mask(*job)

    monkeypatch.setattr(guidance_masks, "_timed_mask", waiting)
    letters = guides.compile(Grammar(GrammarKind.REGEX, "[a-d]{60}"), is_slow=True)
    others = [Client((PROMPT, 600 + n), n or None, 30, False, None, None, 0) for n in range(3)]
    compiled = all_guides(guides)

    async def use(core: Core) -> list[Outcome]:
        stream = core.submit(guided_request((PROMPT, 500), letters, 80))
        gate.set()
        events = await stream.next_events()
        gate.clear()
        outcomes = await asyncio.gather(*(read(core, client, compiled) for client in others))
        assert len(events) < 5
        gate.set()
        async for event in events_of(stream):
            events.append(event)
        assert re.fullmatch("[a-d]{60}", "".join(event.text for event in events))
        return list(outcomes)

    alone = [serve(guides, compiled, [client], 0, 0, 100)[0] for client in others]
    assert with_core(guides, GuidedShards, use, lookahead) == alone


def test_what_turns_slow_goes_on_as_slow(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [Client((PROMPT, 500 + n), n, 12, False, None, None, n) for n in range(3)]
    expected = serve(guides, all_guides(guides), clients, 1, 1, 100)
    timed_mask, num_alone = guidance_masks._timed_mask, 0

    def slower(*job: Any) -> tuple[bytes | None, float]:
        nonlocal num_alone
        num_alone += 1
        return timed_mask(*job)[0], 2 * guidance_masks.SLOW_S

    monkeypatch.setattr(guidance_masks, "SUSPECT_S", -1.0)
    monkeypatch.setattr(guidance_masks, "_timed_mask", slower)
    assert serve(guides, all_guides(guides), clients, 1, 1, 100) == expected
    assert num_alone > 3


def test_what_takes_far_too_long_ends_alone_and_the_log_tells_its_hash(
    guides: Guides, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    timed_mask = guidance_masks._timed_mask
    monkeypatch.setattr(guidance_masks, "_timed_mask", lambda *job: (timed_mask(*job)[0], 1.0))
    slow, other = (Client((PROMPT, 500 + n), n, 12, False, None, None, 0) for n in (3, 0))
    outcomes = serve(guides, all_guides(guides), [slow, other], 1, 1, 100)
    assert [reason for _, reason in outcomes] == ["failed", "eos_token"]
    assert len(outcomes[0][0]) == 2  # seconds that are too many
    assert f"grammar {GRAMMARS[0].digest} failed in an answer: it takes too long" in caplog.text
    assert GRAMMARS[0].source not in caplog.text


def test_a_guide_that_runs_out_of_states_ends_its_request_alone(
    guides: Guides, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    many = Grammar(GrammarKind.REGEX, "(.*a.{25}|.*b.{30}|.*c.{35})")
    limits = LLParserLimits(max_lexer_states=300, verbose_errors=False)
    monkeypatch.setattr(guidance_compile, "_limits", lambda kind, share: limits)
    compiled = [guides.compile(many), guides.compile(GRAMMARS[0])]
    clients = [Client((PROMPT, 500 + n), n, 99, False, None, None, 0) for n in range(2)]
    outcomes = serve(guides, compiled, clients, 1, 1, 100)
    assert [reason for _, reason in outcomes] == ["failed", "eos_token"]
    assert f"grammar {many.digest} failed in an answer: its expressions" in caplog.text
    assert many.source not in caplog.text


def test_a_matcher_that_fails_ends_its_request_alone(
    guides: Guides,
) -> None:
    """The shards sample a token that the grammar forbids: a defect, which must stay small."""

    class Disobedient(GuidedShards):
        def _choose(self, tokens: list[int], mask: bytes) -> int:
            token_id = super()._choose(tokens, mask)
            return 310 if tokens[:2] == [PROMPT, 500] else token_id

    compiled = all_guides(guides)
    bad, good = (Client((PROMPT, n), 1, 12, False, None, None, 0) for n in (500, 501))

    async def use(core: Core) -> list[Outcome]:
        return list(await asyncio.gather(*(read(core, c, compiled) for c in (bad, good))))

    [(_, bad_reason), (_, good_reason)] = with_core(guides, Disobedient, use)
    assert (bad_reason, good_reason) == ("failed", "eos_token")

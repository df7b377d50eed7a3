"""Guided requests through the whole stack: two shards, a step ahead, too little memory for all."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import jsonschema
import pytest

from tests.end_to_end.asking import Body, ask, question
from tests.end_to_end.stack import Stack, running
from tests.router.json_schemas import Schema, supported

pytestmark = pytest.mark.timeout(300)

ANY_OBJECT = {"type": "json", "value": {"type": "object"}}


@pytest.fixture(scope="module")
def stack(checkpoint: Callable[[str], Path]) -> Iterator[Stack]:
    flags = ["--num-shard", "2", "--max-total-tokens", "240", "--max-batch-total-tokens", "640"]
    with running(checkpoint("next-mistral"), *flags, GRAMMAR_TIMEOUT="1") as running_stack:
        yield running_stack


def post_all(stack: Stack, bodies: list[Body]) -> list[httpx.Response]:
    async def go() -> list[httpx.Response]:
        async with stack.client() as client:
            return await asyncio.gather(*(client.post("/generate", json=b) for b in bodies))

    return asyncio.run(go())


def guided(seed: int, grammar: Body, max_new_tokens: int = 120, **parameters: object) -> Body:
    chance = {"temperature": 1.0, "seed": seed} | parameters
    return ask(question(seed), max_new_tokens, grammar=grammar, details=True, **chance)


def test_answers_are_valid_whatever_the_scheduler_does(stack: Stack) -> None:
    schemas: list[Schema] = supported()[::2]
    grammars = [{"type": "json", "value": schema} for schema in schemas]
    replies = post_all(stack, [guided(n, grammar) for n, grammar in enumerate(grammars)])
    num_complete = 0
    for schema, reply in zip(schemas, replies, strict=True):
        assert reply.status_code == 200, reply.text
        answer = reply.json()
        if answer["details"]["finish_reason"] == "eos_token":
            num_complete += 1
            jsonschema.validate(json.loads(answer["generated_text"]), schema)
    assert num_complete > len(schemas) / 2
    assert stack.metric("tessera_num_preemptions_total") > 0


def test_a_regex_holds_with_penalties_and_biases(stack: Stack) -> None:
    grammar = {"type": "regex", "value": "[a-f]{3}-[0-9]{2}"}
    options: list[Body] = [
        {},
        {"top_k": 1},
        {"top_p": 0.5, "repetition_penalty": 5.0},
        {"typical_p": 0.5, "frequency_penalty": 2.0},
    ]
    for reply in post_all(stack, [guided(7, grammar, 60, **extra) for extra in options]):
        assert re.fullmatch("[a-f]{3}-[0-9]{2}", reply.json()["generated_text"])


def test_hostile_grammars_are_refused_while_neighbours_go_on(stack: Stack) -> None:
    chain = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(2000)}
    multiples = [
        {"type": "integer", "multipleOf": n, "minimum": -(10**15), "maximum": 10**17}
        for n in (999983, 1000003, 17)
    ]
    hostile = [
        {"type": "json", "value": {"$defs": chain | {"d2000": {}}, "$ref": "#/$defs/d0"}},
        {"type": "json", "value": {"allOf": multiples}},
        {"type": "json", "value": {"$ref": "http://127.0.0.1:1/schema"}},
        {"type": "regex", "value": "(" * 30_000 + "a" + ")" * 30_000},
        {"type": "regex", "value": "(?=a)b"},
        {"type": "json", "value": {"properties": {f"p{i}": {} for i in range(3000)}}},
    ]
    plain = ask(question(99), 40)
    [before] = post_all(stack, [plain])
    replies = post_all(stack, [plain, *(guided(1, g) for g in hostile), guided(2, ANY_OBJECT)])
    assert replies[0].json() == before.json()
    for reply in replies[1:-1]:
        assert reply.status_code == 422, reply.text
        assert reply.json()["error_type"] == "validation"
        assert "grammar is not valid" in reply.json()["error"]
    assert replies[-1].status_code == 200


def test_answers_to_a_union_of_hundreds_of_objects(stack: Stack) -> None:
    kinds = [
        {
            "type": "object",
            "properties": {"a": {"type": "boolean"}, "kind": {"const": f"k{i}"}},
            "required": ["a", "kind"],
            "additionalProperties": False,
        }
        for i in range(400)
    ]
    for schema in ({"anyOf": kinds}, {"enum": [{"id": i} for i in range(900)]}):
        replies = post_all(stack, [guided(n, {"type": "json", "value": schema}) for n in range(3)])
        for reply in replies:
            assert reply.status_code == 200, reply.text
            assert reply.json()["details"]["finish_reason"] == "eos_token"
            jsonschema.validate(json.loads(reply.json()["generated_text"]), schema)


def test_answers_whose_masks_take_long_are_valid_too(stack: Stack) -> None:
    names = [f"p{i}" for i in range(700)]
    slow = {"type": "object", "properties": {name: {"type": "null"} for name in names}}
    slow |= {"additionalProperties": False}
    plain = ask(question(400), 60)
    [before] = post_all(stack, [plain])
    bodies = [guided(n, {"type": "json", "value": slow}) for n in range(6)]
    *replies, after = post_all(stack, [*bodies, plain])
    assert after.json() == before.json()
    for reply in replies:
        assert reply.status_code == 200, reply.text
        if reply.json()["details"]["finish_reason"] == "eos_token":
            jsonschema.validate(json.loads(reply.json()["generated_text"]), slow)


def test_neighbours_of_guided_requests_answer_as_they_do_alone(stack: Stack) -> None:
    plain = [ask(question(n), 40, temperature=1.0, seed=n) for n in range(200, 204)]
    alone = [post_all(stack, [body])[0].json()["generated_text"] for body in plain]
    company = [guided(n, ANY_OBJECT) for n in range(300, 306)]
    replies = post_all(stack, plain + company)
    assert [reply.json()["generated_text"] for reply in replies[:4]] == alone
    assert all(reply.json()["generated_text"].startswith("{") for reply in replies[4:])


def test_a_client_that_leaves_an_answer_leaves_nothing_behind(stack: Stack) -> None:
    async def go() -> None:
        async with stack.client() as client:
            body = guided(1, {"type": "regex", "value": "[a-z ]*!"}, 180)
            async with client.stream("POST", "/generate_stream", json=body) as reply:
                async for line in reply.aiter_lines():
                    if line.startswith("data:"):
                        return

    asyncio.run(go())
    stack.wait_metric("tgi_batch_current_size", 0)
    stack.wait_metric("tgi_batch_current_max_tokens", 0)
    assert stack.generate("after", max_new_tokens=3)

"""Function calls with OpenAI's client on the demo model, which has never seen a tool.

What it calls and with which values is therefore beside the point; that it calls, and how, is not.
"""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion

from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

COUNT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square"]},
        "most": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["shape", "most"],
}
LOOK: dict[str, Any] = {"type": "object", "properties": {"closely": {"type": "boolean"}}}
SCHEMAS = {"count": COUNT, "look": LOOK}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
QUESTION = {"role": "user", "content": "How many circles are there?"}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running(None, "--num-shard", "2") as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> OpenAI:
    return OpenAI(base_url=f"{stack.url}/v1", api_key="-", max_retries=0, timeout=120)


def asked(**fields: Any) -> dict[str, Any]:
    told = {"messages": [QUESTION], "tools": TOOLS, "max_tokens": 900, "temperature": 0}
    return {"model": "default", **told, **fields}


def checked_calls(reply: ChatCompletion) -> list[Any]:
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    calls = choice.message.tool_calls or []
    assert calls
    for call in calls:
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return list(calls)


def test_required(client: OpenAI) -> None:
    single = asked(tool_choice="required", parallel_tool_calls=False)
    assert len(checked_calls(client.chat.completions.create(**single))) == 1


@pytest.mark.parametrize("seed", range(3))
def test_any_sampling_gives_valid_calls(client: OpenAI, seed: int) -> None:
    noise = {"temperature": 2.0, "seed": seed, "parallel_tool_calls": False}
    checked_calls(client.chat.completions.create(**asked(tool_choice="required", **noise)))


@pytest.mark.parametrize("name", SCHEMAS)
def test_named(client: OpenAI, name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    reply = client.chat.completions.create(**asked(tool_choice=choice, parallel_tool_calls=False))
    assert [call.function.name for call in checked_calls(reply)] == [name]


def test_a_stream_says_the_same(client: OpenAI) -> None:
    fields = asked(tool_choice="required", parallel_tool_calls=False)
    whole = client.chat.completions.create(**fields)
    with client.chat.completions.stream(**fields) as stream:
        final = stream.get_final_completion()
    (said,), (streamed,) = checked_calls(whole), final.choices[0].message.tool_calls or []
    assert streamed.function.name == said.function.name
    assert streamed.function.arguments == said.function.arguments
    assert final.choices[0].finish_reason == "tool_calls"


def test_none_and_auto_may_answer_in_words(client: OpenAI) -> None:
    plain = client.chat.completions.create(**{**asked(), "tools": []})
    none = client.chat.completions.create(**asked(tool_choice="none"))
    assert none.choices[0].message.content == plain.choices[0].message.content
    auto = client.chat.completions.create(**asked())
    message = auto.choices[0].message
    assert message.tool_calls or message.content


def test_the_next_turn_tells_what_a_call_returned(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        **asked(tool_choice="required", parallel_tool_calls=False)
    )
    (call,) = checked_calls(reply)
    result = {"role": "tool", "tool_call_id": call.id, "content": "7"}
    turns = [QUESTION, reply.choices[0].message, result]
    answer = client.chat.completions.create(**asked(messages=turns, max_tokens=20))
    assert answer.choices[0].message.content
    before, now = reply.usage, answer.usage
    assert before is not None and now is not None
    assert now.prompt_tokens > before.prompt_tokens


def test_a_call_that_is_cut_short(client: OpenAI) -> None:
    fields = asked(tool_choice="count", max_tokens=900)
    whole = client.chat.completions.create(**fields, parallel_tool_calls=False)
    assert whole.usage is not None
    cut = client.chat.completions.create(
        **{**fields, "max_tokens": whole.usage.completion_tokens - 12}
    )
    choice = cut.choices[0]
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls or []
    (full,) = checked_calls(whole)
    assert full.function.arguments.startswith(call.function.arguments)

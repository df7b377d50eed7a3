"""Function calls over HTTP; the generator says what a model under the grammar could."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette

from tessera.router.request import FinishReason
from tests.router.http_fakes import LIMITS, FakeGenerator, Script, events, post, served
from tests.router.tool_samples import STOP, TOOLS, WEATHER

App = Callable[..., Starlette]
CHAT = "/v1/chat/completions"
ULM = '{"city": "Ulm", "days": 3}'
ONE = ("I look. ", "<tool", '_call>\n{"name": "get_wea', 'ther", "arguments": {"city"')
ONE += (': "Ulm", "days"', ": 3}", "}\n</tool_call>")
TWO = (*ONE, '\n<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>')
SMALL = [WEATHER, STOP]


def body(**fields: Any) -> dict[str, Any]:
    question = {"role": "user", "content": "Sun?"}
    return {"messages": [question], "max_tokens": 8, "tools": SMALL, **fields}


def says(*texts: str, reason: FinishReason = FinishReason.EOS) -> FakeGenerator:
    end = ("</s>",) if reason is FinishReason.EOS else ()
    script = Script(texts=(*texts, *end), reason=reason)
    return FakeGenerator(script, replace(LIMITS, max_input_tokens=4000, max_total_tokens=4096))


def streamed(app: Starlette, **fields: Any) -> list[dict[str, Any]]:
    chunks = events(post(app, CHAT, body(stream=True, **fields)))
    return [chunk["choices"][0] for chunk in chunks]


def test_calls(vision_app: App) -> None:
    reply = post(vision_app(says(*TWO)), CHAT, body()).json()
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["role"], message["content"]) == ("assistant", "I look.")
    first, second = message["tool_calls"]
    assert first["id"].startswith("call_") and first["id"] != second["id"]
    assert first["type"] == "function"
    assert first["function"] == {"name": "get_weather", "arguments": ULM}
    assert second["function"] == {"name": "stop", "arguments": "{}"}


def test_calls_alone_have_no_content(vision_app: App) -> None:
    reply = post(vision_app(says(*ONE[1:])), CHAT, body()).json()
    message = reply["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1


def test_words_instead_of_calls(vision_app: App) -> None:
    choice = post(vision_app(says("No", " need ")), CHAT, body()).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "No need ", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_streamed_calls(vision_app: App) -> None:
    choices = streamed(vision_app(says(*TWO)))
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1] == {"content": "I look."}
    calls = [delta["tool_calls"][0] for delta in deltas[2:-1]]
    assert calls[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert calls[0]["id"] and calls[0]["type"] == "function"
    pieces = [call["function"]["arguments"] for call in calls if call["index"] == 0]
    assert "".join(pieces) == ULM and len(pieces) > 3
    assert [call["function"].get("name") for call in calls if call["index"] == 1] == ["stop", None]
    assert deltas[-1] == {} and choices[-1]["finish_reason"] == "tool_calls"


def test_a_call_cut_by_max_tokens(vision_app: App) -> None:
    generator = says(*ONE[:-2], reason=FinishReason.LENGTH)
    choice = post(vision_app(generator), CHAT, body()).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "Ulm", "days"'
    assert streamed(vision_app(generator))[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("num_texts", range(5))
@pytest.mark.parametrize("choice", ["auto", "required", "get_weather"])
def test_a_call_cut_before_it_is_one(vision_app: App, num_texts: int, choice: str) -> None:
    generator = says("", *ONE[1 : num_texts + 1], reason=FinishReason.LENGTH)
    (reply,) = post(vision_app(generator), CHAT, body(tool_choice=choice)).json()["choices"]
    message, has_begun = reply["message"], num_texts >= 3
    assert reply["finish_reason"] == "length"
    assert message["content"] == ("" if choice == "auto" and not has_begun else None)
    assert ("tool_calls" in message) == has_begun
    choices = streamed(vision_app(generator), tool_choice=choice)
    assert choices[-1]["finish_reason"] == "length"
    assert not any(choice["delta"].get("content") for choice in choices)


def test_a_call_cut_by_a_stop_string(vision_app: App) -> None:
    generator = says(*ONE[:-2], reason=FinishReason.STOP)
    choice = post(vision_app(generator), CHAT, body(stop="3")).json()["choices"][0]
    assert choice["finish_reason"] == "stop"


def test_every_answer_is_read_by_itself(vision_app: App) -> None:
    choices = streamed(vision_app(says(*TWO)), n=2)
    for index in (0, 1):
        deltas = [choice["delta"] for choice in choices if choice["index"] == index]
        calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert {call["index"] for call in calls} == {0, 1}


def test_logprobs_of_all_tokens(vision_app: App) -> None:
    choices = streamed(vision_app(says(*TWO)), logprobs=True)
    tokens = [choice["logprobs"]["content"][0]["token"] for choice in choices if choice["logprobs"]]
    assert tokens == list(TWO)


def test_the_model_is_told_and_held_to_it(vision_app: App) -> None:
    generator = says("x")
    for choice in ("auto", "required", "none", "stop"):
        assert post(vision_app(generator), CHAT, body(tool_choice=choice)).status_code == 200
    auto, required, none, named = generator.requests
    assert auto.guide and required.guide and named.guide and none.guide is None
    for request in (auto, required, named):
        assert '"name": "get_weather"' in request.prompt_text
    assert "get_weather" not in none.prompt_text


def test_refusals(vision_app: App) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "strnig"}}}
    for fields, message in [
        ({"tool_choice": "other"}, "Tool with name other not found"),
        ({"tools": [{"function": {"name": "f", "parameters": bad}}]}, "grammar is not valid"),
        ({"response_format": {"type": "regex", "value": "a"}}, "`response_format`"),
    ]:
        reply = post(vision_app(), CHAT, body(**fields))
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (422, "tool_error")
        assert error["message"].startswith("Tool error: ") and message in error["message"]


def test_openai_client(vision_app: App) -> None:
    with served(vision_app(says(*TWO))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        messages: list[Any] = [{"role": "user", "content": "Sun?"}]
        asked: dict[str, Any] = {"model": "m", "max_tokens": 8, "tools": TOOLS}
        reply = client.chat.completions.create(messages=messages, **asked)
        message = reply.choices[0].message
        assert message.tool_calls is not None and len(message.tool_calls) == 2
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "rain"}
            for call in message.tool_calls
        ]
        turn = [*messages, message, *results]
        assert client.chat.completions.create(messages=turn, **asked).choices
        with client.chat.completions.stream(messages=messages, **asked) as stream:
            final = stream.get_final_completion().choices[0]
    calls = final.message.tool_calls or []
    assert [call.function.arguments for call in calls] == [ULM, "{}"]
    assert final.finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_huggingface_client(vision_app: App, stream: bool) -> None:
    with served(vision_app(says(*ONE))) as address:
        client = InferenceClient(address)
        messages: list[Any] = [{"role": "user", "content": "Sun?"}]
        tools: Any = SMALL
        asked: Any = {"tools": tools, "tool_choice": "auto", "tool_prompt": "Mind."}
        reply = client.chat_completion(messages, max_tokens=8, stream=stream, **asked)
        if stream:
            deltas = [chunk.choices[0].delta for chunk in reply]
            calls = [call for delta in deltas for call in delta.tool_calls or []]
            arguments = "".join(call.function.arguments or "" for call in calls)
        else:
            (call,) = reply.choices[0].message.tool_calls
            assert call.function.name == "get_weather"
            arguments = call.function.arguments
    assert json.loads(arguments) == json.loads(ULM)


names = st.sampled_from(["a", "ü", "", '"', "\n", "</tool_call>", "%json", "x-guidance", "$ref"])
leaves = st.none() | st.booleans() | st.integers(-2, 2) | names | st.sampled_from(["#", "object"])
keywords = st.sampled_from(
    ["type", "properties", "required", "enum", "const", "anyOf", "$ref", "pattern", "x-guidance"]
)
schemas = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keywords | names, inner),
    max_leaves=8,
)


def test_any_schema_is_enforced_or_refused(vision_app: App) -> None:
    generator = says("x")
    app = vision_app(generator)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.dictionaries(keywords, schemas, max_size=4), st.booleans())
    def check(parameters: Any, strict: bool) -> None:
        function = {"name": "f", "parameters": parameters, "strict": strict}
        reply = post(app, CHAT, body(tools=[{"function": function}]))
        assert reply.status_code in (200, 422), (parameters, reply.text)
        if reply.status_code == 422:
            assert reply.json()["error"]["code"] == "tool_error"
            assert len(reply.content) < 2000
        assert generator.all_closed

    check()

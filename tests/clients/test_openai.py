"""OpenAI's client, of three major versions."""

import pytest

from tests.clients.conftest import Report, Reports
from tests.clients.expectations import is_blue, is_star, is_three

pytestmark = pytest.mark.timeout(600)  # the first run installs the clients

API = "chat.completions.create"


@pytest.fixture(params=["main", "hub-1", "hub-0.36"])
def sdk(request: pytest.FixtureRequest, reports: Reports) -> Report:
    return reports(request.param, "openai_sdk")


def test_everything_works(sdk: Report) -> None:
    assert sdk.working == list(sdk.features), sdk.features


def test_models(sdk: Report) -> None:
    assert len(sdk["models.list"]) == 1 and sdk["models.retrieve"] == "model"
    assert sdk["errors: unknown model"]["type"] == "NotFoundError"


def test_chat(sdk: Report) -> None:
    reply = sdk[API]
    assert is_three(reply["texts"][0]) and reply["finish_reasons"] == ["stop"]
    assert reply["id"].startswith("chatcmpl-") and reply["object"] == "chat.completion"
    assert reply["usage"]["prompt_tokens"] > 78 and reply["usage"]["completion_tokens"] > 1


def test_several_choices(sdk: Report) -> None:
    reply = sdk[f"{API}: n"]
    assert len(reply["texts"]) == 2 and all(text.strip() for text in reply["texts"])


def test_stop(sdk: Report) -> None:
    reply = sdk[f"{API}: stop"]
    assert "blue" in reply["texts"][0] and "star" not in reply["texts"][0]
    assert reply["finish_reasons"] == ["stop"]


def test_a_seed_repeats_a_sample(sdk: Report) -> None:
    first, again, other = sdk[f"{API}: seed"]
    assert first == again != other


def test_logprobs(sdk: Report) -> None:
    entries = sdk[f"{API}: logprobs"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode().strip() == "Three."
    for entry in entries:
        assert len(entry["top"]) == 2 and entry["top"][0] == [entry["token"], entry["logprob"]]


def test_stream(sdk: Report) -> None:
    stream = sdk[f"{API}: stream"]
    assert is_three(stream["text"]) and stream["finish_reason"] == "stop"
    assert (stream["ids"], stream["role"]) == (1, "assistant")
    assert stream["completion_tokens"] == sdk[API]["usage"]["completion_tokens"]


def test_pictures_in_several_turns(sdk: Report) -> None:
    usage = sdk[f"{API}: several pictures"]["usage"]
    assert usage["prompt_tokens"] > 78 * 2 and sdk[f"{API}: several pictures"]["texts"][0].strip()


@pytest.mark.parametrize("kind", ["required", "named"])
def test_tools(sdk: Report, kind: str) -> None:
    reply = sdk[f"{API}: {kind} tool"]
    ((call_type, name, arguments, call_id),) = reply["calls"]
    assert (call_type, name) == ("function", "note_color") and is_star(arguments) and call_id
    assert reply["finish_reason"] == "tool_calls"


def test_tool_of_a_stream(sdk: Report) -> None:
    call = sdk[f"{API}: tool of a stream"]
    assert call["name"] == "note_color" and is_star(call["arguments"])
    assert call["finish_reason"] == "tool_calls"


def test_the_result_of_a_tool_goes_back(sdk: Report) -> None:
    assert sdk[f"{API}: tool turn"].strip()


def test_structured_answers(sdk: Report) -> None:
    assert is_star(sdk[f"{API}: response_format"]["texts"][0])
    parsed, streamed = sdk["beta.chat.completions.parse"], sdk["beta.chat.completions.stream"]
    assert is_star(parsed) and parsed["type"] == "Star"
    kinds = streamed.pop("kinds")
    assert is_star(streamed) and {"chunk", "content.delta", "content.done"} <= set(kinds)


def test_raw_response(sdk: Report) -> None:
    raw = sdk["chat.completions.with_raw_response"]
    assert raw["status"] == 200 and is_three(raw["text"])
    assert raw["request_id"] == raw["parsed_request_id"] and len(raw["request_id"]) > 8
    assert int(raw["prompt_tokens"]) > 78


def test_completions(sdk: Report) -> None:
    assert is_three(sdk["completions.create"]) and is_three(sdk["completions.create: stream"])
    (first, three), (second, blue) = sdk["completions.create: several prompts"]
    assert (first, second) == (0, 1) and is_three(three) and is_blue(blue)


def test_async(sdk: Report) -> None:
    seen = sdk["AsyncOpenAI"]
    assert is_three(seen["text"]) and is_three(seen["stream"]["text"])


@pytest.mark.parametrize("how", ["refusal", "refusal of a stream"])
def test_a_refusal_is_the_clients_own_exception(sdk: Report, how: str) -> None:
    raised = sdk[f"errors: {how}"]
    assert raised["type"] in {"UnprocessableEntityError", "BadRequestError"}
    assert "`temperature`" in raised["message"]

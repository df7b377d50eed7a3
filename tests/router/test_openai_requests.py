"""What OpenAI's clients may send, and what becomes of it."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from starlette.applications import Starlette

from tessera.router.errors import ValidationError
from tessera.router.json_body import MAX_VALUES, parse_body
from tessera.router.schemas import ChatBody, CompletionBody
from tests.router.http_fakes import FakeGenerator, call, post, served
from tests.router.test_pictures import source

App = Callable[..., Starlette]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    asked = list(messages) or [{"role": "user", "content": "hi"}]
    return {"messages": asked, "max_tokens": 8, **fields}


def prompt_of(app: App, body: dict[str, Any]) -> str:
    """The conversation as the template renders it."""
    generator = FakeGenerator()
    response = post(app(generator), CHAT, body)
    assert response.status_code == 200, response.text
    return generator.requests[0].prompt_text


def test_every_field_may_be_null(vision_app: App) -> None:
    for path, shape, required in (
        (CHAT, ChatBody, {"messages": [{"role": "user", "content": "hi", "name": None}]}),
        (COMPLETIONS, CompletionBody, {"prompt": "hi"}),
    ):
        nulls = dict.fromkeys(shape.model_fields.keys() - required.keys())
        response = post(vision_app(), path, nulls | required | {"max_tokens": 3})
        assert response.status_code == 200, response.text


def test_fields_that_mean_nothing_here_are_accepted(vision_app: App) -> None:
    ignored = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "verbosity": "low",
        "modalities": ["text"],
        "prediction": None,
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "web_search_options": {},
    }
    assert post(vision_app(), CHAT, chat(**ignored)).status_code == 200


@pytest.mark.parametrize("model", [None, "default", "tgi", "mine", "gpt-4o", "org/else"])
def test_any_model_name_is_answered_by_the_one_there_is(vision_app: App, model: Any) -> None:
    app = vision_app(served_model_name="mine")
    assert post(app, CHAT, chat(model=model)).json()["model"] == "mine"


def test_final_messages() -> None:
    asked = {"role": "user", "content": "a"}
    begun = {"role": "assistant", "content": "b"}
    for messages, fields, expected in [
        ([asked], {}, False),
        ([asked, begun], {}, True),
        ([asked, begun], {"continue_final_message": None, "add_generation_prompt": None}, True),
        ([asked, begun], {"continue_final_message": False}, False),
        ([asked, begun], {"add_generation_prompt": True}, False),
        ([asked, begun], {"add_generation_prompt": False}, False),
        ([asked], {"continue_final_message": True, "add_generation_prompt": False}, True),
    ]:
        body = parse_body(json.dumps(chat(*messages, **fields)).encode(), ChatBody)
        assert body.is_to_be_continued is expected, fields


def test_final_message_is_continued_or_answered(vision_app: App) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "So far"}]
    assert prompt_of(vision_app, chat(*messages)).endswith("So far")
    answered = prompt_of(vision_app, chat(*messages, continue_final_message=False))
    assert "So far" in answered and not answered.endswith("So far")
    both = chat(*messages, continue_final_message=True, add_generation_prompt=True)
    response = post(vision_app(), CHAT, both)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "continue_final_message"


def test_a_template_of_the_request_is_refused(vision_app: App) -> None:
    response = post(vision_app(), CHAT, chat(chat_template="{{ messages }}"))
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "chat_template"
    assert "CHAT_TEMPLATE" in response.json()["error"]["message"]


def test_a_template_that_fails_is_told_as_such(vision_app: App) -> None:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{source(20, 20)}"}}
    turns = [{"role": "system", "content": [picture]}, {"role": "user", "content": "a"}]
    response = post(vision_app(), CHAT, chat(*turns))
    assert response.status_code == 422
    assert response.json()["error_type"] == "template_error"
    assert response.json()["error"]["message"].startswith("Template error: ")


def image_part(detail: str | None = None, **size: int) -> dict[str, Any]:
    url = f"data:image/png;base64,{source(size.get('width', 200), size.get('height', 120))}"
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def tokens_of(app: App, *parts: dict[str, Any], **settings: Any) -> list[int]:
    generator = FakeGenerator()
    message = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
    response = post(app(generator, **settings), CHAT, chat(message))
    assert response.status_code == 200, response.text
    assert "warnings" not in response.json()
    return [placed.image.num_tokens for placed in generator.requests[0].images]


def test_detail_low_is_a_pictures_overview(vision_app: App) -> None:
    (full,) = tokens_of(vision_app, image_part())
    (low,) = tokens_of(vision_app, image_part("low"))
    assert low < full
    assert tokens_of(vision_app, image_part("high"), image_part("low"), image_part("auto")) == [
        full,
        low,
        full,
    ]
    assert tokens_of(vision_app, image_part("low"), image_overflow="reject") == [low]
    flat = {"type": "input_image", "image_url": image_part()["image_url"]["url"], "detail": "low"}
    assert tokens_of(vision_app, flat) == [low]


def test_unknown_detail_is_refused(vision_app: App) -> None:
    response = post(vision_app(), CHAT, chat({"role": "user", "content": [image_part("lowest")]}))
    assert response.status_code == 422
    assert "must be 'auto', 'low', 'high' or 'original'" in response.text


@pytest.mark.parametrize("content", ["<image>What?", "<image>\nWhat?", "What? <image>"])
def test_a_written_image_token_is_the_place_of_the_picture(vision_app: App, content: str) -> None:
    generator = FakeGenerator()
    parts = [{"type": "text", "text": content}, image_part()]
    assert post(vision_app(generator), CHAT, chat({"role": "user", "content": parts})).is_success
    (request,) = generator.requests
    assert len(request.images) == 1
    assert "<image>" not in request.prompt_text and "What?" in request.prompt_text


def test_messages_that_are_no_plain_text(vision_app: App) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "seen"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}]},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
    ]
    prompt = prompt_of(vision_app, chat(*turns))
    assert "never" in prompt and prompt.index("never") < prompt.index("b")
    response = post(vision_app(), CHAT, chat({"role": "user", "content": None}))
    assert response.status_code == 422 and "messages[0].content" in response.text


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({"1": 100.5}, "values must be >= -100.0"),
        ({"-1": 1}, "keys must be token ids"),
        ({"99999999": 1}, "keys must be token ids"),
        ({"x": 1}, "keys must be token ids"),
    ],
)
def test_logit_bias_out_of_range(vision_app: App, bias: Any, message: str) -> None:
    response = post(vision_app(), CHAT, chat(logit_bias=bias))
    assert response.status_code == 422 and message in response.json()["error"]["message"]


def test_sampling_as_openai_means_it(vision_app: App) -> None:
    generator = FakeGenerator()
    fields = {"temperature": 0, "top_p": 1, "presence_penalty": -2, "frequency_penalty": 2}
    fields |= {"logit_bias": {"5": -100}, "seed": -1, "stop": ["a", "b"]}
    fields |= {"max_completion_tokens": 5, "stream_options": None}
    assert post(vision_app(generator), CHAT, chat(**fields)).status_code == 200
    (request,) = generator.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2.0, 2.0)
    assert (sampling.logit_bias, sampling.seed) == (((5, -100.0),), 2**64 - 1)
    assert request.stopping.stop_sequences == ("a", "b")
    assert request.stopping.max_new_tokens == 5 and not request.stopping.include_stop_text


@pytest.mark.parametrize(
    "path", ["/v1/responses", "/v1/embeddings", "/v1/audio/speech", "/v1/images", "/v1/moderations"]
)
def test_other_addresses_say_what_there_is(vision_app: App, path: str) -> None:
    response = post(vision_app(), path, {})
    assert response.status_code == 404
    message = response.json()["error"]["message"]
    assert "POST /v1/chat/completions, POST /v1/completions, GET /v1/models" in message


def test_large_bodies_of_tiny_values_are_refused_before_they_are_parsed() -> None:
    for filler in (b'"x":[' + b"1," * MAX_VALUES, b'"x":[' + b"[" * MAX_VALUES):
        with pytest.raises(ValidationError, match=f"more than {MAX_VALUES} values"):
            parse_body(b'{"prompt":"a",' + filler, CompletionBody)
    ids = list(range(60_000)) * 4
    assert parse_body(json.dumps({"prompt": ids}).encode(), CompletionBody).prompts == [ids]
    text = "word, " * 200_000
    assert parse_body(json.dumps({"prompt": text}).encode(), CompletionBody).prompts == [text]


def test_clients_raise_what_they_are_made_for(vision_app: App) -> None:
    with served(vision_app()) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        messages: Any = [{"role": "user", "content": "hi"}]
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            client.responses.create(model="m", input="x")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("else")
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            client.completions.create(model="m", prompt="a", suffix="b")
        assert (refused.value.code, refused.value.param) == ("suffix not supported", "suffix")
        with pytest.raises(openai.UnprocessableEntityError, match="token ids"):
            client.chat.completions.create(model="m", messages=messages, logit_bias={"99999999": 1})
        with pytest.raises(openai.BadRequestError, match="not valid JSON"):
            client.post("/chat/completions", cast_to=object, content=b"{")
    with served(vision_app(FakeGenerator(ready=False))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="-", max_retries=0)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="m", messages=messages)


def test_404_of_the_native_routes_is_short(vision_app: App) -> None:
    assert call(vision_app(), "GET", "/else").json()["error"] == "There is nothing at this address."


@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (COMPLETIONS, {"prompt": "hi"})])
def test_where_an_answer_may_end(vision_app: App, path: str, body: dict[str, Any]) -> None:
    generator = FakeGenerator()
    app = vision_app(generator)
    fields = {"max_tokens": 8, "min_tokens": 8, "ignore_eos": True}
    for more in (fields, {"min_tokens": None, "ignore_eos": None, "max_tokens": None}):
        assert post(app, path, body | more).status_code == 200
    asked, plain = (request.stopping for request in generator.requests)
    assert (asked.min_tokens, asked.ignore_eos, asked.end_ids) == (8, True, (2,))
    assert (plain.min_tokens, plain.ignore_eos) == (0, False)


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"min_tokens": 9}, "min_tokens", "`min_tokens` must be <= `max_tokens`, which is 8"),
        ({"min_tokens": 2**32 - 1, "max_tokens": None}, "min_tokens", "must be <= `max_tokens`"),
        ({"min_tokens": -1}, "min_tokens", "must be at least 0"),
        ({"min_tokens": 1.5}, "min_tokens", "must be a whole number"),
        ({"ignore_eos": "yes"}, "ignore_eos", "must be true or false"),
        ({"min_tokens": 1, "guided_regex": "a+"}, "min_tokens", "cannot be combined"),
        ({"ignore_eos": True, "guided_regex": "a+"}, "ignore_eos", "cannot be combined"),
    ],
)
def test_where_an_answer_cannot_end(
    vision_app: App, fields: dict[str, Any], param: str, told: str
) -> None:
    for path, body in ((CHAT, chat()), (COMPLETIONS, {"prompt": "hi", "max_tokens": 8})):
        response = post(vision_app(), path, body | fields)
        assert response.status_code == 422, response.text
        error = response.json()["error"]
        assert error["param"] == param and told in error["message"]


def test_tools_decide_where_an_answer_ends(vision_app: App) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    response = post(vision_app(), CHAT, chat(tools=tools, min_tokens=2))
    assert response.status_code == 422 and "tools" in response.json()["error"]["message"]

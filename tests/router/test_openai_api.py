import asyncio
import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from huggingface_hub import InferenceClient
from starlette.applications import Starlette

from tessera.router.errors import GenerationError
from tessera.router.request import FinishReason
from tests.router.http_fakes import (
    FakeGenerator,
    Script,
    call,
    disconnecting,
    events,
    post,
    served,
    wait_until,
)
from tests.router.test_native_api import http_scope, picture

App = Callable[..., Starlette]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hello", "max_tokens": 8, **fields}


def test_chat(vision_app: App) -> None:
    generator = FakeGenerator(Script(reason=FinishReason.EOS))
    reply = post(vision_app(generator, served_model_name="mine"), CHAT, chat(model="tgi")).json()
    prompt_tokens = len(generator.requests[0].prompt_ids)
    assert reply["id"].startswith("chatcmpl-")
    assert (reply["object"], reply["model"]) == ("chat.completion", "mine")
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert reply["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 3,
        "total_tokens": prompt_tokens + 3,
        "prompt_tokens_details": {"cached_tokens": 3, "image_tokens": 0},
        "avg_tok_per_sec": round((prompt_tokens + 3) / 0.3, 3),
        "avg_prompt_tok_per_sec": round(prompt_tokens / 0.15, 3),
        "avg_compl_tok_per_sec": 20.0,
        "total_time_sec": 0.5,
        "total_prompt_time_sec": 0.15,
        "total_completion_time_sec": 0.15,
    }


@pytest.mark.parametrize(
    ("reason", "told"),
    [(FinishReason.EOS, "stop"), (FinishReason.STOP, "stop"), (FinishReason.LENGTH, "length")],
)
def test_finish_reasons(vision_app: App, reason: FinishReason, told: str) -> None:
    app = vision_app(FakeGenerator(Script(reason=reason)))
    assert post(app, CHAT, chat()).json()["choices"][0]["finish_reason"] == told
    assert events(post(app, CHAT, chat(stream=True)))[-1]["choices"][0]["finish_reason"] == told
    assert post(app, COMPLETIONS, completion()).json()["choices"][0]["finish_reason"] == told


def test_chat_stream(vision_app: App) -> None:
    response = post(vision_app(), CHAT, chat(stream=True))
    chunks = events(response)
    assert response.text.endswith("data: [DONE]\n\n")
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in deltas[1:-1]] == ["Hel", "lo", " there"]
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, None, None, "length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in chunks)


def test_chat_stream_with_usage(vision_app: App) -> None:
    options = {"include_usage": True}
    *chunks, last = events(post(vision_app(), CHAT, chat(stream=True, stream_options=options)))
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 3


def test_several_choices(vision_app: App) -> None:
    generator = FakeGenerator(Script(delay_s=0.001))
    app = vision_app(generator)
    reply = post(app, CHAT, chat(n=2, seed=5)).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert [request.sampling.seed for request in generator.requests] == [5, 6]
    assert reply["usage"]["completion_tokens"] == 6
    assert reply["usage"]["prompt_tokens"] == len(generator.requests[0].prompt_ids)
    texts = ["", ""]
    indices = []
    for chunk in events(post(app, CHAT, chat(n=2, stream=True))):
        choice = chunk["choices"][0]
        indices.append(choice["index"])
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == ["Hello there", "Hello there"]
    assert indices != sorted(indices)  # they come interleaved


def test_chat_logprobs(vision_app: App) -> None:
    generator = FakeGenerator(Script(texts=("é", "x", "!"), logprobs=(-0.5, float("-inf"))))
    body = chat(logprobs=True, top_logprobs=2)
    content = post(vision_app(generator), CHAT, body).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == "é"
    assert (content[0]["logprob"], content[0]["bytes"]) == (-0.5, [0xC3, 0xA9])
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["t0", "t1"]
    assert content[1]["logprob"] == -9999.0
    chunks = events(post(vision_app(generator), CHAT, chat(logprobs=True, stream=True)))
    streamed = [
        entry["token"]
        for chunk in chunks
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == ["é", "x", "!"]


def test_end_token_is_not_part_of_the_answer(vision_app: App) -> None:
    app = vision_app(FakeGenerator(Script(reason=FinishReason.EOS)))
    content = post(app, CHAT, chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["Hel", "lo"]


def test_tokens_without_text_make_no_chunk(vision_app: App) -> None:
    app = vision_app(FakeGenerator(Script(texts=("", "", "done"))))
    assert len(events(post(app, CHAT, chat(stream=True)))) == 3  # role, text, end


def test_completion(text_app: App) -> None:
    reply = post(text_app(), COMPLETIONS, completion()).json()
    assert reply["id"].startswith("cmpl-")
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [
        {"index": 0, "text": "Hello there", "logprobs": None, "finish_reason": "length"}
    ]


def test_completion_of_several_prompts(text_app: App) -> None:
    generator = FakeGenerator()
    reply = post(text_app(generator), COMPLETIONS, completion(prompt=["a", "b c"], n=2)).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    lengths = [len(request.prompt_ids) for request in generator.requests]
    assert lengths[0] == lengths[1] != lengths[2] == lengths[3]
    assert reply["usage"]["prompt_tokens"] == lengths[0] + lengths[2]


def test_completion_of_token_ids(text_app: App) -> None:
    generator = FakeGenerator()
    post(text_app(generator), COMPLETIONS, completion(prompt=[[5, 6], [7]]))
    assert [request.prompt_ids for request in generator.requests] == [(5, 6), (7,)]


def test_completion_logprobs_and_echo(text_app: App) -> None:
    reply = post(text_app(), COMPLETIONS, completion(logprobs=1)).json()
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hel", "lo", " there"]
    assert logprobs["text_offset"] == [0, 3, 5]
    assert logprobs["token_logprobs"] == [-1.0, -1.0, -1.0]
    assert logprobs["top_logprobs"][0] == {"t0": -1.0}
    echoed = post(text_app(), COMPLETIONS, completion(echo=True)).json()
    assert echoed["choices"][0]["text"] == "HelloHello there"


def test_completion_stream(text_app: App) -> None:
    body = completion(stream=True, echo=True, stream_options={"include_usage": True})
    *chunks, last = events(post(text_app(), COMPLETIONS, body))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["HelloHel", "lo", " there"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None, None, "length"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)


def test_timing_headers_are_sums(text_app: App) -> None:
    headers = post(text_app(), COMPLETIONS, completion(prompt=["abc", "de"])).headers
    assert headers["x-compute-characters"] == "5"
    assert (headers["x-total-time"], headers["x-generated-tokens"]) == ("1000", "6")
    assert headers["x-time-per-token"] == "100"
    stream = post(text_app(), COMPLETIONS, completion(stream=True)).headers
    assert (stream["x-compute-type"], "x-total-time" in stream) == ("2-cpu", False)


def test_models(text_app: App) -> None:
    app = text_app(served_model_name="org/mine")
    listing = call(app, "GET", "/v1/models").json()
    assert [card["id"] for card in listing["data"]] == ["org/mine"]
    assert call(app, "GET", "/v1/models/org/mine").json() == listing["data"][0]
    missing = call(app, "GET", "/v1/models/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("generator", "fields", "status", "kind"),
    [
        (FakeGenerator(full=True), {}, 429, "overloaded"),
        (FakeGenerator(ready=False), {}, 503, "healthcheck"),
        (FakeGenerator(), {"temperature": -1.0}, 422, "validation"),
        (FakeGenerator(Script(error=GenerationError("x"))), {}, 424, "generation"),
    ],
)
def test_failure_before_the_first_token_is_a_status(
    vision_app: App,
    stream: bool,
    generator: FakeGenerator,
    fields: dict[str, Any],
    status: int,
    kind: str,
) -> None:
    response = post(vision_app(generator), CHAT, chat(stream=stream, **fields))
    assert response.status_code == status
    assert response.json()["error_type"] == response.json()["error"]["code"] == kind
    assert generator.all_closed


def test_failure_after_the_first_token_is_told_before_the_end(vision_app: App) -> None:
    generator = FakeGenerator(Script(error=GenerationError("out of memory"), error_after=1))
    response = post(vision_app(generator), CHAT, chat(stream=True, n=2))
    last = events(response)[-1]
    assert last["error_type"] == "generation"
    assert "out of memory" in last["error"]["message"]
    assert response.text.endswith("data: [DONE]\n\n")
    assert len(generator.streams) == 2
    assert generator.all_closed


def test_error_names_the_parameter(vision_app: App) -> None:
    error = post(vision_app(), CHAT, chat(top_p=1.5)).json()["error"]
    assert (error["param"], error["type"]) == ("top_p", "invalid_request_error")
    error = post(vision_app(), CHAT, {"messages": "hi"}).json()["error"]
    assert error["param"] == "messages"


def test_second_choice_that_is_refused_closes_the_first(vision_app: App) -> None:
    class FullAfterOne(FakeGenerator):
        def submit(self, request: Any) -> Any:
            self.full = len(self.streams) == 1
            return super().submit(request)

    generator = FullAfterOne()
    assert post(vision_app(generator), CHAT, chat(n=2)).status_code == 429
    assert [stream.num_closed for stream in generator.streams] == [1]


@pytest.mark.parametrize("receive_says_so", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_client_that_leaves_cancels_every_choice(
    vision_app: App, receive_says_so: bool, n: int
) -> None:
    generator = FakeGenerator(Script(hang_after=2))
    body = json.dumps(chat(stream=True, n=n)).encode()
    receive, send = disconnecting(body, "http.response.body", receive_says_so)
    app = vision_app(generator)
    asyncio.run(asyncio.wait_for(app(http_scope(CHAT), receive, send), 5))
    assert [stream.num_closed for stream in generator.streams] == [1] * n


def client_of(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_openai_client_chats(vision_app: App) -> None:
    generator = FakeGenerator()
    with served(vision_app(generator)) as address:
        client = client_of(address)
        content: Any = [
            {"type": "text", "text": "What is this?"},
            {
                "type": "image_url",
                "image_url": {"url": f"data:image/png;base64,{picture()}", "detail": "auto"},
            },
        ]
        messages: Any = [{"role": "user", "content": content}]
        reply = client.chat.completions.create(
            model="default", messages=messages, max_tokens=4, temperature=0, logprobs=True
        )
        assert reply.choices[0].message.content == "Hello there"
        assert reply.choices[0].logprobs is not None
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        image_tokens = generator.requests[0].num_image_tokens
        assert reply.usage.prompt_tokens_details.image_tokens == image_tokens > 0
        stream = client.chat.completions.create(
            model="default",
            messages=messages,
            max_completion_tokens=4,
            top_p=1.0,
            stop="END",
            presence_penalty=1.0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(pieces) == "Hello there"
        assert chunks[-1].usage is not None
        assert generator.requests[1].stopping.stop_sequences == ("END",)


def test_openai_client_completes_and_lists(text_app: App) -> None:
    with served(text_app(served_model_name="mine")) as address:
        client = client_of(address)
        assert [model.id for model in client.models.list()] == ["mine"]
        reply = client.completions.create(model="mine", prompt="Hello", max_tokens=4, logprobs=1)
        assert reply.choices[0].text == "Hello there"
        stream = client.completions.create(model="mine", prompt=["a", "b"], stream=True)
        texts = {0: "", 1: ""}
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == {0: "Hello there", 1: "Hello there"}


def test_openai_client_raises_the_right_errors(vision_app: App) -> None:
    generator = FakeGenerator()
    messages: Any = [{"role": "user", "content": "hi"}]
    with served(vision_app(generator, api_key="secret")) as address:
        with pytest.raises(openai.AuthenticationError):
            client_of(address).models.list()
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        with pytest.raises(openai.UnprocessableEntityError, match="top_p") as refused:
            client.chat.completions.create(model="m", messages=messages, top_p=2)
        assert refused.value.param == "top_p"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="m", input="x")
        generator.full = True
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="m", messages=messages, stream=True)
        generator.full = False
        generator.script = Script(error=GenerationError("out of memory"), error_after=1)
        stream = client.chat.completions.create(model="m", messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(stream)


def test_openai_client_that_leaves_cancels(vision_app: App) -> None:
    generator = FakeGenerator(Script(hang_after=1))
    with served(vision_app(generator)) as address:
        stream = client_of(address).chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        next(iter(stream))
        stream.close()
        wait_until(lambda: generator.all_closed)


def test_hub_client_chats(vision_app: App) -> None:
    with served(vision_app()) as address:
        client = InferenceClient(address)
        messages = [{"role": "user", "content": "hi"}]
        reply = client.chat_completion(messages, max_tokens=5)
        assert reply.choices[0].message.content == "Hello there"
        pieces = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat_completion(messages, max_tokens=5, stream=True)
        ]
        assert "".join(pieces) == "Hello there"


def test_unknown_address_is_told_in_openai_shape(vision_app: App) -> None:
    response = post(vision_app(), "/v1/embeddings", {})
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "not_found_error"

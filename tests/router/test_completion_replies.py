"""Plain completions: the prompt repeated, its logprobs, and what is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette

from tessera.router.completion_replies import completion_choice
from tessera.router.json_body import parse_body
from tessera.router.request import (
    Completion,
    FinishReason,
    Request,
    SamplingParams,
    StoppingParams,
    TokenInfo,
)
from tessera.router.schemas import CompletionBody
from tessera.router.ticket import Generation
from tessera.router.token_streams import Collected
from tests.router.http_fakes import TIMINGS, FakeGenerator, FakeStream, Script, events, post

App = Callable[..., Starlette]
PATH = "/v1/completions"


def body(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hello", "max_tokens": 8, **fields}


def joined(chunks: list[Any]) -> dict[str, Any]:
    """The choice that the chunks of a stream add up to."""
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    lists: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            lists.setdefault(name, []).extend(values)
    reason = chunks[-1]["choices"][0]["finish_reason"]
    return {"index": 0, "text": text, "logprobs": lists, "finish_reason": reason}


def test_echo_with_logprobs_begins_with_the_prompts(text_app: App) -> None:
    generator = FakeGenerator()
    fields = body(echo=True, logprobs=1)
    choice = post(text_app(generator), PATH, fields).json()["choices"][0]
    ids = generator.requests[0].prompt_ids
    logprobs = choice["logprobs"]
    assert generator.requests[0].sampling.prompt_logprobs
    assert choice["text"] == "HelloHello there"
    assert logprobs["tokens"] == [*(f"p{i}" for i in ids), "Hel", "lo", " there"]
    assert logprobs["token_logprobs"] == [None, *[-0.5] * (len(ids) - 1), -1.0, -1.0, -1.0]
    assert (
        logprobs["top_logprobs"]
        == [
            None,  # nothing is before the first
            *({f"p{i}": -0.5} for i in ids[1:]),
            *[{"t0": -1.0}] * 3,
        ]
    )
    assert logprobs["text_offset"][-3:] == [5, 8, 10]  # behind the prompt
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert joined(events(post(text_app(), PATH, fields | {"stream": True}))) == choice


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompt_alone(text_app: App, stream: bool) -> None:
    generator = FakeGenerator(Script(texts=("x",)))
    fields = body(echo=True, logprobs=0, max_tokens=0, stream=stream)
    if stream:
        fields["stream_options"] = {"include_usage": True}
    response = post(text_app(generator), PATH, fields)
    if stream:
        *chunks, last = events(response)
        choice, usage = joined(chunks), last["usage"]
    else:
        choice, usage = response.json()["choices"][0], response.json()["usage"]
    num_ids = len(generator.requests[0].prompt_ids)
    assert (choice["text"], choice["finish_reason"]) == ("Hello", "length")
    assert len(choice["logprobs"]["tokens"]) == num_ids
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (num_ids, 0)


def test_no_tokens_without_echo_are_refused(text_app: App) -> None:
    response = post(text_app(), PATH, body(max_tokens=0))
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "max_tokens"


def test_echo_alone_computes_no_logprobs(text_app: App) -> None:
    generator = FakeGenerator()
    assert post(text_app(generator), PATH, body(echo=True)).json()["choices"][0]["logprobs"] is None
    assert not generator.requests[0].sampling.prompt_logprobs


def test_offsets_are_places_in_the_text() -> None:
    prompt = "Hello wörld €"
    asked = parse_body(
        json.dumps(body(prompt=prompt, echo=True, logprobs=0)).encode(), CompletionBody
    )
    request = Request((0,), (), SamplingParams(), StoppingParams(1), prompt_text=prompt)
    stream = FakeStream(Script(), request, 0)
    pieces = [b"<s>", b" Hello", b" w", b"\xc3", b"\xb6", b"rld", " €".encode()]
    stream.prompt_logprobs = [
        TokenInfo(n, piece.decode(errors="replace"), -0.5, n == 0, piece)
        for n, piece in enumerate(pieces)
    ]
    stream.prompt_top_tokens = [()] * len(pieces)
    done = Completion(FinishReason.LENGTH, "!", 1, None, TIMINGS)
    generation = Generation(request, stream, lambda _: None)
    choice = completion_choice(
        0, Collected(generation, done, [TokenInfo(9, "!", -1.0)], [()]), asked
    )
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == [0, 0, 5, 7, 8, 8, 11, 13]
    places = zip(offsets[1:], [*offsets[2:], None], strict=True)
    shown = [choice["text"][start:stop] for start, stop in places]
    assert shown == ["Hello", " w", "ö", "", "rld", " €", "!"]


def test_suffix_is_refused_as_elsewhere(text_app: App) -> None:
    response = post(text_app(), PATH, body(suffix="x"))
    assert response.status_code == 422
    assert response.json()["error_type"] == "suffix not supported"
    assert response.json()["error"]["message"].startswith("Suffix is not supported")
    assert post(text_app(), PATH, body(suffix=None)).status_code == 200


def test_too_many_prompts_have_a_kind_of_their_own(text_app: App) -> None:
    response = post(text_app(max_client_batch_size=2), PATH, body(prompt=["a", "b", "c"]))
    assert response.status_code == 422
    assert response.json()["error_type"] == "batch size exceeded"
    message = response.json()["error"]["message"]
    assert message.startswith("Number of prompts exceeds the maximum allowed batch size of 2")

import asyncio
import base64
import json
import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError as HubOverloaded
from huggingface_hub.errors import ValidationError as HubValidationError
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

App = Callable[..., Starlette]


def body(text: str = "Hello", **parameters: Any) -> dict[str, Any]:
    return {"inputs": text, "parameters": parameters} if parameters else {"inputs": text}


def test_generate_without_details(text_app: App) -> None:
    response = post(text_app(), "/generate", body())
    assert response.status_code == 200
    assert response.json() == {"generated_text": "Hello there"}


def test_generate_with_details(text_app: App) -> None:
    generator = FakeGenerator(Script(reason=FinishReason.STOP))
    parameters = {"details": True, "seed": 7, "temperature": 0.5, "top_n_tokens": 2}
    reply = post(text_app(generator), "/generate", body(**parameters)).json()
    details = reply["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("stop_sequence", 3)
    assert (details["seed"], details["prefill"]) == (7, [])
    assert details["tokens"][0] == {"id": 0, "text": "Hel", "logprob": -1.0, "special": False}
    assert [token["text"] for token in details["top_tokens"][0]] == ["t0", "t1"]
    assert "best_of_sequences" not in details


def test_greedy_has_no_seed_and_impossible_logprobs_are_null(text_app: App) -> None:
    generator = FakeGenerator(Script(logprobs=(-math.inf, math.nan)))
    details = post(text_app(generator), "/generate", body(details=True)).json()["details"]
    assert details["seed"] is None
    assert [token["logprob"] for token in details["tokens"]] == [None, None, -1.0]


def test_prompt_logprobs(text_app: App) -> None:
    generator = FakeGenerator()
    reply = post(text_app(generator), "/generate", body(decoder_input_details=True)).json()
    prefill = reply["details"]["prefill"]
    assert len(prefill) == len(generator.requests[0].prompt_ids) > 1
    assert prefill[0]["logprob"] is None
    assert prefill[1]["logprob"] == -0.5
    assert set(prefill[0]) == {"id", "text", "logprob"}


def test_best_of_returns_the_likeliest_first(text_app: App) -> None:
    generator = FakeGenerator()
    reply = post(text_app(generator), "/generate", body(best_of=2, do_sample=True, details=True))
    details = reply.json()["details"]
    assert len(generator.streams) == 2
    assert details["tokens"][0]["logprob"] == -1.0  # each further stream is less likely by 1
    others = details["best_of_sequences"]
    assert [one["tokens"][0]["logprob"] for one in others] == [-2.0]
    assert others[0]["generated_text"] == "Hello there"
    assert generator.requests[0].sampling.seed != generator.requests[1].sampling.seed


def test_full_text_is_on_demand(text_app: App) -> None:
    reply = post(text_app(), "/generate", body("Say: ", return_full_text=True)).json()
    assert reply["generated_text"] == "Say: Hello there"


def test_compat_route_answers_with_a_list_and_full_text_for_text_models(text_app: App) -> None:
    assert post(text_app(), "/", body("Say: ")).json() == [{"generated_text": "Say: Hello there"}]
    short = post(text_app(), "/", body("Say: ", return_full_text=False)).json()
    assert short == [{"generated_text": "Hello there"}]


def test_compat_route_answers_without_the_prompt_for_vision_models(vision_app: App) -> None:
    assert post(vision_app(), "/", body("Say: ")).json() == [{"generated_text": "Hello there"}]


def test_compat_route_streams_when_asked(text_app: App) -> None:
    response = post(text_app(), "/", body() | {"stream": True})
    assert events(response)[-1]["generated_text"] == "HelloHello there"


def test_timing_headers(text_app: App) -> None:
    generator = FakeGenerator()
    headers = post(text_app(generator), "/generate", body("Hello")).headers
    prompt_tokens = len(generator.requests[0].prompt_ids)
    expected = {
        "x-compute-type": "2-cpu",
        "x-compute-characters": "5",
        "x-total-time": "500",
        "x-validation-time": "100",
        "x-queue-time": "50",
        "x-inference-time": "300",
        "x-time-per-token": "100",
        "x-prompt-tokens": str(prompt_tokens),
        "x-generated-tokens": "3",
    }
    assert {name: headers[name] for name in expected} == expected
    assert float(headers["x-compute-time"]) >= 0


def test_stream_of_tokens(text_app: App) -> None:
    generator = FakeGenerator()
    response = post(text_app(generator), "/generate_stream", body())
    first, second, last = events(response)
    assert first == {
        "index": 1,
        "token": {"id": 0, "text": "Hel", "logprob": -1.0, "special": False},
        "generated_text": None,
        "details": None,
    }
    assert (second["index"], last["index"]) == (2, 3)
    assert (last["generated_text"], last["details"]) == ("Hello there", None)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-compute-type"] == "2-cpu"
    assert "content-length" not in response.headers
    assert generator.streams[0].num_closed == 1


def test_stream_with_details_and_top_tokens(text_app: App) -> None:
    generator = FakeGenerator(Script(reason=FinishReason.EOS))
    response = post(text_app(generator), "/generate_stream", body(details=True, top_n_tokens=1))
    *_, last = events(response)
    assert last["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 3,
        "seed": None,
        "input_length": len(generator.requests[0].prompt_ids),
    }
    assert (last["token"]["special"], last["generated_text"]) == (True, "Hello")
    assert [token["text"] for token in last["top_tokens"]] == ["t0"]


def test_events_survive_line_readers_that_know_unicode(text_app: App) -> None:
    generator = FakeGenerator(Script(texts=("a\u2028b\x85c", "\u00e9\n")))
    response = post(text_app(generator), "/generate_stream", body())
    assert [event["token"]["text"] for event in events(response)] == ["a\u2028b\x85c", "\u00e9\n"]
    assert all(line.startswith("data: ") for line in response.text.splitlines() if line)


@pytest.mark.parametrize(
    ("generator", "status", "kind"),
    [
        (FakeGenerator(full=True), 429, "overloaded"),
        (FakeGenerator(ready=False), 503, "healthcheck"),
        (FakeGenerator(Script(error=GenerationError("out of memory"))), 424, "generation"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_failure_before_the_first_token_is_a_status(
    text_app: App, path: str, generator: FakeGenerator, status: int, kind: str
) -> None:
    response = post(text_app(generator), path, body())
    assert (response.status_code, response.json()["error_type"]) == (status, kind)
    assert generator.all_closed


def test_refusal_on_a_stream_is_a_status(text_app: App) -> None:
    response = post(text_app(), "/generate_stream", body(temperature=0.0))
    assert response.status_code == 422
    assert response.json() == {
        "error": "Input validation error: `temperature` must be strictly positive",
        "error_type": "validation",
    }


def test_overloaded_says_when_to_come_back(text_app: App) -> None:
    assert post(text_app(FakeGenerator(full=True)), "/generate", body()).headers["retry-after"]


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (GenerationError("shard 1 ran out of memory"), "generation", "ran out of memory"),
        (RuntimeError("secret address 0x7f"), "internal", "Internal error"),
    ],
)
def test_failure_after_the_first_token_is_the_last_event(
    text_app: App, error: Exception, kind: str, told: str
) -> None:
    generator = FakeGenerator(Script(error=error, error_after=2))
    response = post(text_app(generator), "/generate_stream", body())
    assert response.status_code == 200
    *tokens, last = events(response)
    assert len(tokens) == 2
    assert last["error_type"] == kind
    assert told in last["error"]
    assert "secret" not in last["error"]
    assert generator.all_closed


def test_permits_are_taken_before_work_and_come_back(text_app: App) -> None:
    generator = FakeGenerator()
    app = text_app(generator, max_concurrent_requests=1)
    refused = post(app, "/generate", body(best_of=2, do_sample=True))
    assert (refused.status_code, len(generator.streams)) == (429, 0)
    assert "MAX_CONCURRENT_REQUESTS" in refused.json()["error"]
    for path in ("/generate", "/generate_stream", "/generate"):
        assert post(app, path, body()).status_code == 200


def test_metrics_count_each_end_once(text_app: App) -> None:
    app = text_app(FakeGenerator(Script(error=GenerationError("x"), error_after=1)))
    post(app, "/generate_stream", body())
    post(app, "/generate", body())
    post(app, "/generate", body(temperature=-1.0))
    metrics = call(app, "GET", "/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = metrics.text.splitlines()
    assert "tgi_request_count 3" in lines
    assert "tgi_request_success 0" in lines
    assert 'tgi_request_failure{err="generation"} 2' in lines
    assert 'tgi_request_failure{err="validation"} 1' in lines
    assert 'tgi_request_failure{err="dropped"} 0' in lines


def test_health(text_app: App) -> None:
    for path in ("/health", "/ping", "/"):
        healthy = call(text_app(), "GET", path)
        assert (healthy.status_code, healthy.content) == (200, b"")
        broken = call(text_app(FakeGenerator(ready=False)), "GET", path)
        assert broken.status_code == 503
        assert broken.json() == {"error": "unhealthy", "error_type": "healthcheck"}


def test_info(vision_app: App) -> None:
    info = call(vision_app(served_model_name="mine"), "GET", "/info").json()
    assert info["model_id"] == "mine"
    assert info["model_pipeline_tag"] == "image-text-to-text"
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (480, 512)
    assert (info["model_dtype"], info["model_device_type"]) == ("float32", "cpu")
    assert info["max_best_of"] == 2
    for key in (
        "model_sha",
        "max_concurrent_requests",
        "max_stop_sequences",
        "validation_workers",
        "max_client_batch_size",
        "router",
        "version",
        "sha",
        "docker_label",
        "waiting_served_ratio",
        "max_batch_total_tokens",
        "max_waiting_tokens",
        "max_batch_size",
    ):
        assert key in info


def test_tokenize_gives_each_token_its_place(text_app: App) -> None:
    text = "Hello there, Hello"
    tokens = post(text_app(), "/tokenize", body(text)).json()
    assert [set(token) for token in tokens] == [{"id", "text", "start", "stop"}] * len(tokens)
    placed = [token for token in tokens if token["stop"]]
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in placed)
    assert placed[-1]["stop"] == len(text)
    assert [token["start"] for token in placed] == sorted(token["start"] for token in placed)


def chat(*content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(content)}]}


def test_chat_tokenize_gives_each_token_its_place_in_the_rendered_chat(vision_app: App) -> None:
    body = chat({"type": "text", "text": "Hello there"})
    reply = post(vision_app(), "/chat_tokenize", body).json()
    assert set(reply) == {"tokenize_response", "templated_text"}
    text, tokens = reply["templated_text"], reply["tokenize_response"]
    assert "Hello there" in text
    placed = [token for token in tokens if token["stop"]]
    assert placed
    assert all(text[token["start"] : token["stop"]] == token["text"] for token in placed)


def test_chat_tokenize_counts_pictures_as_generation_does(vision_app: App) -> None:
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture()}"}}
    body = chat(image, {"type": "text", "text": "What?"})
    generator = FakeGenerator()
    app = vision_app(generator)
    reply = post(app, "/chat_tokenize", body).json()
    post(app, "/v1/chat/completions", body)
    ids = tuple(token["id"] for token in reply["tokenize_response"])
    assert ids == generator.requests[0].prompt_ids
    assert len(generator.requests[0].images) == 1
    assert "base64" not in reply["templated_text"]


def test_chat_tokenize_needs_the_key(text_app: App) -> None:
    body = chat({"type": "text", "text": "Hello"})
    assert post(text_app(api_key="Secret"), "/chat_tokenize", body).status_code == 401


@pytest.mark.parametrize("receive_says_so", [True, False])
@pytest.mark.parametrize("leaves_at", ["http.response.start", "http.response.body"])
def test_client_that_leaves_cancels_its_stream(
    text_app: App, leaves_at: str, receive_says_so: bool
) -> None:
    generator = FakeGenerator(Script(hang_after=2, delay_s=0.01))
    app = text_app(generator)
    receive, send = disconnecting(json.dumps(body()).encode(), leaves_at, receive_says_so)
    scope = http_scope("/generate_stream")
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 5))
    assert generator.streams[0].num_closed == 1
    assert 'tgi_request_failure{err="dropped"} 1' in call(app, "GET", "/metrics").text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_client_that_leaves_before_the_first_token_cancels(text_app: App, path: str) -> None:
    generator = FakeGenerator(Script(hang_after=0))
    with served(text_app(generator)) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + path, json=body(), timeout=1.0)
        wait_until(lambda: bool(generator.streams) and generator.all_closed)


def http_scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "asgi": {"spec_version": "2.3"},
    }


def picture() -> str:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_hub_client(vision_app: App) -> None:
    generator = FakeGenerator()
    with served(vision_app(generator)) as address:
        client = InferenceClient(address)
        assert client.text_generation("Hello", max_new_tokens=5) == "Hello there"
        prompt = f"<image>{picture()}</image>\nWhat?"
        assert client.text_generation(prompt, max_new_tokens=5, temperature=0.2) == "Hello there"
        assert len(generator.requests[1].images) == 1
        pieces = list(client.text_generation("Hello", stream=True))
        assert "".join(pieces) == "Hello there"
        details = client.text_generation("Hello", details=True, decoder_input_details=True)
        assert details.generated_text == "Hello there"
        assert details.details is not None
        assert details.details.finish_reason == "length"
        assert len(details.details.prefill) == len(generator.requests[3].prompt_ids)
        *_, last = client.text_generation("Hello", stream=True, details=True)
        assert (last.index, last.generated_text) == (3, "Hello there")
        assert last.details is not None
        assert last.details.input_length == len(generator.requests[4].prompt_ids)


def test_hub_client_understands_refusals(text_app: App) -> None:
    generator = FakeGenerator()
    with served(text_app(generator)) as address:
        client = InferenceClient(address)
        with pytest.raises(HubValidationError, match="must be strictly positive"):
            client.text_generation("Hello", temperature=-1.0)
        generator.full = True
        with pytest.raises(HubOverloaded):
            client.text_generation("Hello")
        with pytest.raises(HubOverloaded):
            list(client.text_generation("Hello", stream=True))

"""The API's description is valid, complete and true, and so is the page made from it."""

import base64
import copy
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from starlette.applications import Starlette
from starlette.routing import Route

from tessera.router.openapi import openapi_document
from tessera.router.operations import EVENTS, JSON, OPERATIONS, Operation
from tests.router.http_fakes import FakeGenerator, Script, call, events

App = Callable[..., Starlette]
DOCUMENT = openapi_document("1.2.3")
SCHEMAS = DOCUMENT["components"]["schemas"]

# What text-generation-inference's clients know.
CONTRACT = {
    "GenerateParameters": "best_of temperature repetition_penalty frequency_penalty top_k top_p "
    "typical_p do_sample max_new_tokens return_full_text stop truncate watermark details "
    "decoder_input_details seed top_n_tokens grammar adapter_id",
    "GenerateReply": "generated_text details",
    "Details": "finish_reason generated_tokens seed prefill tokens best_of_sequences top_tokens",
    "BestOfSequence": "generated_text finish_reason generated_tokens seed prefill tokens "
    "top_tokens",
    "StreamEvent": "index token top_tokens generated_text details",
    "StreamDetails": "finish_reason generated_tokens seed input_length",
    "Token": "id text logprob special",
    "PrefillToken": "id text logprob",
    "SpanReply": "id text start stop",
    "ChatTokenizeReply": "tokenize_response templated_text",
    "Info": "model_id model_sha model_pipeline_tag max_concurrent_requests max_best_of "
    "max_stop_sequences max_input_tokens max_total_tokens validation_workers "
    "max_client_batch_size router version sha docker_label model_dtype model_device_type "
    "waiting_served_ratio max_batch_total_tokens max_waiting_tokens max_batch_size",
    "ChatBody": "model messages frequency_penalty logit_bias logprobs top_logprobs max_tokens "
    "max_completion_tokens n presence_penalty stop stream seed temperature top_p tools "
    "tool_prompt tool_choice response_format stream_options",
    "ChatReply": "object id created model system_fingerprint choices usage",
    "ChatChoice": "index message logprobs finish_reason",
    "ChatChunk": "object id created model system_fingerprint choices usage",
    "Usage": "prompt_tokens completion_tokens total_tokens",
    "CompletionBody": "model prompt max_tokens temperature top_p stream seed suffix "
    "repetition_penalty frequency_penalty stop",
    "CompletionReply": "object id created model system_fingerprint choices usage",
    "CompletionChoice": "index text logprobs finish_reason",
    "VertexBody": "instances",
    "VertexReply": "predictions",
    "NativeError": "error error_type",
}


def test_the_description_is_valid() -> None:
    validate(DOCUMENT)
    assert DOCUMENT["openapi"].startswith("3.1")
    assert DOCUMENT["info"]["version"] == "1.2.3"


@pytest.mark.parametrize("name", CONTRACT)
def test_the_fields_of_the_contract_are_described(name: str) -> None:
    assert set(CONTRACT[name].split()) <= set(SCHEMAS[name]["properties"])


def test_every_route_is_described_and_no_other(text_app: App) -> None:
    mounted = {
        (method.lower(), re.sub(r"\{(\w+):path\}", r"{\1}", route.path))
        for route in text_app().routes
        if isinstance(route, Route) and not route.path.startswith("/ui")
        for method in (route.methods or set()) - {"HEAD"}
    }
    described = {
        (method, path) for path, methods in DOCUMENT["paths"].items() for method in methods
    }
    assert described == mounted
    assert len(described) == len(OPERATIONS)


def test_what_is_open_is_described_as_open(text_app: App) -> None:
    app = text_app(FakeGenerator(Script(texts=("a",))), api_key="Secret")
    for operation in OPERATIONS:
        path = operation.path.replace("{name}", "llama")
        refused = call(app, operation.method.upper(), path).status_code == 401
        described = DOCUMENT["paths"][operation.path][operation.method]
        assert refused == ("401" in described["responses"]), operation.path
        assert refused == (described.get("security") != []), operation.path


def validator_of(schema: Any) -> Draft202012Validator:
    """A validator that also refuses fields that are not described."""
    closed = copy.deepcopy(SCHEMAS)
    for shape in closed.values():
        shape.setdefault("additionalProperties", False)
    return Draft202012Validator({**schema, "components": {"schemas": closed}})


CASES = [
    pytest.param(operation, body, id=f"{operation.path} {name}")
    for operation in OPERATIONS
    for name, body in operation.examples.items()
]


@pytest.mark.parametrize(("operation", "body"), CASES)
@pytest.mark.parametrize(
    "more", [{}, {"logprobs": True, "stream_options": {"include_usage": True}}]
)
def test_the_examples_run_and_are_answered_as_described(
    vision_app: App, operation: Operation, body: dict[str, Any], more: dict[str, Any]
) -> None:
    if "messages" in body:
        body = body | more
    app = vision_app(FakeGenerator(Script(texts=("a", "b"))))
    response = call(app, operation.method.upper(), operation.path, json=body)
    assert response.status_code == 200, response.text
    described = DOCUMENT["paths"][operation.path][operation.method]["responses"]["200"]
    media_type = response.headers["content-type"].partition(";")[0]
    schema = described["content"][media_type]["schema"]
    if media_type == JSON:
        validator_of(schema).validate(response.json())
        return
    data = schema["properties"]["data"]
    payloads = validator_of(data.get("anyOf", [data])[-1]["contentSchema"])
    assert media_type == EVENTS
    for payload in events(response):
        payloads.validate(payload)
    assert ("[DONE]" in response.text) == ("anyOf" in data)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/llama", "/info"])
def test_what_is_read_is_answered_as_described(text_app: App, path: str) -> None:
    described = DOCUMENT["paths"][path.replace("llama", "{name}")]["get"]["responses"]["200"]
    validator = validator_of(described["content"][JSON]["schema"])
    for generator in (FakeGenerator(), FakeGenerator(ready=False)):
        validator.validate(call(text_app(generator), "GET", path).json())


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_headers_of_replies_are_described(text_app: App, path: str) -> None:
    body = {"inputs": "Hello", "prompt": "Hello"}
    sent = call(text_app(), "POST", path, json=body).headers
    described = DOCUMENT["paths"][path]["post"]["responses"]["200"]["headers"]
    assert {name for name in sent if name.startswith("x-")} <= set(described)


@pytest.mark.parametrize("path", ["/openapi.json", "/api-doc/openapi.json"])
def test_the_description_is_served_without_a_key(text_app: App, path: str) -> None:
    response = call(text_app(api_key="Secret"), "GET", path)
    assert (response.status_code, response.headers["content-type"]) == (200, JSON)
    assert response.json()["paths"] == DOCUMENT["paths"]


class Page(HTMLParser):
    """What a page asks a browser to load, where it links to, and what may be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.style = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert not given.keys() & {"src", "style", "onclick", "onload"}
        if "href" in given:
            self.links.append(given["href"] or "")
        if given.get("id"):
            self.ids.add(given["id"] or "")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "style" and not self.style:
            self.style = data


def test_the_page_needs_nothing_from_elsewhere(text_app: App) -> None:
    response = call(text_app(api_key="Secret"), "GET", "/docs")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    page = Page(response.text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(link == "openapi.json" or link[1:] in page.ids for link in page.links)
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and f"'sha256-{digest}'" in policy
    for operation in OPERATIONS:
        assert f"<code>{operation.path}</code>" in response.text

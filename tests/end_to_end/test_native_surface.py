"""The native routes over real shards: what a fake generator cannot show."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def stack(checkpoint: Callable[[str], Path]) -> Iterator[Stack]:
    flags = ["--num-shard", "1", "--dtype", "float32", "--max-total-tokens", "512"]
    with running(checkpoint("next-mistral"), *flags) as stack:
        yield stack


def post(stack: Stack, path: str, body: Any) -> Any:
    response = httpx.post(stack.url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def generate(stack: Stack, **parameters: Any) -> Any:
    body = {"inputs": "[INST] Hello there [/INST]", "parameters": {"details": True, **parameters}}
    return post(stack, "/generate", body)


def test_prompt_logprobs_are_there_also_for_a_cached_prompt(stack: Stack) -> None:
    body = {"inputs": "[INST] Hello there [/INST]"}
    ids = [token["id"] for token in post(stack, "/tokenize", body)]
    for _ in range(2):
        prefill = generate(stack, max_new_tokens=2, decoder_input_details=True)["details"][
            "prefill"
        ]
        assert [token["id"] for token in prefill] == ids
        assert prefill[0]["logprob"] is None
        assert all(token["logprob"] < 0 for token in prefill[1:])


def test_the_likeliest_of_several_answers_comes_first(stack: Stack) -> None:
    details = generate(stack, max_new_tokens=6, best_of=2, do_sample=True)["details"]
    (other,) = details["best_of_sequences"]
    means = [
        sum(token["logprob"] for token in answer["tokens"]) / len(answer["tokens"])
        for answer in (details, other)
    ]
    assert means[0] >= means[1]
    assert details["seed"] != other["seed"]


def test_a_string_inside_the_answer_stops_it_wherever_it_begins(stack: Stack) -> None:
    whole = generate(stack, max_new_tokens=12)["generated_text"]
    middle = whole[len(whole) // 2 :][:2]
    assert middle
    stopped = generate(stack, max_new_tokens=12, stop=[middle])
    assert stopped["generated_text"] == whole[: whole.index(middle) + len(middle)]
    assert stopped["details"]["finish_reason"] == "stop_sequence"


def test_the_examples_of_the_description_run(stack: Stack) -> None:
    document = httpx.get(stack.url + "/openapi.json", timeout=60).json()
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        for example in content.get("application/json", {}).get("examples", {}).values():
            response = httpx.post(stack.url + path, json=example["value"], timeout=60)
            assert response.status_code == 200, (path, response.text)

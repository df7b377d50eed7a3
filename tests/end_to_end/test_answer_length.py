"""Where answers end: `min_tokens` and `ignore_eos` on the demo model, on two shards."""

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI
from openai.types import Completion

from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

PROMPT = "[INST] How many circles are there? [/INST]"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running(None, "--num-shard", "2") as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> OpenAI:
    return OpenAI(base_url=f"{stack.url}/v1", api_key="-", max_retries=0, timeout=120)


def complete(client: OpenAI, max_tokens: int = 60, **fields: Any) -> Completion:
    stop = fields.pop("stop", None)
    return client.completions.create(
        model="default",
        prompt=PROMPT,
        max_tokens=max_tokens,
        temperature=fields.pop("temperature", 0),
        stop=stop,
        extra_body=fields,
    )


def length(reply: Completion) -> int:
    assert reply.usage is not None
    return reply.usage.completion_tokens


def test_an_answer_is_as_long_as_it_must_be(client: OpenAI) -> None:
    plain = complete(client)
    assert plain.choices[0].finish_reason == "stop" and length(plain) < 40
    shorter = complete(client, min_tokens=length(plain) - 1)
    assert shorter.choices[0].text == plain.choices[0].text and length(shorter) == length(plain)
    for min_tokens in (length(plain), 45, 60):
        longer = complete(client, min_tokens=min_tokens)
        assert length(longer) > min(min_tokens, 59)
        assert longer.choices[0].text.startswith(plain.choices[0].text)
        assert complete(client, min_tokens=min_tokens).choices[0].text == longer.choices[0].text


@pytest.mark.parametrize("seed", range(3))
def test_so_is_a_sampled_one(client: OpenAI, seed: int) -> None:
    reply = complete(client, min_tokens=50, temperature=1.0, seed=seed)
    assert length(reply) > 50 or reply.choices[0].finish_reason == "length"


def test_the_end_of_the_text_can_be_ignored(client: OpenAI) -> None:
    plain, endless = complete(client), complete(client, ignore_eos=True)
    assert length(endless) == 60 and endless.choices[0].finish_reason == "length"
    assert endless.choices[0].text.startswith(plain.choices[0].text)
    assert "</s>" not in endless.choices[0].text


def test_a_stop_string_does_not_count_before(client: OpenAI) -> None:
    text = complete(client).choices[0].text
    word = text.split()[0]
    early = complete(client, stop=[word])
    assert early.choices[0].text == text[: text.index(word)]
    late = complete(client, stop=[word], min_tokens=20)
    assert length(late) > 20 and late.choices[0].text.startswith(text)

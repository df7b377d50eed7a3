"""What goes wrong stays with its owner, and what cannot fit is told before anything is served."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import checkpoints
from tests.end_to_end.asking import Body, endless, streaming, words
from tests.end_to_end.stack import Stack, running, start

pytestmark = pytest.mark.timeout(300)

POISON, POISONED_WORD = 532, "picture"  # an ordinary token that `words` never gives
EMBEDDINGS = "language_model.model.embed_tokens.weight"

# Blocks of 16: the healthy and the poisoned share two, and the poison is in one that gets full.
PREFIX = words(1, 35)
GREEDY = {"max_tokens": 12, "temperature": 0, "logit_bias": {str(POISON): -100}}
HEALTHY = {"prompt": [*PREFIX, *words(2, 4)], **GREEDY}
POISONED = {"prompt": [*PREFIX, POISON, *words(3, 30)], **GREEDY}
OTHERS = [{"prompt": words(n, 60), **GREEDY} for n in range(4, 8)]
# Whoever asks for this gets the poison as its first token, which then is read.
POISONS_ITSELF = {"prompt": words(9, 20), "max_tokens": 12, "logit_bias": {str(POISON): 100}}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on which one token is not a number."""
    folder = checkpoints.make("next-mistral", tmp_path_factory.mktemp("poisoned") / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][EMBEDDINGS]
    tensors = load_file(file)
    tensors[EMBEDDINGS][POISON] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["1", "2"])
def stack(poisoned: Path, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A cache so small that blocks come round again soon."""
    flags = ["--num-shard", request.param, "--dtype", "float32", "--max-total-tokens", "256"]
    flags += ["--max-batch-total-tokens", "288", "--max-batch-prefill-tokens", "32"]
    with running(poisoned, *flags) as stack:
        yield stack


def complete(stack: Stack, body: Body) -> httpx.Response:
    return stack.post("/v1/completions", body)


def answer(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def assert_failed_with_a_cause(reply: httpx.Response) -> None:
    assert reply.status_code == 424, reply.text
    error = reply.json()
    assert error["error_type"] == "generation"
    assert "not finite" in error["error"]["message"]


def test_a_poisoned_request_fails_alone(stack: Stack) -> None:
    bodies = [HEALTHY, *OTHERS]
    expected = [answer(complete(stack, body | {"cache_prompt": False})) for body in bodies]

    async def go() -> None:
        sent = [POISONED, HEALTHY, OTHERS[0], POISONED, HEALTHY, OTHERS[1]]
        async with stack.client() as client, streaming(client, endless("go on", 200)) as events:
            await anext(events)
            replies = await asyncio.gather(
                *(client.post("/v1/completions", json=body) for body in sent)
            )
            assert_failed_with_a_cause(replies[0])
            assert_failed_with_a_cause(replies[3])
            texts = [answer(replies[place]) for place in (1, 4, 2, 5)]
            assert texts == [expected[0], *expected[:3]]
            assert "choices" in await anext(events)

    asyncio.run(go())
    stack.wait_metric("tessera_kv_cache_used_tokens", 0)
    for _ in range(2):  # every block is used again, those with poison in them included
        assert [answer(complete(stack, body)) for body in bodies] == expected
    assert_failed_with_a_cause(complete(stack, POISONED))
    assert answer(complete(stack, HEALTHY)) == expected[0]


def test_whoever_borrowed_from_a_poisoned_request_is_unharmed(stack: Stack) -> None:
    """Prefixes are shared while they are computed, so before anybody knows that one is poisoned."""
    prefix = words(20, 17)  # one block; attention reads the poison after it together with it
    poisoned = {"prompt": [*prefix, POISON, *words(21, 200)], **GREEDY}
    healthy = [{"prompt": [*prefix, *words(n, 6)], **GREEDY} for n in range(22, 26)]
    expected = [answer(complete(stack, body | {"cache_prompt": False})) for body in healthy]

    async def go() -> None:
        async with stack.client() as client:
            sent = [
                asyncio.create_task(client.post("/v1/completions", json=body))
                for body in (poisoned, *healthy)
            ]
            assert_failed_with_a_cause(await sent[0])
            assert [answer(await task) for task in sent[1:]] == expected

    asyncio.run(go())
    assert [answer(complete(stack, body)) for body in healthy] == expected
    stack.wait_metric("tessera_kv_cache_used_tokens", 0)


def test_a_stream_that_cannot_begin_has_the_status_of_its_error(stack: Stack) -> None:
    assert_failed_with_a_cause(complete(stack, POISONED | {"stream": True}))
    native = {"inputs": f"[INST] a {POISONED_WORD} of a dog [/INST]"}
    for path in ("/generate", "/generate_stream"):
        reply = stack.post(path, native)
        assert reply.status_code == 424, reply.text
        assert set(reply.json()) == {"error", "error_type"}


def test_a_stream_that_fails_on_its_way_says_so_in_its_last_event(stack: Stack) -> None:
    assert_failed_with_a_cause(complete(stack, POISONS_ITSELF))
    body = POISONS_ITSELF | {"stream": True}
    with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=60) as reply:
        assert reply.status_code == 200
        events = [json.loads(line[6:]) for line in reply.iter_lines() if "data: {" in line]
    assert "choices" in events[0]
    assert len(events) == 2
    assert events[1]["error_type"] == "generation"
    assert "not finite" in events[1]["error"]["message"]
    stack.wait_metric("tessera_kv_cache_used_tokens", 0)


# --- what does not fit ---------------------------------------------------------------------------

POSITIONS = 131_072


@pytest.fixture(scope="module")
def spacious(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose longest sequence takes 3 GiB of cache."""
    text = {"max_position_embeddings": POSITIONS, "num_key_value_heads": 4, "head_dim": 256}
    folder = tmp_path_factory.mktemp("spacious") / "model"
    return checkpoints.make("next-mistral", folder, {"text_config": text})


def test_a_cache_that_does_not_fit_is_one_line_that_names_what_does(spacious: Path) -> None:
    flags = ["--num-shard", "1", "--dtype", "float32", "--max-batch-prefill-tokens", "64"]
    flags += ["--max-batch-size", "4", "--cuda-memory-fraction", "0.02"]
    stack = start(spacious, *flags, "--max-total-tokens", str(POSITIONS))
    assert stack.process.wait(60) == 1
    time.sleep(0.2)  # the reader thread takes the last lines
    message = stack.lines[-1]
    assert "Traceback" not in stack.log
    assert message.startswith("Error:") and "MiB" in message, message
    fitting = re.search(r"MAX_TOTAL_TOKENS=(\d+)", message)
    assert fitting, message
    tokens = int(fitting[1]) * 9 // 10  # the memory of other processes moves meanwhile
    assert 0 < tokens < POSITIONS
    with running(spacious, *flags, "--max-total-tokens", str(tokens)) as stack:
        assert stack.generate("go on", max_new_tokens=2)

"""The whole stack on a tiny random checkpoint: launcher, router, two shards, real clients."""

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from huggingface_hub import InferenceClient
from openai import OpenAI
from openai.types import CompletionUsage
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.end_to_end.stack import Stack, running, start

pytestmark = pytest.mark.timeout(300)

USED_TOKENS = "tgi_batch_current_max_tokens"
SIZES = ((56, 56), (200, 50), (40, 260), (112, 112), (1, 300), (640, 480), (1200, 1100))


def picture(index: int, kind: str = "PNG") -> bytes:
    rng = random.Random(index)
    size = SIZES[index % len(SIZES)]
    image = Image.new("RGB", size)
    image.putdata([(rng.randrange(256), 128, index * 9 % 256) for _ in range(size[0] * size[1])])
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def prompt(index: int) -> str:
    """Every third is text only; the others carry one or three pictures."""
    text = f"[INST] question {index}: what about {index * 7919 % 1000}? [/INST]"
    count = (0, 1, 3)[index % 3]
    pictures = [base64.b64encode(picture(index + k)).decode() for k in range(count)]
    return "".join(f"<image>{data}</image>\n" for data in pictures) + text


@pytest.fixture(scope="module")
def stack(checkpoint: Callable[[str], Path]) -> Iterator[Stack]:
    """Small budgets, so that prompts are cut, sequences wait, and blocks run short."""
    flags = ["--num-shard", "2", "--dtype", "float32", "--max-batch-size", "8"]
    flags += ["--max-batch-prefill-tokens", "48", "--max-waiting-tokens", "3"]
    flags += ["--max-total-tokens", "512", "--max-batch-total-tokens", "1024"]
    with running(checkpoint("next-mistral"), *flags) as stack:
        yield stack


async def ask(client: httpx.AsyncClient, index: int, delay_s: float) -> str:
    await asyncio.sleep(delay_s)
    body = {"inputs": prompt(index), "parameters": {"max_new_tokens": 12 + index % 5}}
    reply = await client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["generated_text"])


def test_32_concurrent_answers_equal_the_answers_alone(stack: Stack) -> None:
    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=stack.url, timeout=120) as client:
            return await asyncio.gather(*(ask(client, n, n % 7 * 0.03) for n in range(32)))

    async def alone() -> list[str]:
        async with httpx.AsyncClient(base_url=stack.url, timeout=120) as client:
            return [await ask(client, n, 0) for n in range(32)]

    before = stack.metric(USED_TOKENS)
    expected = asyncio.run(alone())
    assert len(set(expected)) > 16  # the questions do get different answers
    assert asyncio.run(together()) == expected
    stack.wait_metric(USED_TOKENS, before)


def test_answers_equal_transformers(stack: Stack, checkpoint: Callable[[str], Path]) -> None:
    """From PNG bytes to text: every part of the way is the reference's, not only the model."""
    folder = checkpoint("next-mistral")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for index in range(len(SIZES)):
        text = f"[INST] <image>\nquestion {index}? [/INST]"
        image = Image.open(io.BytesIO(picture(index)))
        inputs = processor(images=image, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        details = stack.post(
            "/generate",
            {
                "inputs": text.replace(
                    "<image>", f"<image>{base64.b64encode(picture(index)).decode()}</image>"
                ),
                "parameters": {"max_new_tokens": 24, "details": True},
            },
        ).json()["details"]
        assert [token["id"] for token in details["tokens"]] == new.tolist()


def test_a_second_turn_about_a_picture_computes_only_what_is_new(stack: Stack) -> None:
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="-")
    data = base64.b64encode(picture(19)).decode()  # of no other test
    picture_part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    messages: list[Any] = [
        {"role": "user", "content": [picture_part, {"type": "text", "text": "What is it?"}]}
    ]

    def turn() -> tuple[str, CompletionUsage]:
        reply = client.chat.completions.create(
            model="default", messages=messages, max_tokens=20, temperature=0
        )
        assert reply.usage is not None and reply.choices[0].message.content
        return reply.choices[0].message.content, reply.usage

    answer, first = turn()
    messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": [{"type": "text", "text": "Sure?"}]})
    reply, second = turn()
    assert first.prompt_tokens_details is not None and second.prompt_tokens_details is not None
    assert first.prompt_tokens_details.cached_tokens == 0
    cached = second.prompt_tokens_details.cached_tokens
    assert cached is not None and cached >= (first.prompt_tokens - 16) // 16 * 16
    again, third = turn()
    assert third.prompt_tokens_details is not None
    assert third.prompt_tokens_details.cached_tokens == (second.prompt_tokens - 1) // 16 * 16
    assert again == reply


def test_streamed_texts_concatenate_to_the_whole(stack: Stack) -> None:
    parameters = {"max_new_tokens": 20, "details": True}
    body = {"inputs": prompt(1), "parameters": parameters}
    with httpx.stream("POST", f"{stack.url}/generate_stream", json=body, timeout=60) as reply:
        assert reply.status_code == 200
        events = [json.loads(line[5:]) for line in reply.iter_lines() if line.startswith("data:")]
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    text = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
    assert text == events[-1]["generated_text"] == stack.generate(prompt(1), max_new_tokens=20)
    assert events[-1]["details"]["finish_reason"] in ("length", "eos_token")


def test_a_client_that_leaves_frees_its_blocks(stack: Stack) -> None:
    before = stack.metric(USED_TOKENS)
    body = {"inputs": prompt(7), "parameters": {"max_new_tokens": 400}}
    with httpx.stream("POST", f"{stack.url}/generate_stream", json=body, timeout=60) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()  # closes the connection when it is dropped
        next(lines)
        assert stack.metric(USED_TOKENS) > before
    stack.wait_metric(USED_TOKENS, before)
    assert stack.metric("tgi_batch_current_size") == 0


BAD = {
    "broken base64": {"inputs": "<image>@@@</image>\nwhat?"},
    "not a picture": {"inputs": f"<image>{base64.b64encode(b'x' * 99).decode()}</image>\nwhat?"},
    "unknown format": {
        "inputs": f"<image>{base64.b64encode(picture(0, 'BMP')).decode()}</image>\nwhat?"
    },
    "address": {"inputs": "![](http://127.0.0.1:1/x.png)what?"},
    "too long": {"inputs": "word " * 3000},
    "wrong type": {"inputs": 5},
    "empty": {"inputs": ""},
    "wrong parameter": {"inputs": "a", "parameters": {"temperature": -1}},
    "wrong parameter type": {"inputs": "a", "parameters": {"max_new_tokens": "many"}},
}


def test_bad_requests_get_a_clear_4xx_and_their_neighbours_are_unharmed(stack: Stack) -> None:
    expected = stack.generate(prompt(4), max_new_tokens=60)

    async def go() -> tuple[str, list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
            body = {"inputs": prompt(4), "parameters": {"max_new_tokens": 60}}
            neighbour = asyncio.create_task(client.post("/generate", json=body))
            replies = await asyncio.gather(
                *(
                    client.post(path, json=bad)
                    for bad in BAD.values()
                    for path in ("/generate", "/generate_stream")
                ),
                client.post(
                    "/generate", content=b"{", headers={"content-type": "application/json"}
                ),
            )
            return (await neighbour).json()["generated_text"], list(replies)

    answer, replies = asyncio.run(go())
    assert answer == expected
    for reply in replies:
        error = reply.json()
        assert 400 <= reply.status_code < 500, (reply.status_code, error)
        assert set(error) >= {"error", "error_type"}
        assert len(error["error"]) > 20 and "Traceback" not in error["error"]
    stack.wait_metric(USED_TOKENS, 0)


def test_huggingface_client_asks_about_a_picture(stack: Stack) -> None:
    client = InferenceClient(stack.url)
    data = base64.b64encode(picture(1)).decode()
    question = f"<image>{data}</image>\nDescribe what you see in this image in detail."
    answer = client.text_generation(question, max_new_tokens=10)
    assert answer == stack.generate(question, max_new_tokens=10)
    pieces = list(client.text_generation(question, max_new_tokens=10, stream=True))
    assert "".join(pieces).strip() == answer.strip()


def test_openai_client_asks_about_a_picture(stack: Stack) -> None:
    client = OpenAI(base_url=f"{stack.url}/v1", api_key="-")
    data = base64.b64encode(picture(1)).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "What?"},
    ]
    messages = [{"role": "user", "content": parts}]
    reply = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=10,
        temperature=0,  # type: ignore[arg-type]
    )
    chunks = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=10,
        temperature=0,
        stream=True,  # type: ignore[arg-type]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == reply.choices[0].message.content
    assert reply.usage is not None and reply.usage.prompt_tokens > 16
    # The chat template's prompt, written by hand, is the same request.
    by_hand = f"[INST] ![](data:image/png;base64,{data})\nWhat? [/INST]"
    assert stack.generate(by_hand, max_new_tokens=10) == text


def test_seeded_sampling_is_the_same_alone_and_in_company(stack: Stack) -> None:
    parameters = {"max_new_tokens": 16, "do_sample": True, "temperature": 1.3, "seed": 7}
    body = {"inputs": prompt(1), "parameters": parameters}
    alone = stack.generate(prompt(1), **parameters)

    async def go() -> list[str]:
        async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
            company = [asyncio.create_task(ask(client, n, 0)) for n in range(6)]
            replies = await asyncio.gather(*(client.post("/generate", json=body) for _ in range(3)))
            await asyncio.gather(*company)
            return [reply.json()["generated_text"] for reply in replies]

    assert asyncio.run(go()) == [alone] * 3


def children_of(stack: Stack) -> list[psutil.Process]:
    return psutil.Process(stack.process.pid).children(recursive=True)


def test_sigterm_lets_a_stream_finish_and_leaves_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    flags = ("--num-shard", "2", "--dtype", "float32")
    with running(checkpoint("llama"), *flags, TMPDIR=str(tmp_path)) as stack:
        children = children_of(stack)
        assert len(children) >= 3
        body = {"inputs": "go on", "parameters": {"max_new_tokens": 120, "details": True}}
        with httpx.stream("POST", f"{stack.url}/generate_stream", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            stack.process.terminate()
            events = [json.loads(line[5:]) for line in lines if line.startswith("data:")]
        assert events[-1]["details"]["finish_reason"] in ("length", "eos_token")
        assert stack.process.wait(30) == 0
    assert not any(child.is_running() for child in children)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_outlasts_the_grace_ends_with_a_reason(
    checkpoint: Callable[[str], Path],
) -> None:
    flags = ("--num-shard", "1", "--graceful-termination-timeout", "3", "--dtype", "float32")
    with running(checkpoint("next-mistral"), *flags) as stack:
        body = {"prompt": "go on", "max_tokens": 4000, "stream": True, "logit_bias": {"2": -100}}
        with httpx.stream("POST", f"{stack.url}/v1/completions", json=body, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            stack.process.terminate()
            events = [line for line in lines if line.startswith("data:")]
        assert events[-1] == "data: [DONE]"
        assert "shutting down" in json.loads(events[-2][5:])["error"]["message"]
        assert stack.process.wait(30) == 0


def test_a_dead_shard_ends_the_server_with_a_reason(checkpoint: Callable[[str], Path]) -> None:
    flags = ["--num-shard", "2", "--dtype", "float32", "--max-shard-restarts", "0"]
    with running(checkpoint("llama"), *flags) as stack:
        children = children_of(stack)
        shard = next(c for c in children if "tessera.shard.main" in " ".join(c.cmdline()))
        shard.kill()
        assert stack.process.wait(30) == 1
        time.sleep(0.2)  # the reader thread takes the last lines
        last = stack.log.splitlines()[-1]
        assert last.startswith("Error: ") and "shard" in last and "was killed by SIGKILL" in last
    assert not any(child.is_running() for child in children)


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    stack = start(tmp_path / "absent")
    assert stack.process.wait(60) == 1
    time.sleep(0.2)
    assert "Traceback" not in stack.log
    assert "Error:" in stack.lines[-1]

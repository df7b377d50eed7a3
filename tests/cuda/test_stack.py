"""The real processes with a shard on the GPU, and under load for LEAK_MINUTES."""

import asyncio
import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.end_to_end import stack as stack_file
from tests.end_to_end.stack import Stack, running

PROCESSES = "import tessera.launcher.main, tessera.router.main, tessera.shard.main"
LEAK_MINUTES = float(os.environ.get("LEAK_MINUTES", "0"))
CLIENTS = 32
PICTURE = Path(__file__).parents[2] / "launcher" / "demo" / "picture.png"

pytestmark = pytest.mark.timeout(600 + 60 * LEAK_MINUTES)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    tried = subprocess.run([sys.executable, "-c", PROCESSES], capture_output=True, text=True)
    if "ModuleNotFoundError" in tried.stderr:
        pytest.skip(f"NO SERVER: its processes are not tested: {tried.stderr.splitlines()[-1]}")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stack_file, "START_TIMEOUT_S", 280)  # kernels are compiled first
        with running(None, "--device", "cuda", "--num-shard", "1", "--dtype", "float32") as stack:
            yield stack


def asked() -> list[str]:
    picture = base64.b64encode(PICTURE.read_bytes()).decode()
    questions = ["How many shapes are there?", "What is shown in this image?"]
    return ["Who are you?", *(f"<image>{picture}</image>\n{question}" for question in questions)]


def test_answers_are_those_of_the_processor(stack: Stack) -> None:
    with running(None, "--device", "cpu", "--num-shard", "1", "--dtype", "float32") as other:
        for inputs in asked():
            expected = other.generate(inputs, max_new_tokens=40)
            assert stack.generate(inputs, max_new_tokens=40) == expected


def test_a_grammar_is_kept(stack: Stack) -> None:
    grammar = {"type": "regex", "value": "(red|blue){2}"}
    text = stack.generate("A colour:", max_new_tokens=20, grammar=grammar)
    assert text in {a + b for a in ("red", "blue") for b in ("red", "blue")}


async def load(stack: Stack, seconds: float) -> int:
    """Clients that ask one thing after the other; how many answers there were."""
    end, answers = time.monotonic() + seconds, 0

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        nonlocal answers
        while time.monotonic() < end:
            parameters = {
                "max_new_tokens": 5 + 11 * number % 90,
                "temperature": 0.1 + number / CLIENTS,
                "repetition_penalty": 1.1 if number % 3 else None,
            }
            body = {"inputs": asked()[answers % 3], "parameters": parameters}
            reply = await client.post("/generate", json=body, timeout=120)
            assert reply.status_code == 200, reply.text
            answers += 1

    async with stack.client() as client:
        await asyncio.gather(*(ask(client, number) for number in range(CLIENTS)))
    return answers


@pytest.mark.skipif(not LEAK_MINUTES, reason="LEAK_MINUTES is not set")
def test_memory_does_not_grow_under_load(stack: Stack) -> None:
    def memory_after(seconds: float) -> float:
        assert asyncio.run(load(stack, seconds)) > CLIENTS
        time.sleep(12)  # the number is read every 5 seconds
        return stack.metric('tessera_shard_memory_bytes{rank="0"}')

    first = memory_after(30)
    assert memory_after(60 * LEAK_MINUTES) <= first * 1.01

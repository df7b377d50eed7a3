"""What the scheduler does behind a client's back changes no answer of the demo model."""

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.asking import Body, alone, ask, together
from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

DEMO = Path(__file__).parents[2] / "launcher" / "demo"
PICTURES = [DEMO / "picture.png", *sorted((DEMO / "samples").glob("*.png"))]
QUESTIONS = ("What is shown in this image?", "How many shapes are there?", "What does it say?")
EXACT = ("--dtype", "float32")  # so that equal means equal


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    """Alone, one step at a time, whole prompts, nothing kept."""
    off = {"LOOKAHEAD": "0", "PREFIX_CACHING": "false", "VISION_CACHE_TOKENS": "0"}
    with running(DEMO / "model", "--num-shard", "1", *EXACT, **off) as stack:
        return alone(stack, bodies())


@pytest.fixture(scope="module")
def tight() -> Iterator[Stack]:
    """Two shards, chunks of 40 tokens, memory for two or three prompts, a step ahead."""
    flags = ["--num-shard", "2", "--max-batch-prefill-tokens", "40", "--max-batch-size", "8"]
    flags += ["--max-total-tokens", "320", "--max-batch-total-tokens", "480"]
    with running(DEMO / "model", *flags, *EXACT) as stack:
        yield stack


def bodies() -> list[Body]:
    """Questions about pictures, half of them sampled with a seed; some ask the same."""
    found = []
    for number in range(24):
        picture = base64.b64encode(PICTURES[number % len(PICTURES)].read_bytes()).decode()
        text = f"<image>{picture}</image>\n{QUESTIONS[number % len(QUESTIONS)]}"
        sampled = {"temperature": 1.5, "seed": number} if number % 2 else {}
        found.append(ask(text, 40, **sampled))
    return found


def test_chunks_lookahead_and_caches_change_no_answer(
    tight: Stack, answers: list[list[int]]
) -> None:
    """Item by item the same tokens as alone, although all of that happens."""
    for _ in range(2):  # the second time with warm caches
        assert asyncio.run(together(tight, bodies())) == answers
    assert tight.metric("tessera_prefix_cache_hits_total") > 0
    assert tight.metric("tessera_vision_cache_hits_total") > 0
    largest = 'tessera_step_tokens_bucket{le="64.0",method="prefill"}'
    everything = 'tessera_step_tokens_count{method="prefill"}'
    assert tight.metric(largest) == tight.metric(everything)  # no step over its 40 tokens
    tight.wait_metric("tgi_batch_current_max_tokens", 0)


def test_preempted_answers_are_what_they_are_alone(tight: Stack) -> None:
    """Eight that go on for 150 tokens cannot all stay in 480 tokens of cache."""

    async def go(at_once: int) -> list[str]:
        gate = asyncio.Semaphore(at_once)

        async def one(number: int) -> str:
            async with gate, tight.client() as client:
                body = {"prompt": f"[INST] {number} [/INST]", "max_tokens": 150, "temperature": 0}
                body |= {"logit_bias": {"2": -100}, "cache_prompt": False}
                reply = await client.post("/v1/completions", json=body)
                assert reply.status_code == 200, reply.text
                return str(reply.json()["choices"][0]["text"])

        return await asyncio.gather(*(one(number) for number in range(8)))

    expected = asyncio.run(go(1))
    before = tight.metric("tessera_num_preemptions_total")
    assert asyncio.run(go(8)) == expected
    assert tight.metric("tessera_num_preemptions_total") > before


def test_a_priority_goes_first(tight: Stack) -> None:
    """Of many that wait, the last to come with a priority is not the last to be answered."""

    async def go() -> list[int]:
        done: list[int] = []

        async def one(number: int, **more: int) -> None:
            async with tight.client() as client:
                body = {"prompt": f"[INST] {number} {'red ' * 90} [/INST]", "max_tokens": 200}
                body |= {"logit_bias": {"2": -100}, "cache_prompt": False, **more}
                reply = await client.post("/v1/completions", json=body)
                assert reply.status_code == 200, reply.text
                done.append(number)

        others = [asyncio.create_task(one(number)) for number in range(15)]
        while await asyncio.to_thread(tight.metric, "tessera_num_requests_waiting") < 10:
            assert len(done) < 3, "they are answered before they have to wait"
        await asyncio.gather(one(15, priority=50), *others)
        return done

    assert asyncio.run(go()).index(15) < 12

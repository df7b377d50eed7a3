"""When requests are let in, and how many pictures a step takes, on the demo model."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.asking import ask, endless, png, together, token_ids
from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

DEMO = Path(__file__).parents[2] / "launcher" / "demo" / "model"
WAIT = 6
DECODES = 'tgi_batch_inference_count{method="decode"}'
ENCODED_STEPS = "tessera_image_encode_seconds_count"
ENCODED = "tessera_vision_cache_misses_total"


@pytest.fixture(scope="module")
def patient() -> Iterator[Stack]:
    """Lets nobody in for `WAIT` decode steps while somebody runs; one picture a step."""
    flags = ["--num-shard", "1", "--waiting-served-ratio", "100"]
    flags += ["--max-waiting-tokens", str(WAIT), "--max-step-tiles", "3"]
    with running(DEMO, *flags) as stack:
        yield stack


def decodes_until_answered(stack: Stack) -> float:
    """Decode steps that go by for somebody else between a request and its only token."""

    async def go() -> float:
        async with stack.client() as client:
            body = endless("tell me", max_tokens=1500)
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.aiter_lines()
                while not (await anext(lines)).startswith("data:"):
                    pass
                before = stack.metric(DECODES)
                await token_ids(client, ask("hello", 1))
                after = stack.metric(DECODES)
                await lines.aclose()
                return after - before

    return asyncio.run(go())


def test_a_request_waits_for_max_waiting_tokens_while_few_wait(patient: Stack) -> None:
    waited = [decodes_until_answered(patient) for _ in range(3)]
    assert min(waited) >= WAIT
    # Steps also go by while the request and its answer are on their way; but nobody waits for ever.
    assert max(waited) < 1000


def test_nobody_waits_while_nothing_runs(patient: Stack) -> None:
    patient.wait_metric("tgi_batch_current_size", 0)
    before = patient.metric(DECODES)
    together_now = asyncio.run(together(patient, [ask("hello", 1)]))
    assert len(together_now[0]) == 1
    assert patient.metric(DECODES) - before <= 1  # the step that releases it may count


def test_a_step_encodes_no_more_tiles_than_allowed(patient: Stack) -> None:
    steps, pictures = patient.metric(ENCODED_STEPS), patient.metric(ENCODED)
    bodies = [ask(f"<image>{png(200, 100, seed)}</image>\nWhat?", 3) for seed in range(4)]
    asyncio.run(together(patient, bodies))
    assert patient.metric(ENCODED) - pictures == 4
    assert patient.metric(ENCODED_STEPS) - steps == 4  # three tiles each: one picture a step

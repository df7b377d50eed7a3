"""Shards that launch each step before the one before it is read answer as those that do not."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import checkpoints
from tests.end_to_end.asking import Body, alone, ask, endless, question, streaming, together
from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

AHEAD = Path(__file__).parent / "ahead"
FLAGS = ("--num-shard", "1", "--backend", "reference", "--dtype", "float32")
FEW_TOKENS = ("--max-batch-total-tokens", "304", "--max-total-tokens", "256")
SAID = "a step was launched ahead"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("next-mistral", tmp_path_factory.mktemp("ahead") / "model")


@pytest.fixture(scope="module")
def ahead(model: Path) -> Iterator[Stack]:
    """With so few blocks that sequences are preempted."""
    environ = {"PYTHONPATH": str(AHEAD), "RUN_AHEAD": "1"}
    with running(model, *FLAGS, *FEW_TOKENS, **environ) as stack:
        yield stack


def bodies() -> list[Body]:
    """Of every kind, seeded, so that company changes nothing."""
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.4}
    choice = {"type": "regex", "value": "(red|green|blue){1,6}"}
    return [
        ask(question(1), 60),
        ask(question(2), 60, **penalties),
        ask(question(3, (80, 60)), 50, do_sample=True, seed=11, temperature=0.9, **penalties),
        ask(question(4, (60, 80), (30, 30)), 40, do_sample=True, seed=12, top_k=20, top_p=0.9),
        ask(question(5), 30, grammar=choice, do_sample=True, seed=13),
        ask(question(6), 60, do_sample=True, seed=14, typical_p=0.8, stop=["e"]),
        ask(question(7), 60, top_n_tokens=3, decoder_input_details=True),
        ask(question(8, (40, 40)), 1),
    ]


def test_the_answers_are_the_same_in_company_and_with_few_blocks(ahead: Stack, model: Path) -> None:
    with running(model, *FLAGS) as plain:
        expected = alone(plain, bodies())
        assert SAID not in plain.log
    assert sum(len(ids) for ids in expected) > 100
    for _ in range(2):  # the second time what prompts share is in the cache
        assert asyncio.run(together(ahead, bodies())) == expected
    assert ahead.metric("tessera_num_preemptions_total") > 0
    assert SAID in ahead.log


def test_clients_that_leave_in_the_middle_harm_nobody(ahead: Stack) -> None:
    async def go() -> list[list[int]]:
        async with ahead.client() as client:
            for seed in range(6):
                async with streaming(client, endless(question(20 + seed), 200)) as events:
                    for _ in range(3):
                        await anext(events)
        return await together(ahead, bodies()[:3])

    assert asyncio.run(go()) == alone(ahead, bodies()[:3])

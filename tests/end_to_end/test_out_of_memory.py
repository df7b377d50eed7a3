"""A forward pass that runs out of memory on one rank is done in parts; nobody is failed for it."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import checkpoints
from tests.end_to_end.asking import ask, endless, question, streaming, words
from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

SCARCITY = Path(__file__).parent / "scarcity"
PLENTY = 1_000_000
GREEDY = {"max_tokens": 12, "temperature": 0}
LONG = {"prompt": words(1, 150), **GREEDY}


class Memory:
    """How many rows one rank has room for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.set(0, PLENTY)

    def set(self, rank: int, rows: int) -> None:
        complete = self.file.with_suffix(".new")
        complete.write_text(json.dumps({"rank": rank, "rows": rows}))
        complete.rename(self.file)


@pytest.fixture(scope="module", params=[1, 2])
def started(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Stack, Memory]]:
    folder = tmp_path_factory.mktemp("scarce")
    memory = Memory(folder / "memory.json")
    model = checkpoints.make("next-mistral", folder / "model")
    flags = ["--num-shard", str(request.param), "--backend", "reference", "--dtype", "float32"]
    environ = {"PYTHONPATH": str(SCARCITY), "SCARCITY": str(memory.file)}
    with running(model, *flags, **environ) as stack:
        yield stack, memory


@pytest.mark.parametrize("rows", [40, 7])
def test_nobody_notices_that_a_rank_was_short(started: tuple[Stack, Memory], rows: int) -> None:
    stack, memory = started
    picture = ask(question(3, (60, 50)), 8, cache_prompt=False)
    long = LONG | {"cache_prompt": False}
    expected = [stack.post("/v1/completions", long).json()["choices"][0]["text"]]
    expected.append(stack.post("/generate", picture).json()["generated_text"])

    async def go() -> None:
        async with stack.client() as client, streaming(client, endless("go on", 300)) as events:
            await anext(events)
            replies = await asyncio.gather(
                client.post("/v1/completions", json=long), client.post("/generate", json=picture)
            )
            assert [reply.status_code for reply in replies] == [200, 200]
            assert replies[0].json()["choices"][0]["text"] == expected[0]
            assert replies[1].json()["generated_text"] == expected[1]
            assert "choices" in await anext(events)

    for rank in range(2 if "shard 1" in stack.log else 1):
        memory.set(rank, rows)
        try:
            asyncio.run(go())
        finally:
            memory.set(0, PLENTY)
    assert "out of memory" in stack.log
    stack.wait_metric("tessera_kv_cache_used_tokens", 0)


def test_no_room_for_a_single_token_is_told_and_passes(started: tuple[Stack, Memory]) -> None:
    stack, memory = started
    before = stack.post("/v1/completions", LONG).json()["choices"][0]["text"]
    memory.set(0, 0)
    try:
        reply = stack.post("/v1/completions", LONG | {"prompt": words(5, 20)})
    finally:
        memory.set(0, PLENTY)
    assert reply.status_code == 424
    assert "MAX_BATCH_PREFILL_TOKENS" in reply.json()["error"]["message"]
    assert stack.post("/v1/completions", LONG).json()["choices"][0]["text"] == before

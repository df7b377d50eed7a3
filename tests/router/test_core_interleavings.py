"""The loop under every interleaving of endings, with and without steps under way.

Each client must read exactly what it would read alone, whatever ends around it, however late the
replies come, and also when its sequence is preempted.
"""

import asyncio
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tessera.proto import shard_pb2
from tessera.router.blocks import BlockPool
from tessera.router.core import Core
from tessera.router.errors import GenerationError
from tessera.router.generation import ServingLimits
from tessera.router.metrics import Metrics
from tessera.router.request import Request, SamplingParams, StoppingParams
from tessera.router.scheduler import SchedulerLimits, StepPlan
from tessera.router.sequence import Sequence
from tessera.router.shards import ShardsLost
from tessera.router.tokenizer import Tokenizer
from tests.step_columns import add_token

EOS, FIRST_ID, NUM_IDS, STOP_ID = 2, 300, 23, 305
BLOCK_SIZE = 4


@dataclass(frozen=True)
class Client:
    """One request and what its client does."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    has_stop: bool
    fails_at: int | None  # its sequence fails at this generated token
    leaves_after: int | None  # the client closes after reading so many
    arrives_at: int  # turns of the event loop before it asks


Outcome = tuple[list[int], str]


class ModelShards:
    """Shards whose model is a function of all tokens so far; replies come some turns late."""

    def __init__(
        self, clients: list[Client], delay: int, lost_at: frozenset[int] = frozenset()
    ) -> None:
        """`lost_at`: the steps, counted from 0, whose replies do not come."""
        self._by_prompt = {client.prompt: client for client in clients}
        self._delay = delay
        self._lost_at = lost_at
        self._num_awaited = 0
        self._tokens: dict[int, list[int]] = {}
        self._replies: deque[shard_pb2.StepReply] = deque()
        self.sent = 0

    def start_anew(self) -> None:
        self._tokens.clear()
        self._replies.clear()

    async def send(self, plan: StepPlan) -> int:
        self.sent += 1
        self._replies.append(self._run(plan))
        return self.sent

    async def receive(self, step_id: int) -> shard_pb2.StepReply:
        for _ in range(self._delay):
            await asyncio.sleep(0)
        self._num_awaited += 1
        if self._num_awaited - 1 in self._lost_at:
            raise ShardsLost("shard 0 is gone")
        return self._replies.popleft()

    def _run(self, plan: StepPlan) -> shard_pb2.StepReply:
        for number in plan.released_sequence_ids:
            del self._tokens[number]
        reply = shard_pb2.StepReply()
        for row in plan.decodes:
            if row.token_id is not None:
                tokens = self._tokens[row.sequence.sequence_id]
                tokens[row.context_len - 1 :] = [row.token_id]
            self._sample(row.sequence, reply)
        for chunk in plan.chunks:
            tokens = self._tokens.setdefault(chunk.sequence.sequence_id, [])
            tokens[:] = chunk.sequence.token_ids[: chunk.last]
            if chunk.is_last:
                self._sample(chunk.sequence, reply)
        return reply

    def _sample(self, sequence: Sequence, reply: shard_pb2.StepReply) -> None:
        tokens = self._tokens[sequence.sequence_id]
        token_id = next_token(tokens)
        tokens.append(token_id)
        client = self._by_prompt[sequence.request.prompt_ids]
        if len(tokens) - len(client.prompt) == client.fails_at:
            reply.failures.add(sequence_id=sequence.sequence_id, message="not finite")
        else:
            add_token(reply, sequence_id=sequence.sequence_id, token_id=token_id)


def next_token(tokens: list[int]) -> int:
    value = crc32(array("I", tokens)) % (NUM_IDS + 1)
    return EOS if value == NUM_IDS else FIRST_ID + value


@st.composite
def clients_strategy(draw: st.DrawFn) -> list[Client]:
    maybe = st.none() | st.integers(1, 12)
    return [
        Client(
            # Prompts share their beginnings and differ in the end, which tells them apart.
            prompt=(400,) * draw(st.integers(0, 20)) + (500 + number,),
            max_new_tokens=draw(st.integers(1, 16)),
            has_stop=draw(st.booleans()),
            fails_at=draw(maybe),
            leaves_after=draw(maybe),
            arrives_at=draw(st.integers(0, 40)),
        )
        for number in range(draw(st.integers(1, 7)))
    ]


async def read(core: Core, client: Client, stop: str) -> Outcome:
    stops = (stop,) if client.has_stop else ()
    request = Request(
        client.prompt, (), SamplingParams(), StoppingParams(client.max_new_tokens, stops)
    )
    for _ in range(client.arrives_at):
        await asyncio.sleep(0)
    stream = core.submit(request)
    ids: list[int] = []
    text = ""
    try:
        while True:
            for event in await stream.next_events():
                ids.append(event.token.id)
                text += event.text
                if event.completion is not None:
                    assert event.completion.text == text
                    assert event.completion.generated_tokens == len(ids)
                    return ids, event.completion.reason.value
                if len(ids) == client.leaves_after:
                    return ids, "left"
    except GenerationError:
        return ids, "failed"
    finally:
        stream.close()


async def run(core: Core, shards: ModelShards, num_blocks: int) -> None:
    """As the router's main does: new shards in place of lost ones, a while later."""
    while True:
        limits = ServingLimits(99, 99, 16, 99, 4)
        pool = BlockPool(num_blocks, BLOCK_SIZE)
        core.open(limits, SchedulerLimits(16, 4, 2, 0.5, 4), pool)
        try:
            await core.run()
        except ShardsLost as error:
            core.suspend(error)
        for _ in range(5):
            await asyncio.sleep(0)
        shards.start_anew()


def serve(
    tokenizer: Tokenizer,
    clients: list[Client],
    lookahead: int,
    delay: int,
    num_blocks: int,
    lost_at: frozenset[int] = frozenset(),
) -> list[Outcome]:
    async def go() -> list[Outcome]:
        shards = ModelShards(clients, delay, lost_at)
        core = Core(shards, tokenizer, frozenset({EOS}), Metrics(), lookahead)  # type: ignore[arg-type]
        running = asyncio.create_task(run(core, shards, num_blocks))
        await asyncio.sleep(0)
        stop = tokenizer.token_text(STOP_ID).strip()
        try:
            outcomes = await asyncio.wait_for(
                asyncio.gather(*(read(core, client, stop) for client in clients)), 20
            )
            for _ in range(20 * (delay + 1)):  # what is under way comes back
                await asyncio.sleep(0)
            assert core._scheduler is not None
            assert core._scheduler.pool.num_free == num_blocks
            assert shards._tokens == {}
            return list(outcomes)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    return asyncio.run(go())


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.from_folder(checkpoint("llama"))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    clients=clients_strategy(),
    lookahead=st.integers(0, 2),
    delay=st.integers(0, 3),
    num_blocks=st.integers(10, 24),
)
def test_everybody_reads_what_they_would_read_alone(
    tokenizer: Tokenizer, clients: list[Client], lookahead: int, delay: int, num_blocks: int
) -> None:
    alone = [serve(tokenizer, [client], 0, 0, 24)[0] for client in clients]
    together = serve(tokenizer, clients, lookahead, delay, num_blocks)
    assert together == alone


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    clients=clients_strategy(),
    lookahead=st.integers(0, 2),
    delay=st.integers(0, 3),
    num_blocks=st.integers(10, 24),
    lost_at=st.frozensets(st.integers(0, 40), min_size=1, max_size=3),
)
def test_nobody_notices_that_shards_were_lost(
    tokenizer: Tokenizer,
    clients: list[Client],
    lookahead: int,
    delay: int,
    num_blocks: int,
    lost_at: frozenset[int],
) -> None:
    """But for a pause, and who computed during two losses and may be the reason for them."""
    alone = [serve(tokenizer, [client], 0, 0, 24)[0] for client in clients]
    together = serve(tokenizer, clients, lookahead, delay, num_blocks, lost_at)
    for outcome, expected in zip(together, alone, strict=True):
        if outcome != expected:
            ids, end = outcome
            assert len(lost_at) > 1 and end == "failed"
            assert ids == expected[0][: len(ids)]


def test_whoever_computes_while_shards_are_lost_twice_is_not_tried_again(
    tokenizer: Tokenizer,
) -> None:
    client = Client((400,), 16, False, None, None, 0)
    (ids, end), *_ = serve(tokenizer, [client], 1, 0, 24)
    assert len(ids) > 6 and end != "failed"
    assert serve(tokenizer, [client], 1, 0, 24, frozenset({3})) == [(ids, end)]
    assert serve(tokenizer, [client], 1, 0, 24, frozenset({3, 5})) == [(ids[:4], "failed")]


def test_all_kinds_of_endings_happen(tokenizer: Tokenizer) -> None:
    """The property above would say nothing if every request ended the same way."""
    base = [Client((400,) * n + (500 + n,), 16, n % 2 == 0, None, None, 0) for n in range(16)]
    reasons = {reason for _, reason in serve(tokenizer, base, 1, 1, 100)}
    assert reasons == {"length", "eos_token", "stop_sequence"}

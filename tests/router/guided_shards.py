"""Shards that sample by chance what the masks allow, and guides to follow."""

import asyncio
import random
from array import array
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from zlib import crc32

from tessera.proto import shard_pb2
from tessera.router.generation import TokenStream
from tessera.router.grammar import Grammar
from tessera.router.guidance_compile import Guide, Vocabulary, compile_grammar
from tessera.router.model_files import ModelFiles
from tessera.router.request import Request, SamplingParams, StoppingParams, TokenEvent
from tessera.router.scheduler import StepPlan
from tessera.router.sequence import Sequence
from tessera.router.tokenizer import Tokenizer
from tests.step_columns import add_token

EOS = 2
SOON_S = 10.0
CLOSING = frozenset('"]}')


class Guides:
    """Compiles for one checkpoint, without the limits."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        size = ModelFiles.read(folder).vocab_size
        self.vocabulary = Vocabulary(self.tokenizer.definition(), size, (EOS,))
        self._trie = self.vocabulary.load()

    def compile(self, grammar: Grammar, *, is_slow: bool = False) -> Guide:
        matcher = compile_grammar(self._trie, grammar)
        return Guide(matcher, self.vocabulary.mask_bytes, grammar.digest, is_slow)

    def closing_ids(self) -> frozenset[int]:
        """Tokens that bring an answer nearer to its end."""
        ids = range(self.tokenizer.vocab_size)
        return frozenset(i for i in ids if CLOSING & set(self.tokenizer.token_text(i))) | {EOS}


def guided_request(
    prompt: tuple[int, ...], guide: Guide | None, max_new_tokens: int, stop: tuple[str, ...] = ()
) -> Request:
    return Request(prompt, (), SamplingParams(), StoppingParams(max_new_tokens, stop), guide=guide)


async def events_of(stream: TokenStream) -> AsyncIterator[TokenEvent]:
    """One by one, up to and with the last."""
    while True:
        for event in await stream.next_events():
            yield event
            if event.completion is not None:
                return


class GuidedShards:
    """A model whose next token is a function of all tokens so far and of the mask.

    Steps run when their reply is asked for, so that tokens are known no earlier than in truth; a
    step waits for the masks of its guided rows and for no others.
    """

    def __init__(
        self,
        closing: frozenset[int] = frozenset(),
        delay: int = 0,
        fails_at: Mapping[tuple[int, ...], int] | None = None,
    ) -> None:
        """
        Args:
            closing: tokens that are taken every other time they are allowed.
            delay: turns of the event loop that a step takes.
            fails_at: by prompt, the generated token at which its sequence fails.
        """
        self._closing = closing
        self._delay = delay
        self._fails_at = fails_at or {}
        self._steps: deque[tuple[int, list[_Row], list[int]]] = deque()
        self._tokens: dict[int, list[int]] = {}
        self._masks: defaultdict[int, dict[int, bytes]] = defaultdict(dict)
        self._changed = asyncio.Condition()
        self._num_steps = 0
        self.num_live = 0

    async def send(self, plan: StepPlan) -> int:
        self._num_steps += 1
        rows = [_Row(r.sequence, r.context_len, (), r.token_id, True) for r in plan.decodes]
        for chunk in plan.chunks:
            known = tuple(chunk.sequence.token_ids[: chunk.last])
            rows.append(_Row(chunk.sequence, chunk.last, known, None, chunk.is_last))
        self._steps.append((self._num_steps, rows, list(plan.released_sequence_ids)))
        return self._num_steps

    async def send_masks(self, step_id: int, masks: Mapping[int, bytes]) -> None:
        async with self._changed:
            assert not self._masks[step_id].keys() & masks.keys()
            self._masks[step_id].update(masks)
            self._changed.notify_all()

    async def receive(self, step_id: int) -> shard_pb2.StepReply:
        number, rows, released = self._steps.popleft()
        assert number == step_id
        for sequence_id in released:
            del self._tokens[sequence_id]
        for _ in range(self._delay):
            await asyncio.sleep(0)
        sampled = {row.sequence.sequence_id for row in rows if row.is_sampled and row.is_guided}
        async with self._changed:
            async with asyncio.timeout(SOON_S):
                await self._changed.wait_for(lambda: self._masks[step_id].keys() >= sampled)
            masks = self._masks.pop(step_id)
        assert masks.keys() == sampled
        reply = shard_pb2.StepReply(step_id=step_id)
        for row in rows:
            self._run(row, masks, reply)
        self.num_live = len(self._tokens)
        return reply

    def _run(self, row: "_Row", masks: Mapping[int, bytes], reply: shard_pb2.StepReply) -> None:
        sequence_id = row.sequence.sequence_id
        tokens = self._tokens.setdefault(sequence_id, [])
        if row.known:
            tokens[:] = row.known
        elif row.token_id is not None:
            tokens[row.context_len - 1 :] = [row.token_id]
        assert len(tokens) == row.context_len
        if not row.is_sampled:
            return
        token_id = self._choose(tokens, masks.get(sequence_id, b""))
        tokens.append(token_id)
        prompt = row.sequence.request.prompt_ids
        if len(tokens) - len(prompt) == self._fails_at.get(prompt):
            reply.failures.add(sequence_id=sequence_id, message="not finite")
        else:
            add_token(reply, sequence_id=sequence_id, token_id=token_id)

    def _choose(self, tokens: list[int], mask: bytes) -> int:
        chance = random.Random(crc32(array("I", tokens)))
        allowed = allowed_ids(mask) if mask else [*range(300, 330), EOS]
        closing = [token_id for token_id in allowed if token_id in self._closing]
        return chance.choice(closing if closing and chance.random() < 0.5 else allowed)


class _Row:
    """One row of a step, as it was when the step was sent."""

    def __init__(
        self,
        sequence: Sequence,
        context_len: int,
        known: tuple[int, ...],
        token_id: int | None,
        is_sampled: bool,
    ) -> None:
        self.sequence = sequence
        self.context_len = context_len
        self.known = known
        self.token_id = token_id
        self.is_sampled = is_sampled
        self.is_guided = sequence.request.guide is not None


def allowed_ids(mask: bytes) -> list[int]:
    return [i for i in range(8 * len(mask)) if mask[i // 8] >> (i % 8) & 1]

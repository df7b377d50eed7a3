"""The steps that are timed, and the messages that ask a shard for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

from benchmark.steps.work import Sizes, Work
from tessera.proto import shard_pb2
from tessera.proto.columns import SAMPLED_LAST

BLOCK_SIZE = 16
STEPS_PER_ROUND = 8  # decode steps in a row, in the middle of which the context is the case's


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of step. Which fields count depends on the kind."""

    kind: str  # decode, prefill or pictures
    batch: int = 1  # sequences
    length: int = 0  # decode: tokens a sequence sees; prefill: tokens of each prompt
    tiles: int = 0  # pictures: tiles of one picture, the overview included

    @property
    def name(self) -> str:
        """What the case is called in results."""
        if self.kind == "pictures":
            return f"picture of {self.tiles} tiles"
        return f"{self.kind} {self.batch}x{self.length}"

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache it takes."""
        return self.batch * -(-(self.length + STEPS_PER_ROUND) // BLOCK_SIZE)

    def work(self, sizes: Sizes) -> Work:
        """What it makes a device do."""
        if self.kind == "pictures":
            return sizes.pictures(self.tiles)
        if self.kind == "decode":
            return sizes.decode(self.batch, self.length)
        return sizes.prefill(self.batch, self.length)


def _grid(kind: str, batches: Sequence[int], lengths: Sequence[int]) -> list[Case]:
    return [Case(kind, batch, length) for length in lengths for batch in batches]


TEXT = [*_grid("decode", (1, 8, 32), (128, 1024)), *_grid("prefill", (1,), (128, 512))]
PICTURES = [Case("pictures", tiles=tiles) for tiles in (1, 3, 5)]
GROWTH = {
    "batch": _grid("decode", (1, 2, 4, 8, 16, 32, 64), (128,)),
    "context": _grid("decode", (8,), (128, 256, 512, 1024, 2048)),
}
"""What grows -> cases of one model over which it does."""


class StepWriter:
    """Messages to one shard, as a router would write them; ids go on from case to case."""

    def __init__(self, num_blocks: int, tile: int = 0) -> None:
        """Blocks 1..num_blocks are used in a random order; `tile`: pixels of a tile's side."""
        self._blocks = list(range(1, num_blocks + 1))
        Random(0).shuffle(self._blocks)
        self._tile = tile
        self._step_ids = count()
        self._sequence_ids = count()
        self._live: list[int] = []
        self._pictures: list[bytes] = []

    def steps(self, case: Case) -> Iterator[tuple[shard_pb2.Step, bool]]:
        """A round of a case, step by step, and whether a step is to be timed."""
        if case.kind == "pictures":
            yield self._picture(case.tiles), True
        elif case.kind == "prefill":
            yield self._prompts(case, case.length, 0), True
        else:
            before = case.length - STEPS_PER_ROUND // 2 - 1
            yield self._prompts(case, 1, max(0, before)), False
            for n in range(STEPS_PER_ROUND):
                yield self._decode(max(0, before) + 2 + n), True

    def clear(self) -> shard_pb2.Step:
        """A step that forgets all sequences and pictures."""
        return self._step()

    def _step(self) -> shard_pb2.Step:
        step = shard_pb2.Step(
            step_id=next(self._step_ids),
            released_sequence_ids=self._live,
            released_images=self._pictures,
        )
        self._live, self._pictures = [], []
        return step

    def _prompts(self, case: Case, new: int, cached: int) -> shard_pb2.Step:
        """New sequences whose first `cached` tokens are said to be in the cache."""
        step = self._step()
        per_sequence = case.num_blocks // case.batch
        for row in range(case.batch):
            blocks = self._blocks[row * per_sequence : (row + 1) * per_sequence]
            step.chunks.add(
                sequence_id=next(self._sequence_ids),
                first_position=cached,
                token_ids=[3 + (7 * row + n) % 500 for n in range(new)],
                new_block_ids=blocks,
                is_last=True,
                sampling=shard_pb2.SamplingParams(),
                num_prompt_tokens=cached + new,
            )
        self._live = [chunk.sequence_id for chunk in step.chunks]
        return step

    def _decode(self, context: int) -> shard_pb2.Step:
        decodes = shard_pb2.Decodes(
            sequence_ids=self._live,
            token_ids=[SAMPLED_LAST] * len(self._live),
            context_lens=[context] * len(self._live),
        )
        return shard_pb2.Step(step_id=next(self._step_ids), decodes=decodes)

    def _picture(self, tiles: int) -> shard_pb2.Step:
        """One picture; beside the overview its tiles stand in a column, or two by two for four."""
        step = self._step()
        rows, columns = (2, 2) if tiles == 5 else (max(0, tiles - 1), int(tiles > 1))
        content_hash = step.step_id.to_bytes(16, "big")
        step.images.add(
            content_hash=content_hash,
            height=self._tile * max(1, rows),
            width=self._tile * max(1, columns),
            num_tiles=tiles,
            tiles=bytes(tiles * 3 * self._tile**2),
            grid_rows=rows,
            grid_columns=columns,
        )
        self._pictures = [content_hash]
        return step

"""From a step's message to the tensors of one forward pass."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.proto.columns import SAMPLED_LAST
from tessera.shard.backends.base import LastRows, StepLayout
from tessera.shard.errors import DivergenceError
from tessera.shard.kv_cache import side_by_side, slots
from tessera.shard.sequence import SequenceState
from tessera.shard.unread_tokens import is_placeholder, resolved
from tessera.shard.upload import upload_together


@dataclass(frozen=True, slots=True)
class Splice:
    """Image features that replace the embeddings of placeholder tokens."""

    sequence_id: int
    content_hash: bytes
    first_row: int  # in the packed inputs
    first_feature: int
    length: int


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Rows whose logits score the prompt itself."""

    sequence: SequenceState
    first_row: int
    first_position: int
    length: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass: decode rows first, then the chunks, packed without padding."""

    ids_T: Tensor
    layout: StepLayout
    splices: list[Splice]
    sequences: list[SequenceState]  # one per row of the layout
    sampled: list[SequenceState]  # one per row of `sample_rows`
    sample_rows: list[int]  # rows of T whose next token is sampled
    prompt_spans: list[PromptSpan]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return self.ids_T.shape[0]

    @property
    def is_decode(self) -> bool:
        """Whether it is one token for each sequence, the next to be sampled after each."""
        is_single = len(self.sample_rows) == len(self.sequences) == self.num_tokens
        return is_single and not self.splices and not self.prompt_spans


class BatchBuilder:
    """Keeps the live sequences and turns every step into a `Batch`."""

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._device = device
        self._is_host = device.type == "cpu"  # asked once: torch makes a string of it at each call
        self._block_size = block_size
        self.sequences: dict[int, SequenceState] = {}

    def release(self, sequence_ids: Iterable[int]) -> None:
        """Forget sequences; unknown ids are those that failed here before and are harmless."""
        for sequence_id in sequence_ids:
            self.sequences.pop(sequence_id, None)

    def clear(self) -> None:
        """Forget every sequence."""
        self.sequences.clear()

    def build(self, step: shard_pb2.Step, chosen_R: Tensor | None = None) -> Batch | None:
        """The tensors of `step`, or None when it computes nothing.

        Args:
            chosen_R: the tokens of the step before, if the host may not have read them
                (`unread_tokens`).

        Raises:
            DivergenceError: the step speaks of a sequence or position this shard does not have.
        """
        rows = _Rows()
        self._add_decodes(step.decodes, rows)
        for chunk in step.chunks:
            self._add_chunk(chunk, rows)
        if not rows.ids:
            return None
        ids_T, layout = self._tensors(rows)
        if rows.has_unread:
            ids_T = resolved(ids_T, chosen_R)
        return Batch(
            ids_T=ids_T,
            layout=layout,
            splices=rows.splices,
            sequences=rows.sequences,
            sampled=rows.sampled,
            sample_rows=rows.sample_rows,
            prompt_spans=rows.prompt_spans,
        )

    def _add_decodes(self, decodes: shard_pb2.Decodes, rows: "_Rows") -> None:
        for grown in decodes.new_blocks:
            self._known(grown.sequence_id).blocks.extend(grown.block_ids)
        block_size = self._block_size
        columns = (decodes.sequence_ids, decodes.token_ids, decodes.context_lens)
        for sequence_id, token_id, context_len in zip(*columns, strict=True):
            sequence = self._known(sequence_id)
            position = sequence.context_len
            if context_len != position + 1:
                raise DivergenceError(
                    f"sequence {sequence_id}: asked for context {context_len}, "
                    f"have {position} tokens"
                )
            if token_id != SAMPLED_LAST:
                del sequence.token_ids[position:]
                sequence.token_ids.append(token_id)
            token_id = sequence.token_ids[position]
            rows.ids.append(token_id)
            if is_placeholder(token_id):
                rows.has_unread = True
            column, offset = divmod(position, block_size)
            try:
                rows.slots.append(sequence.blocks[column] * block_size + offset)
            except IndexError:
                raise _no_room(sequence, context_len) from None
            sequence.context_len = context_len
            rows.sequences.append(sequence)
        rows.end_singles()

    def _known(self, sequence_id: int) -> SequenceState:
        sequence = self.sequences.get(sequence_id)
        if sequence is None:
            raise DivergenceError(f"sequence {sequence_id}: no such sequence")
        return sequence

    def _add_chunk(self, chunk: shard_pb2.Chunk, rows: "_Rows") -> None:
        sequence = self._chunk_sequence(chunk)
        sequence.blocks.extend(chunk.new_block_ids)
        first, length = len(rows.ids), len(chunk.token_ids)
        last = sequence.context_len + length
        rows.ids.extend(chunk.token_ids)
        rows.positions.extend(range(sequence.context_len, last))
        try:
            rows.slots += slots(sequence.blocks, sequence.context_len, last, self._block_size)
        except IndexError:
            raise _no_room(sequence, last) from None
        if sequence.sampling.prompt_logprobs:
            rows.prompt_spans.append(PromptSpan(sequence, first, chunk.first_position, length))
        for span in chunk.images:
            rows.splices.append(
                Splice(
                    sequence.sequence_id,
                    span.content_hash,
                    first + span.offset,
                    span.first_feature,
                    span.length,
                )
            )
        sequence.token_ids.extend(chunk.token_ids)
        sequence.context_len = last
        rows.end_span(sequence)
        if chunk.is_last:
            rows.sample(sequence)

    def _chunk_sequence(self, chunk: shard_pb2.Chunk) -> SequenceState:
        sequence = self.sequences.get(chunk.sequence_id)
        if sequence is None and chunk.HasField("sampling"):
            sequence = self._start(chunk)
        if sequence is None or sequence.context_len != chunk.first_position:
            have = "no such sequence" if sequence is None else f"{sequence.context_len} tokens"
            raise DivergenceError(
                f"sequence {chunk.sequence_id}: chunk from {chunk.first_position}, have {have}"
            )
        return sequence

    def _start(self, chunk: shard_pb2.Chunk) -> SequenceState:
        """A new sequence; what lies before its first position was computed for others."""
        sequence = SequenceState(
            chunk.sequence_id,
            chunk.sampling,
            chunk.num_prompt_tokens,
            context_len=chunk.first_position,
            token_ids=array("q", chunk.cached_token_ids or [0] * chunk.first_position),
        )
        self.sequences[chunk.sequence_id] = sequence
        return sequence

    def _tensors(self, rows: "_Rows") -> tuple[Tensor, StepLayout]:
        """The token ids and where they sit."""
        tables = [sequence.blocks for sequence in rows.sequences]
        columns = max(map(len, tables))
        # Plain memory, no numpy: a step of few tokens feels each call whose code is not in a cache.
        # The tensors are these arrays, which must not change any more.
        host = [
            torch.frombuffer(rows.ids, dtype=torch.int64),
            torch.frombuffer(rows.positions, dtype=torch.int64),
            torch.frombuffer(rows.slots, dtype=torch.int64),
            torch.frombuffer(rows.query_start, dtype=torch.int32),
            torch.frombuffer(rows.context_lens, dtype=torch.int32),
            torch.frombuffer(side_by_side(tables, columns), dtype=torch.int32).view(-1, columns),
        ]
        ids_T, *placed = host if self._is_host else upload_together(host, self._device)
        positions_T, slots_T, query_start_S1, context_lens_S, block_tables_SM = placed
        layout = StepLayout(
            positions_T=positions_T,
            slots_T=slots_T,
            query_start_S1=query_start_S1,
            context_lens_S=context_lens_S,
            block_tables_SM=block_tables_SM,
            query_start=tuple(rows.query_start),
            context_lens=tuple(rows.context_lens),
        )
        return ids_T, layout


def slice_layout(layout: StepLayout, first: int, last: int) -> StepLayout:
    """The part of a step that computes the packed rows [first, last), as a step of its own.

    A sequence that is cut sees in the earlier part what lies before the cut.
    """
    if (first, last) == (0, layout.query_start[-1]):
        return layout
    rows, query_start, context_lens = [], [0], []
    for row, (start, end) in enumerate(pairwise(layout.query_start)):
        inside = min(end, last) - max(start, first)
        if inside > 0:
            rows.append(row)
            query_start.append(query_start[-1] + inside)
            context_lens.append(layout.context_lens[row] - max(0, end - last))
    device = layout.block_tables_SM.device
    return StepLayout(
        positions_T=layout.positions_T[first:last],
        slots_T=layout.slots_T[first:last],
        query_start_S1=torch.tensor(query_start, dtype=torch.int32, device=device),
        context_lens_S=torch.tensor(context_lens, dtype=torch.int32, device=device),
        block_tables_SM=layout.block_tables_SM[rows],
        query_start=tuple(query_start),
        context_lens=tuple(context_lens),
    )


def last_rows(layout: StepLayout) -> LastRows | None:
    """The last new token of each sequence; None where no sequence has another."""
    num_sequences = len(layout.context_lens)
    if layout.query_start[-1] == num_sequences:
        return None
    # Positions of a device: taken there, nothing is uploaded.
    rows_S = layout.query_start_S1[1:].long() - 1
    return LastRows(
        rows_S,
        StepLayout(
            positions_T=layout.positions_T[rows_S],
            slots_T=layout.slots_T[rows_S],
            query_start_S1=torch.arange(num_sequences + 1, dtype=torch.int32, device=rows_S.device),
            context_lens_S=layout.context_lens_S,
            block_tables_SM=layout.block_tables_SM,
            query_start=tuple(range(num_sequences + 1)),
            context_lens=layout.context_lens,
        ),
    )


def _no_room(sequence: SequenceState, context_len: int) -> DivergenceError:
    return DivergenceError(
        f"sequence {sequence.sequence_id}: {context_len} tokens do not fit into its "
        f"{len(sequence.blocks)} blocks"
    )


class _Rows:
    """The packed rows of a step while they are gathered."""

    def __init__(self) -> None:
        self.ids = array("q")
        self.positions = array("q")
        self.slots = array("q")
        self.has_unread = False  # whether placeholders are among the ids
        self.sequences: list[SequenceState] = []
        self.query_start = array("i", [0])
        self.context_lens = array("i")
        self.splices: list[Splice] = []
        self.sampled: list[SequenceState] = []
        self.sample_rows: list[int] = []
        self.prompt_spans: list[PromptSpan] = []

    def end_singles(self) -> None:
        """Each sequence so far has one new token, and gets the next."""
        context_lens = [sequence.context_len for sequence in self.sequences]
        self.positions.extend([context_len - 1 for context_len in context_lens])
        self.context_lens.extend(context_lens)
        self.query_start.extend(range(1, len(context_lens) + 1))
        self.sampled.extend(self.sequences)
        self.sample_rows.extend(range(len(context_lens)))

    def end_span(self, sequence: SequenceState) -> None:
        """All new tokens of a sequence are there."""
        self.sequences.append(sequence)
        self.query_start.append(len(self.ids))
        self.context_lens.append(sequence.context_len)

    def sample(self, sequence: SequenceState) -> None:
        """The sequence whose span ended last gets a token."""
        self.sampled.append(sequence)
        self.sample_rows.append(len(self.ids) - 1)

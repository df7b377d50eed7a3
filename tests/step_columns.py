"""Steps and replies written and read row by row."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tessera.proto import shard_pb2
from tessera.proto.columns import SAMPLED_LAST


class DecodeRow(NamedTuple):
    sequence_id: int
    context_len: int = 0
    token_id: int = SAMPLED_LAST
    new_block_ids: Sequence[int] = ()


def columns(*rows: DecodeRow) -> shard_pb2.Decodes:
    decodes = shard_pb2.Decodes()
    for row in rows:
        decodes.sequence_ids.append(row.sequence_id)
        decodes.token_ids.append(row.token_id)
        decodes.context_lens.append(row.context_len)
        if row.new_block_ids:
            decodes.new_blocks.add(sequence_id=row.sequence_id, block_ids=row.new_block_ids)
    return decodes


def decode_rows(step: shard_pb2.Step) -> Iterator[DecodeRow]:
    """Without their new blocks."""
    decodes = step.decodes
    found = zip(decodes.sequence_ids, decodes.context_lens, decodes.token_ids, strict=True)
    return (DecodeRow(*row) for row in found)


def add_token(
    reply: shard_pb2.StepReply, sequence_id: int, token_id: int, logprob: float = 0.0
) -> None:
    reply.tokens.sequence_ids.append(sequence_id)
    reply.tokens.token_ids.append(token_id)
    reply.tokens.logprobs.append(logprob)

"""What a shard remembers of a sequence between steps."""

from dataclasses import dataclass, field

from torch import Tensor

from tessera.proto import shard_pb2


@dataclass(eq=False, slots=True)
class SequenceState:
    """One live sequence on this rank."""

    sequence_id: int
    table_row: int  # in BlockTables
    sampling: shard_pb2.SamplingParams
    num_prompt_tokens: int
    num_blocks: int = 0
    context_len: int = 0  # tokens in the cache
    token_ids: list[int] = field(default_factory=list)  # in the cache, plus the one sampled last
    # Logits of the last chunk's last position: they score the next chunk's first token.
    carried_logits_V: Tensor | None = None

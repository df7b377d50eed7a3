"""What a shard remembers of a sequence between steps."""

from array import array
from dataclasses import dataclass, field

from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.sampler import SampleRow


@dataclass(eq=False, slots=True)
class SequenceState:
    """One live sequence on this rank."""

    sequence_id: int
    sampling: shard_pb2.SamplingParams
    num_prompt_tokens: int
    context_len: int = 0  # tokens in the cache
    # In the cache, plus the one sampled last; below 0: see `unread_tokens`. 64 bits each.
    token_ids: "array[int]" = field(default_factory=lambda: array("q"))
    # Its blocks of the cache (`kv_cache`). 32 bits each.
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    # Logits of the last chunk's last position: they score the next chunk's first token.
    carried_logits_V: Tensor | None = None
    guided: bool = field(init=False)
    unmasked: SampleRow = field(init=False)  # of these token ids, however many they become

    def __post_init__(self) -> None:
        self.guided = self.sampling.guided
        self.unmasked = SampleRow(self.sampling, self.token_ids, self.num_prompt_tokens)

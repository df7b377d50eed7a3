"""A step between being handed to the device and being told to the router."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.batch import Batch
from tessera.shard.token_choice import ChosenTokens


@dataclass(slots=True)
class Launched:
    """What `Engine.finish` needs. Marks are those of `Backend.mark`."""

    reply: shard_pb2.StepReply  # begun
    batch: Batch | None  # None: the step computes no tokens
    started_ns: int  # of the host's clock
    started: Any  # mark before all work
    encoded: Any  # mark after the pictures
    computed: Any  # mark after the model
    hidden_TD: Tensor | None = None
    tokens: ChosenTokens | None = None
    # Where each sampled sequence's token belongs, in its token ids.
    places: list[int] = field(default_factory=list)
    done: Any = None  # mark behind the tokens' copies to the host; None: nothing is under way
    failures: dict[int, str] = field(default_factory=dict)  # by sequence id

    @property
    def may_be_followed(self) -> bool:
        """Whether the next step can be launched before this one is finished: its tokens are where
        the device finds them."""
        return self.done is not None

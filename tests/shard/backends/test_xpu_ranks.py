"""One of two ranks on the simulated Intel GPU: what it exchanges, and what it waits for."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tessera.proto import shard_pb2
from tessera.shard.backends.xpu import XpuBackend
from tessera.shard.engine import Engine
from tessera.shard.errors import DeviceError
from tessera.shard.models import load_model
from tessera.shard.models.base import Placement
from tessera.shard.parallel import Group
from tests.shard.backends.simulated_device import simulated_device
from tests.shard.backends.simulated_xpu import simulated_xpu
from tests.step_columns import DecodeRow, columns

# Of each step: whether both ranks computed the layers and the logits; what was sampled, read here;
# its tokens as all ranks know them; the ends of the stages.
WAITS_PER_STEP = Counter(
    {"parallel.py": 2, "choice.py": 2, "token_choice.py": 1, "engine.py": 1, "xpu.py": 2}
)


class OtherRank:
    """What torch.distributed does with a rank beside this one whose tensors are all zero."""

    def __init__(self) -> None:
        self.exchanged: Counter[str] = Counter()

    def _take(self, name: str, x: Tensor) -> None:
        assert x.device == simulated_device().device, f"{name} of a tensor on {x.device}"
        self.exchanged[name] += 1

    def all_reduce(self, x: Tensor) -> None:
        self._take("all_reduce", x)

    def gather(self, x: Tensor, pieces: list[Tensor], dst: int) -> None:
        self._take("gather", x)
        pieces[0].copy_(x)
        pieces[1].zero_()

    def broadcast(self, x: Tensor, src: int) -> None:
        self._take("broadcast", x)


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> OtherRank:
    rank = OtherRank()
    for name in ("all_reduce", "gather", "broadcast"):
        monkeypatch.setattr(dist, name, getattr(rank, name))
    return rank


@pytest.fixture
def engine(checkpoint: Callable[[str], Path], other: OtherRank) -> Iterator[Engine]:
    with simulated_xpu() as device:
        place = Placement(XpuBackend(device), Group(0, 2, device), torch.float32)
        engine = Engine(load_model(checkpoint("next-mistral"), place), place, block_size=16)
        engine.allocate_cache(10)
        yield engine


def test_a_step_exchanges_tensors_of_the_device(engine: Engine, other: OtherRank) -> None:
    chunk = shard_pb2.Chunk(token_ids=range(3, 20), new_block_ids=[1, 2], is_last=True)
    chunk.sampling.SetInParent()
    engine.run(shard_pb2.Step(chunks=[chunk]))
    other.exchanged.clear()
    for n in range(3):
        row = DecodeRow(sequence_id=0, context_len=18 + n)
        with simulated_device().waits() as waits:
            reply = engine.run(shard_pb2.Step(step_id=n, decodes=columns(row)))
            assert len(reply.tokens.token_ids) == 1
        by_file = Counter(cause.partition(":")[0] for cause in waits.elements())
        assert by_file <= WAITS_PER_STEP, waits
    # The embedding, two of each layer and whether the ranks agree; the logits and that again.
    reduced = 1 + 2 * engine.model.num_layers + 2
    assert other.exchanged == {"all_reduce": 3 * reduced, "gather": 3, "broadcast": 3}


def test_without_xccl_two_ranks_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DeviceError) as refused:
        Group.connect(0, 2, torch.device("xpu", 0), (tmp_path / "rendezvous").as_uri())
    assert str(refused.value) == (
        f"2 ranks on xpu exchange tensors over xccl, which torch {torch.__version__} is built "
        "without; set NUM_SHARD=1, or install torch's build for these devices"
    )

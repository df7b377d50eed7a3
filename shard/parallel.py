"""The tensor-parallel group: what ranks say to each other during a step.

With one rank every operation returns its input at once; models need no special case.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tessera.shard.errors import DeviceError, GroupLost, PartFailed, is_out_of_memory
from tessera.shard.shared_exchange import SharedExchange
from tessera.shard.upload import upload

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
COLLECTIVE_TIMEOUT = timedelta(seconds=120)

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Collective:
    """What one exchange between ranks looks like, for work on any number of items."""

    name: str  # the method of `Group`
    rows_per_item: int  # the first dimension grows with the work, the others do not
    tail: tuple[int, ...]
    dtype: torch.dtype


class Group:
    """Ranks 0..world_size-1 of one model. A rank is a process with one device."""

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        shared: SharedExchange | None = None,
    ) -> None:
        """`shared`: what carries tensors between ranks on one host's processors, where it can."""
        self.rank = rank
        self.world_size = world_size
        self._device = device or torch.device("cpu")
        self._shared = shared
        self._schedules: dict[str, list[Collective]] = {}  # of each kind of work that succeeded
        self._begun: list[tuple[str, torch.Size, torch.dtype]] = []  # by the work under way

    @classmethod
    def connect(cls, rank: int, world_size: int, device: torch.device, init_method: str) -> "Group":
        """Join the group; blocks until all ranks have.

        Args:
            init_method: `file:///path` on one host, `tcp://host:port` across hosts.

        Raises:
            DeviceError: this torch cannot exchange tensors of such devices.
            RuntimeError: torch's, when the others do not come within two minutes.
        """
        if world_size > 1:
            backend = BACKENDS[device.type]
            if not dist.is_backend_available(backend):
                raise DeviceError(
                    f"{world_size} ranks on {device.type} exchange tensors over {backend}, which "
                    f"torch {torch.__version__} is built without; set NUM_SHARD=1, or install "
                    "torch's build for these devices"
                )
            dist.init_process_group(
                backend,
                init_method=init_method,
                rank=rank,
                world_size=world_size,
                timeout=COLLECTIVE_TIMEOUT,
            )
        return cls(rank, world_size, device, _shared(rank, world_size, device))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, on every rank; in place where there is more than one."""
        if self.world_size > 1:
            self._begin("all_reduce", x)
            self._exchange(self._all_reduce, x)
        return x

    def gather_last_dim(self, x_SV: Tensor) -> Tensor | None:
        """The ranks' pieces side by side along the last dimension; None on ranks above 0."""
        if self.world_size == 1:
            return x_SV
        x_SV = x_SV.contiguous()
        self._begin("gather_last_dim", x_SV)
        pieces = self._exchange(self._gather, x_SV)
        return torch.cat(pieces, dim=-1) if pieces is not None else None

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x` on every rank; in place."""
        if self.world_size > 1:
            self._exchange(self._broadcast, x)
        return x

    def together(self, kind: str, num_items: int, work: Callable[[], T]) -> T:
        """Do work that contains collectives; where it fails on one rank, it fails on all alike.

        A rank that fails takes part in the collectives that are left, with zeros, so that the
        others do not wait for it; then all agree on what happened. So every rank knows that the
        work is to be done again, in parts. Which collectives are left is known once work of this
        kind has succeeded.

        Args:
            kind: names work whose collectives are the same but for the number of items.
            num_items: which the first dimension of every collective in it is a multiple of.

        Raises:
            PartFailed: on every rank, when the work failed on any.
            GroupLost: an exchange failed, or it is not known how to go through what is left.
        """
        if self.world_size == 1:
            return work()
        self._begun.clear()
        failure, result = _attempt(work)
        if failure is None:
            self._remember(kind, num_items)
        else:
            self._go_through_the_rest(kind, num_items, failure)
        short = failure is not None and is_out_of_memory(failure)
        counts = upload(torch.tensor([failure is not None, short]).float(), self._device)
        num_failed, num_short = self._exchange(self._all_reduce, counts).tolist()
        if num_failed:
            raise PartFailed(out_of_memory=num_failed == num_short) from failure
        assert result is not None
        return result[0]

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _remember(self, kind: str, num_items: int) -> None:
        if kind not in self._schedules:
            self._schedules[kind] = [
                Collective(name, shape[0] // num_items, tuple(shape[1:]), dtype)
                for name, shape, dtype in self._begun
            ]

    def _go_through_the_rest(self, kind: str, num_items: int, failure: Exception) -> None:
        if kind not in self._schedules:
            raise GroupLost(f"the first {kind} work failed, and other ranks wait") from failure
        for part in self._schedules[kind][len(self._begun) :]:
            shape = (part.rows_per_item * num_items, *part.tail)
            getattr(self, part.name)(torch.zeros(shape, dtype=part.dtype, device=self._device))

    def _begin(self, name: str, x: Tensor) -> None:
        """Note a collective of the work under way; from here on the others count on this rank."""
        self._begun.append((name, x.shape, x.dtype))

    def _exchange(self, collective: Callable[[Tensor], T], x: Tensor) -> T:
        try:
            return collective(x)
        except RuntimeError as error:
            raise GroupLost(f"an exchange between ranks failed: {error}") from error

    def _all_reduce(self, x: Tensor) -> Tensor:
        if self._shared:
            self._shared.sum(x)
        else:
            dist.all_reduce(x)
        return x

    def _gather(self, x: Tensor) -> list[Tensor] | None:
        """Every rank's tensor, on rank 0."""
        if self._shared:
            gathered = self._shared.gather(x)
            return None if gathered is None else list(gathered)
        is_first = self.rank == 0
        pieces = [torch.empty_like(x) for _ in range(self.world_size)] if is_first else None
        dist.gather(x, pieces, dst=0)
        return pieces

    def _broadcast(self, x: Tensor) -> Tensor:
        if self._shared:
            self._shared.broadcast(x)
        else:
            dist.broadcast(x, src=0)
        return x


def _shared(rank: int, world_size: int, device: torch.device) -> SharedExchange | None:
    """Shared memory for ranks on processors, if the kernels for it are built."""
    if world_size == 1 or device.type != "cpu" or not SharedExchange.is_built():
        return None
    return SharedExchange.connect(rank, world_size, COLLECTIVE_TIMEOUT.total_seconds())


def _attempt(work: Callable[[], T]) -> tuple[Exception | None, tuple[T] | None]:
    """(None, its result in a tuple), or (why it failed, None) with its memory let go."""
    try:
        return None, (work(),)
    except GroupLost:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            logger.exception("a part of a step failed on this rank")
        return error.with_traceback(None), None  # the traceback holds on to tensors

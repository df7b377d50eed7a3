"""The chosen tokens of some rows: where they were chosen, then on the host."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

TopTokens = tuple[tuple[int, float], ...]
"""(id, logprob) of what was most likely, the likeliest first."""


class Tokens(NamedTuple):
    """The chosen tokens in columns: most steps have rows of three numbers and nothing else."""

    ids: list[int]
    logprobs: list[float]  # of the model itself: before bias, penalties, temperature and filters
    tops: list[TopTokens]  # of each, empty where nobody asked

    def of_rows(self, rows: Sequence[int]) -> "Tokens":
        """Some of them."""
        return Tokens(
            [self.ids[n] for n in rows],
            [self.logprobs[n] for n in rows],
            [self.tops[n] for n in rows],
        )

    def followed_by(self, others: "Tokens") -> "Tokens":
        """These and others."""
        return Tokens(
            self.ids + others.ids, self.logprobs + others.logprobs, self.tops + others.tops
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One token for each row, where it was chosen."""

    ids_R: Tensor  # int64
    logprobs_R: Tensor
    finite_R: Tensor  # bool, whether the row's logits are; if not, its token means nothing
    top_RM: tuple[Tensor, Tensor] | None  # ids and logprobs of the most likely
    top_counts: tuple[int, ...]  # how many of them each row asks for

    def on_host(self) -> "Choice":
        """The same on the host once the device has come so far; nobody waits for that here."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", non_blocking=True)

        top_RM = None if self.top_RM is None else (copy(self.top_RM[0]), copy(self.top_RM[1]))
        return replace(
            self,
            ids_R=copy(self.ids_R),
            logprobs_R=copy(self.logprobs_R),
            finite_R=copy(self.finite_R),
            top_RM=top_RM,
        )

    def read(self) -> Tokens:
        """The tokens; waits where they are still on a device."""
        tops: list[TopTokens] = [()] * len(self.top_counts)
        if self.top_RM is not None:
            ids, logprobs = (tensor.tolist() for tensor in self.top_RM)
            tops = [
                tuple(zip(*pair, strict=True))[:count]
                for *pair, count in zip(ids, logprobs, self.top_counts, strict=True)
            ]
        return Tokens(self.ids_R.tolist(), self.logprobs_R.tolist(), tops)

"""Counters, gauges and histograms in Prometheus' text format, under exactly their own names.

The client library insists on `_total` at the end of a counter's name, which the names that existing
dashboards read do not have, and looks for a histogram's bucket one by one. Nothing here is locked:
all of it is used on the event loop only.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Description:
    """What is to be known about a metric."""

    name: str
    kind: Kind
    meaning: str
    label_names: Labels = ()
    like: str = ""  # its name elsewhere


class Series(Protocol):
    """The numbers behind one set of labels."""

    def samples(self) -> Iterator[tuple[str, str, float]]:
        """(What is added to the name, the value of the label `le` or "", the number)."""
        ...


class Value:
    """One number: a gauge's, or a counter's, which only rises."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float = 0

    def increase(self, by: float = 1) -> None:
        """Add to it."""
        self.value += by

    def set(self, value: float) -> None:
        """Replace it, also for a count that is kept elsewhere."""
        self.value = value

    def samples(self) -> Iterator[tuple[str, str, float]]:
        """See `Series`."""
        yield "", "", self.value


class Histogram:
    """How many observations there were up to each bound."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: rising; those above the last one are counted, too."""
        self.place(bounds)

    def place(self, bounds: Sequence[float]) -> None:
        """Begin anew with other bounds."""
        self._bounds = tuple(map(float, bounds))
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum: float = 0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def samples(self) -> Iterator[tuple[str, str, float]]:
        """See `Series`."""
        total = 0
        for bound, count in zip((*map(repr, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            yield "_bucket", bound, total
        yield "_count", "", total
        yield "_sum", "", self._sum


S = TypeVar("S", bound=Series)


class Family(Generic[S]):
    """All series of one name."""

    def __init__(self, description: Description, make: Callable[[], S]) -> None:
        """`make` gives the series of a set of labels that is new."""
        self.description = description
        self._make = make
        self._series: dict[Labels, S] = {}

    def of(self, *values: str) -> S:
        """The series with these values of the labels, in the order of `label_names`."""
        if values not in self._series:
            self._series[values] = self._make()
        return self._series[values]

    def lines(self) -> Iterator[str]:
        """The lines of a scrape."""
        name, names = self.description.name, self.description.label_names
        yield f"# HELP {name} {self.description.meaning}"
        yield f"# TYPE {name} {self.description.kind}"
        for values, series in self._series.items():
            labels = dict(zip(names, values, strict=True))
            for suffix, bound, number in series.samples():
                found = labels | {"le": bound} if bound else labels
                yield f"{name}{suffix}{_written(found)} {number!r}"


class Registry:
    """The metrics of one server, in the order they were defined."""

    def __init__(self) -> None:
        self._families: dict[str, Family[Value] | Family[Histogram]] = {}

    def counters(self, name: str, meaning: str, *labels: str, like: str = "") -> Family[Value]:
        """Define a counter with labels."""
        return self._add(Family(Description(name, "counter", meaning, labels, like), Value))

    def counter(self, name: str, meaning: str, like: str = "") -> Value:
        """Define a counter."""
        return self.counters(name, meaning, like=like).of()

    def gauges(self, name: str, meaning: str, *labels: str, like: str = "") -> Family[Value]:
        """Define a gauge with labels."""
        return self._add(Family(Description(name, "gauge", meaning, labels, like), Value))

    def gauge(self, name: str, meaning: str, like: str = "") -> Value:
        """Define a gauge."""
        return self.gauges(name, meaning, like=like).of()

    def histograms(
        self, name: str, meaning: str, bounds: Sequence[float], *labels: str, like: str = ""
    ) -> Family[Histogram]:
        """Define a histogram with labels."""
        description = Description(name, "histogram", meaning, labels, like)
        return self._add(Family(description, lambda: Histogram(bounds)))

    def histogram(
        self, name: str, meaning: str, bounds: Sequence[float], like: str = ""
    ) -> Histogram:
        """Define a histogram."""
        return self.histograms(name, meaning, bounds, like=like).of()

    @property
    def descriptions(self) -> list[Description]:
        """Of every metric."""
        return [family.description for family in self._families.values()]

    def lines(self) -> Iterable[str]:
        """The lines of a scrape."""
        for family in self._families.values():
            yield from family.lines()

    def _add(self, family: "Family[S]") -> "Family[S]":
        name = family.description.name
        if name in self._families:
            raise ValueError(f"the metric {name} is defined twice")
        self._families[name] = family  # type: ignore[assignment]  # S is one of the two
        return family


def _written(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escaped(labels[name])}"' for name in sorted(labels))
    return "{" + ",".join(pairs) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

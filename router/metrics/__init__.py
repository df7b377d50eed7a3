"""What the server counts and measures, under the names that existing dashboards read.

`docker/METRICS.md`, which is written from the definitions here, lists all of them.
"""

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from tessera.router.generation import ServingLimits
from tessera.router.metrics.instruments import Description, Registry
from tessera.router.metrics.load import LoadMetrics
from tessera.router.metrics.pictures import PictureMetrics
from tessera.router.metrics.ranks import RankMetrics
from tessera.router.metrics.requests import RequestMetrics
from tessera.router.metrics.server import ServerMetrics
from tessera.router.metrics.steps import StepMetrics
from tessera.router.scheduler import Scheduler

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """One server's numbers, in registries of its own, so that two servers can share a process."""

    def __init__(self) -> None:
        self._registry = Registry()
        self.requests = RequestMetrics(self._registry)
        self.steps = StepMetrics(self._registry)
        self.load = LoadMetrics(self._registry)
        self.pictures = PictureMetrics(self._registry)
        self.ranks = RankMetrics(self._registry)
        self.server = ServerMetrics(self._registry)
        self._process = CollectorRegistry()  # CPU time, memory, files and start of this process
        ProcessCollector(registry=self._process)

    def open(self, limits: ServingLimits, scheduler: Scheduler) -> None:
        """Requests are taken from now on."""
        self.requests.open(limits)
        self.load.follow(scheduler)

    @property
    def descriptions(self) -> list[Description]:
        """Of every metric."""
        return self._registry.descriptions + [_described(one) for one in self._process.collect()]

    def render(self) -> bytes:
        """Everything in Prometheus' text format, version 0.0.4."""
        self.load.refresh()
        self.ranks.refresh()
        lines = "".join(f"{line}\n" for line in self._registry.lines())
        return lines.encode() + generate_latest(self._process)


def _described(family: Metric) -> Description:
    """The same about a metric of the client library's."""
    if family.type == "counter":
        return Description(f"{family.name}_total", "counter", family.documentation)
    return Description(family.name, "gauge", family.documentation)

"""What a scrape says."""

import re

from tessera.router.metrics import Metrics


def metric(metrics: Metrics | str, name: str) -> float:
    """The sum of the samples of that name, and of those labels if it has any."""
    text = metrics if isinstance(metrics, str) else metrics.render().decode()
    end = "" if name.endswith("}") else r"(?:\{.*\})?"
    found = re.findall(rf"^{re.escape(name)}{end} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not exposed"
    return sum(map(float, found))

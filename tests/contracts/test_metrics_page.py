"""docker/ speaks of the metrics there are: the page, the dashboard and the alerts."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from metrics_page import DOCKER, PAGE, alert_rules, with_tables

from tessera.router.metrics import Metrics
from tests.operations.tgi_dashboard import queries

DASHBOARD = DOCKER / "grafana" / "dashboards" / "tessera.json"
OF_PROMETHEUS = {"up"}  # what it adds itself


def exposed() -> dict[str, str]:
    """Kind by name, as a scrape tells them."""
    text = Metrics().render().decode()
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))


def series() -> set[str]:
    """The names queries may have."""
    parts = ("_bucket", "_count", "_sum")
    return OF_PROMETHEUS | {
        f"{name}{part}"
        for name, kind in exposed().items()
        for part in (parts if kind == "histogram" else ("",))
    }


def dashboard_queries() -> Iterator[str]:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")


def test_the_tables_are_current() -> None:
    text = PAGE.read_text()
    assert with_tables(text) == text, "run `make docs`"


def test_the_table_holds_what_is_exposed() -> None:
    table = PAGE.read_text().split("## All metrics")[1]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", table, re.MULTILINE)
    assert dict(rows) == exposed()
    assert len(rows) == len(exposed())


def test_every_metric_the_page_names_exists() -> None:
    named = set(re.findall(r"`((?:tgi|tessera)_[a-z_]*[a-z])(?:`|\{)", PAGE.read_text()))
    assert named - {"tgi_", "tessera_"} <= set(exposed())


def test_the_dashboard_is_current(tmp_path: Path) -> None:
    """A copy of what writes it writes the same."""
    folder = tmp_path / "grafana"
    (folder / "dashboards").mkdir(parents=True)
    for file in ("dashboard.py", "panels.py"):
        (folder / file).write_text((DOCKER / "grafana" / file).read_text())
    subprocess.run([sys.executable, folder / "dashboard.py"], check=True, timeout=60)
    assert (folder / "dashboards" / "tessera.json").read_text() == DASHBOARD.read_text()


@pytest.mark.parametrize("source", ["dashboard", "tgi dashboard", "alerts"])
def test_queries_name_what_is_exposed(source: str) -> None:
    asked = {
        "dashboard": list(dashboard_queries()),
        "tgi dashboard": list(queries()),
        "alerts": [str(rule["expr"]) for rule in alert_rules()],
    }[source]
    known = series()
    for query in asked:
        promql_parser.parse(query)
        named = set(re.findall(r"\b(?:(?:tgi|tessera|process)_\w+|up\b)", query))
        assert named and named <= known, query


def test_the_dashboard_shows_every_metric_of_ours_or_its_twin() -> None:
    """What is not there is text-generation-inference's, or there under another name."""
    asked = " ".join(dashboard_queries())
    ours = {name for name in exposed() if name.startswith("tessera_")}
    elsewhere = {"tessera_request_success_total", "tessera_cache_config_info"}
    assert {name for name in ours - elsewhere if name not in asked} == set()


def test_every_alert_says_what_to_do() -> None:
    for rule in alert_rules():
        assert {"summary", "runbook"} == set(rule["annotations"])
        assert rule["labels"]["severity"] in ("page", "ticket")

"""Writes the tables into docker/METRICS.md; `make docs` runs it."""

from pathlib import Path
from typing import Any

import yaml

from tessera.router.metrics import Metrics

DOCKER = Path(__file__).parents[2] / "docker"
PAGE = DOCKER / "METRICS.md"
ALERTS = DOCKER / "prometheus" / "alerts.yml"
MARKS = "<!-- {}: written by `make docs` -->\n", "<!-- /{} -->"


def with_tables(text: str) -> str:
    """`text` with the tables of metrics and alerts between their markers."""
    for name, lines in (("metrics", metric_rows()), ("alerts", alert_rows())):
        begin, end = (mark.format(name) for mark in MARKS)
        before, rest = text.split(begin)
        _, after = rest.split(end)
        table = "\n".join(lines)
        text = f"{before}{begin}{table}\n{end}{after}"
    return text


def metric_rows() -> list[str]:
    """Every metric, in the order of a scrape."""
    rows = ["| metric | kind | labels | meaning | elsewhere |", "| --- | --- | --- | --- | --- |"]
    for one in Metrics().descriptions:
        labels = ", ".join(f"`{label}`" for label in one.label_names)
        cells = (f"`{one.name}`", one.kind, labels, one.meaning.rstrip("."), one.like)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def alert_rows() -> list[str]:
    """Every alert and what to do about it."""
    rows = ["| alert | severity | after | what to do |", "| --- | --- | --- | --- |"]
    for rule in alert_rules():
        cells = (
            rule["alert"],
            rule["labels"]["severity"],
            rule.get("for", "at once"),
            rule["annotations"]["runbook"],
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def alert_rules() -> list[dict[str, Any]]:
    """The alerts of docker/prometheus/alerts.yml."""
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))

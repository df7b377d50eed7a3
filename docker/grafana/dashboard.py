"""Writes dashboards/tessera.json: `python docker/grafana/dashboard.py` (or `make docs`)."""

import json
from pathlib import Path
from typing import Any

from panels import ROWS, Panel

FILE = Path(__file__).parent / "dashboards" / "tessera.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 24


def dashboard() -> dict[str, Any]:
    """The whole of it, as Grafana 10 and later read it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1},
            }
        )
        y += 1
        for place, panel in enumerate(row):
            line, x = divmod(place * WIDTH, COLUMNS)
            panels.append(_chart(panel, len(panels) + 1, x, y + line * HEIGHT))
        y += -(-len(row) * WIDTH // COLUMNS) * HEIGHT
    return {
        "title": "tessera",
        "uid": "tessera",
        "tags": ["tessera"],
        "schemaVersion": 38,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "panels": panels,
    }


def _chart(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": query, "legendFormat": name}
        for place, (name, query) in enumerate(panel.lines.items())
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.meaning,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": targets,
    }


def _variables() -> list[dict[str, Any]]:
    query = "label_values(tessera_build_info, instance)"
    return [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        {
            "name": "instance",
            "type": "query",
            "datasource": SOURCE,
            "definition": query,
            "query": {"query": query, "refId": "instance"},
            "refresh": 2,
            "includeAll": True,
            "allValue": ".*",
            "multi": True,
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        },
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")

"""compatibility.json, and with it API.md's table, says what was seen here."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Reports
from tests.clients.environments import MAIN, ROOT

pytestmark = pytest.mark.timeout(600)  # the first run installs the clients

STATED = Path(__file__).with_name("compatibility.json")
SEEN = ROOT / "build" / "compatibility.json"
SCRIPTS = {
    "hub": ("main", "hub-1", "hub-0.36", "hub-0.23"),
    "openai_sdk": ("main", "hub-1", "hub-0.36"),
    "legacy_tgi": ("hub-0.23",),
    "langchain_chat": ("langchain",),
    "llama_index_llms": ("llama-index",),
    "llama_index_tgi": ("llama-index-0.12",),
}


def test_the_stated_compatibility_is_what_was_seen(reports: Reports) -> None:
    seen: list[dict[str, Any]] = []
    for script, environments in SCRIPTS.items():
        for environment in environments:
            report = reports(environment, script)
            versions = {
                name: _stated(environment, version) for name, version in report.versions.items()
            }
            seen.append({"clients": versions, "works": report.working})
    SEEN.parent.mkdir(exist_ok=True)
    SEEN.write_text(json.dumps(seen, indent=1) + "\n")
    assert json.loads(STATED.read_text()) == seen, "run `make client-table`"


def _stated(environment: str, version: str) -> str:
    """The project's own environment has whatever release is the newest; the others are pinned."""
    return f"{version.split('.')[0]}.x" if environment == MAIN else version

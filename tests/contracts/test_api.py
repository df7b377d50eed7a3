"""API.md tells every route there is, and what works with which client."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from client_table import with_client_table
from pages import API

from tessera.router.operations import OPERATIONS

TEXT = API.read_text()


def test_the_client_table_is_current() -> None:
    assert with_client_table(TEXT) == TEXT, "run `make docs`"


def test_routes_are_those_there_are() -> None:
    routes = {operation.path.removesuffix("/{name}") for operation in OPERATIONS}
    named = set(re.findall(r"`(?:[A-Z]+ )?(/[\w./-]*)`", TEXT))
    assert named - {"/ui"} == routes - {"/api-doc/openapi.json"}

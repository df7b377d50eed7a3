"""MIGRATING.md names every setting of the server that people come from, and none that is not."""

import re
from pathlib import Path

from tessera.launcher.settings import ABSENT, CLASSES, FOREIGN, IGNORED
from tessera.proto.env import environment_names

TEXT = (Path(__file__).parents[2] / "MIGRATING.md").read_text(encoding="utf-8")
TABLE = TEXT[TEXT.index("## Flags and environment") : TEXT.index("## Requests")]
FIRST_COLUMN = [row.split("|")[1] for row in TABLE.splitlines() if row.startswith("| `")]
NAMED = {name for cell in FIRST_COLUMN for name in re.findall(r"`([A-Z][A-Z_0-9]+)`", cell)}


def test_what_is_said_to_be_the_same_exists() -> None:
    unknown = NAMED - environment_names(*CLASSES) - IGNORED.keys() - ABSENT.keys()
    assert unknown == set()


def test_what_is_missing_is_told() -> None:
    tunnels = {"NGROK_AUTHTOKEN", "NGROK_EDGE"}
    assert (IGNORED.keys() | ABSENT.keys()) - tunnels <= NAMED | {"CUDA_GRAPHS"}
    row = next(cell for cell in FIRST_COLUMN if "TRUST_REMOTE_CODE" in cell)
    assert set(re.findall(r"[A-Z_]{5,}", row)) == IGNORED.keys()


def test_settings_it_speaks_of_exist() -> None:
    spoken = set(re.findall(r"`([A-Z]+_[A-Z_]+)(?:=\S+)?`", TEXT))
    known = environment_names(*CLASSES) | IGNORED.keys() | ABSENT.keys() | FOREIGN
    assert spoken - known - {"HF_TOKEN", "HF_HUB_OFFLINE"} == set()

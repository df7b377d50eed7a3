"""ARCHITECTURE.md is the picture of the house as it is."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
TREE = TEXT.split("## The folders")[1].split("```")[1]


@pytest.mark.parametrize(
    "folder", ["proto", "launcher", "router", "shard", "shard/layers", "shard/backends"]
)
def test_every_module_is_in_the_picture(folder: str) -> None:
    words = set(re.findall(r"[a-z_0-9]+", TREE))
    modules = {path.stem for path in (ROOT / folder).glob("*.py")}
    hidden = {"__init__", "shard_pb2", "shard_pb2_grpc"} | ({"base"} & modules)
    assert modules - hidden - words == set()


def test_files_it_names_exist() -> None:
    for name in re.findall(
        r"`((?:router|shard|proto|launcher|tests)/[a-z_/]+\.(?:py|proto))`", TEXT
    ):
        assert (ROOT / name).exists(), name

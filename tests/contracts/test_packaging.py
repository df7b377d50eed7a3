"""The distribution holds what the tree holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOP = ("router", "shard", "proto", "launcher")


def test_every_package_folder_is_listed_in_pyproject() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        "tessera." + ".".join(init.parent.relative_to(ROOT).parts)
        for top in TOP
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert found == set(setuptools["packages"])


def test_every_package_is_marked_as_typed() -> None:
    assert all((ROOT / top / "py.typed").exists() for top in TOP)


def test_every_dependency_has_its_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    named = [line for line in lines if line.startswith('    "') and ("==" in line or ">=" in line)]
    own_tools = ("grpcio-tools", "mypy", "ruff", "import-linter", "types-", "pytest", "hypothesis")
    for line in named:
        if not line.strip().strip('"').startswith(own_tools):
            assert "#" in line, line

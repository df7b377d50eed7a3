"""Every number that README states about speed was measured, and the file says how."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("\n## How fast it is\n")[1].split("\n## ")[0]
# A paragraph or a table names the file its numbers are from: `[step.json](benchmark/results/...)`.
PARTS = [
    part for part in re.split(r"\n\n(?!\|)", SECTION.strip()) if ".json](benchmark/results/" in part
]
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")


def told(value: Any) -> Iterator[float]:
    """All numbers of a result file: values, keys, and those in its texts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from told(key)
            yield from told(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from told(inner)
    elif isinstance(value, str):
        yield from (
            float(found.replace(",", ""))
            for found in re.findall(r"\d[\d.]*\d|\d", value)
            if found.count(".") < 2
        )
    elif isinstance(value, int | float):
        yield float(value)


def stated(text: str) -> list[str]:
    """The numbers of a text, without those in links and code."""
    prose = re.sub(r"!?\[[^\]]*\]\([^)]*\)|`[^`]*`", "", text)
    return [number.replace(",", "") for number in NUMBER.findall(prose)]


def results_of(part: str) -> list[dict[str, Any]]:
    names = re.findall(r"\((benchmark/results/\w+\.json)\)", part)
    return [json.loads((ROOT / name).read_text()) for name in names]


def is_told(number: str, numbers: set[float]) -> bool:
    decimals = len(number.partition(".")[2])
    return any(round(each, decimals) == float(number) for each in numbers)


@pytest.mark.parametrize("part", PARTS)
def test_every_number_is_in_the_file_that_is_named(part: str) -> None:
    numbers = set(told(results_of(part)))
    assert stated(part)
    assert [number for number in stated(part) if not is_told(number, numbers)] == []


def test_nothing_is_stated_without_a_file() -> None:
    others = [part for part in re.split(r"\n\n(?!\|)", SECTION.strip()) if part not in PARTS]
    assert PARTS and [stated(part) for part in others if stated(part)] == []


@pytest.mark.parametrize("part", PARTS)
def test_the_command_that_made_it_is_named(part: str) -> None:
    for result in results_of(part):
        about = result["about"]
        module = re.search(r"-m (benchmark\.\w+)", about["command"])
        assert module and f"`python -m {module[1]}`" in SECTION
        assert about["machine"]["processor"] and about["versions"]["python"] and about["commit"]

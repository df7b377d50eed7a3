"""Every number that README states about speed was measured, and the file says how."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from pages import README, ROOT
from speed_section import peers, with_speed

SECTION = README.read_text().split("\n## How fast it is\n")[1].split("\n## ")[0]
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


def test_the_section_is_current() -> None:
    text = README.read_text()
    assert with_speed(text) == text, "run `make docs`"


def of_peers() -> dict[str, Any]:
    """A result file of `benchmark.peers`: one server with figures."""
    row = {"ours": 80.4, "peer": 201.6, "ratio": {"median": 0.44}}
    figures = {"output_tokens_per_s": {"1": row, "8": row, "32": row}, "first_token_ms": row}
    machine = {"cpus": 16, "load_average": [0.26, 7.0, 8.0]}
    return {
        "about": {"model": "llama-125m", "rounds": 1, "machine": machine},
        "peers": {"openvino": {"package": "openvino-genai", "version": "2026.4"} | figures},
    }


def test_machine_load_and_figures_are_those_of_the_file() -> None:
    told = peers(of_peers())
    assert "1 round, 16 cores with a load of 0.3:" in told
    cells = "80 / 202 (0.4) | 80 / 202 (0.4) | 80 / 202 (0.4) | 80 / 202 ms (0.4)"
    assert told.endswith(f"| `openvino-genai 2026.4` | {cells} | - |\n")
    assert "picture of" not in told


def test_two_peers_of_one_package_are_told_apart() -> None:
    found = of_peers()
    peer = found["peers"]["openvino"]
    for name in ("transformers", "transformers-batching"):
        found["peers"][name] = peer | {"package": "transformers", "version": "5"}
    told = peers(found)
    assert "| `transformers 5` |" in told and "| `transformers-batching 5` |" in told


def test_a_peer_that_sees_has_its_picture_in_the_table() -> None:
    found = of_peers()
    found["about"]["picture"] = {"model": "llava", "side": 336}
    row = {"ours": 900.4, "peer": 1801.6, "ratio": {"median": 2.001}}
    found["peers"]["openvino"]["first_token_after_picture_ms"] = row
    told = peers(found)
    assert told.endswith(" | 900 / 1802 ms (2.0) |\n")
    assert "`llava`'s first token after a picture of 336 x 336 pixels" in told


def test_a_measurement_that_failed_is_named_with_its_reason() -> None:
    found = of_peers()
    found["peers"]["openvino"]["output_tokens_per_s"]["32"] = {"reason": "not done after 120 s"}
    *_, table, sentence = peers(found).split("\n\n")
    cells = "80 / 202 (0.4) | 80 / 202 (0.4) | - | 80 / 202 ms (0.4) | -"
    assert table.endswith(f"| `openvino-genai 2026.4` | {cells} |")
    assert "`openvino, 32 streams` (`not done after 120 s`)" in " ".join(sentence.split())
    assert stated(sentence) == []


def test_a_peer_without_figures_is_named_with_its_reason() -> None:
    found = of_peers()
    reason = "ERROR: no `wheel`\nof vllm==0.1.2 | for 3.11"
    found["peers"]["vllm"] = {"package": "vllm", "reason": reason}
    *_, table, sentence = peers(found).split("\n\n")
    assert "openvino" in table and "vllm" not in table
    assert " ".join(sentence.split()) == (
        "Without figures, for the reason in brackets: "
        "`vllm` (`ERROR: no 'wheel' of vllm==0.1.2 | for 3.11`)."
    )
    assert stated(sentence) == []

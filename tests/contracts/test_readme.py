"""What README says is so."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from readme import README, with_client_table, with_image_numbers, with_settings_table

ROOT = README.parent
TEXT = README.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_tables_are_current() -> None:
    current = with_image_numbers(with_client_table(with_settings_table(TEXT)))
    assert current == TEXT, "run `make docs`"


def test_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = set(re.findall(r"`?make ([a-z-]+)", TEXT)) - {"and", "it"}
    assert {"run", "test", "help"} <= named <= targets


def test_first_two_commands_are_run_and_test() -> None:
    commands = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["make run", "make test"]


@pytest.mark.parametrize("source", blocks("python"))
def test_python_examples_compile(source: str) -> None:
    ast.parse(source)


def test_launcher_flags_it_names_exist() -> None:
    flags = set(re.findall(r"tessera-launcher[^\n]*", "\n".join(blocks("sh"))))
    used = {flag for line in flags for flag in re.findall(r"--[a-z-]+", line)} - {"--help"}
    command = [sys.executable, "-m", "tessera.launcher.main", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert used and all(flag in told for flag in used)


def test_files_it_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("data:") or (ROOT / target).exists(), target


def test_files_and_profiles_its_commands_name_exist() -> None:
    commands = "\n".join(blocks("sh"))
    named = re.findall(r"(?<![\w/.])(?:docker|launcher|benchmark)/[\w./-]+", commands)
    assert "docker/compose.yaml" in named
    assert [path for path in named if not (ROOT / path).exists()] == []
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    profiles = set(re.findall(r"--profile (\w+)", commands))
    assert profiles and all(services[profile]["profiles"] == [profile] for profile in profiles)

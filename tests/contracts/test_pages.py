"""What the pages say can be done: examples compile; what commands and links name is there."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES, README, ROOT, blocks

SHELL = "(?:ba)?sh"
EXAMPLES = [(page, source) for page in PAGES for source in blocks(page, "python")]
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def name_of(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else "example"


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def whole_lines(text: str) -> str:
    """Commands that are written over several lines in one each."""
    return text.replace("\\\n", " ")


def commands(page: Path) -> str:
    return whole_lines("".join(blocks(page, SHELL)))


def make_targets(page: Path) -> set[str]:
    in_prose = re.findall(r"`make ([a-z-]+)", CODE.sub("", page.read_text()))
    return {*in_prose, *re.findall(r"^make ([a-z-]+)", commands(page), re.MULTILINE)}


def launcher_flags(page: Path) -> set[str]:
    """Of the command, and of containers, whose arguments are its."""
    uses = re.findall(
        r"(?:tessera-launcher|docker run [^\n]* tessera) ([^\n`]*)", whole_lines(page.read_text())
    )
    return {flag for use in uses for flag in re.findall(r"--[a-z-]+", use)}


def files(page: Path) -> set[str]:
    pattern = r"(?<![\w/.])(?:docker|launcher|benchmark)/[\w./-]+"
    return set(re.findall(pattern, commands(page)))


def profiles(page: Path) -> set[str]:
    return set(re.findall(r"--profile (\w+)", commands(page)))


def links(page: Path) -> list[str]:
    """Those to places in the project."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in found if not target.startswith(("data:", "http"))]


@cache
def anchors(page: Path) -> set[str]:
    """What a link may have behind `#`: headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    command = [sys.executable, "-m", "tessera.launcher.main", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return set(re.findall(r"--[a-z-]+", told))


def test_readme_has_some_of_everything_that_is_checked() -> None:
    assert {"run", "test", "help"} <= make_targets(README)
    assert {"--model-id", "--env-file"} <= launcher_flags(README)
    assert {"docker/compose.yaml", "launcher/demo/picture.png"} <= files(README)
    assert profiles(README) and links(README)
    assert README in [page for page, _ in EXAMPLES]


@pytest.mark.parametrize(("page", "source"), EXAMPLES, ids=name_of)
def test_python_examples_compile(page: Path, source: str) -> None:
    ast.parse(source, str(page))


@every_page
def test_make_targets_it_names_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert make_targets(page) - targets == set()


@every_page
def test_launcher_flags_it_names_exist(page: Path, known_flags: set[str]) -> None:
    assert launcher_flags(page) - known_flags == set()


@every_page
def test_what_it_links_exists(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.resolve()), target


@every_page
def test_files_its_commands_name_exist(page: Path) -> None:
    assert [path for path in sorted(files(page)) if not (ROOT / path).exists()] == []


@every_page
def test_profiles_its_commands_name_exist(page: Path) -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert all(services[profile]["profiles"] == [profile] for profile in profiles(page))

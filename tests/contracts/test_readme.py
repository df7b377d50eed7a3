"""README begins with two commands, its tables are current, and it leads to every other page."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pages import PAGES, README, ROOT, blocks
from readme import with_image_numbers, with_settings_table

TEXT = README.read_text()


def test_tables_are_current() -> None:
    assert with_image_numbers(with_settings_table(TEXT)) == TEXT, "run `make docs`"


def test_first_two_commands_are_run_and_test() -> None:
    commands = [line.split("#")[0].strip() for line in blocks(README, "sh")[0].splitlines()]
    assert commands == ["make run", "make test"]


def test_it_has_a_line_for_every_other_page() -> None:
    listed = TEXT.split("\n## Pages\n")[1].split("\n## ")[0].strip().splitlines()
    names = [str(page.relative_to(ROOT)) for page in PAGES if page != README]
    beginnings = [f"- [{name}]({name}): " for name in names]
    assert len(listed) == len(names)
    assert all(any(line.startswith(begun) for line in listed) for begun in beginnings)

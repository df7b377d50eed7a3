"""A headless browser for tests of the playground, and what went on in its pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 20_000  # the machine is shared
REFUSAL = "Failed to load resource"  # Chromium says this of every reply that is no success


@contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's own Chromium; without one the test is skipped, and says how to get it."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("NO BROWSER, the playground is NOT tested: run `make browser` or get chromium")
    flags = ["--no-sandbox"] if os.getuid() == 0 else []  # root cannot have its sandbox
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One page at the playground of a server, in a window of its own."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    hosts: set[str | None] = field(default_factory=set)

    def watch(self) -> None:
        def on_console(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning") and not message.text.startswith(REFUSAL):
                self.complaints.append(message.text)

        def on_request(request: Request) -> None:
            if not request.url.startswith("data:"):
                self.hosts.add(urlsplit(request.url).hostname)

        self.page.on("console", on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", on_request)

    def assert_clean(self) -> None:
        """Nothing went wrong unseen, and nothing was asked of another host."""
        assert self.complaints == []
        assert self.hosts == {"127.0.0.1"}

    def attach(self, *pictures: Path) -> None:
        self.page.get_by_label("Add pictures").set_input_files(list(pictures))

    def send(self, text: str) -> None:
        box = self.page.get_by_role("textbox", name="Message")
        box.fill(text)
        box.press("Enter")

    def answer(self, number: int = 0) -> str:
        """The text of answer `number`, once it is complete."""
        turn = self.page.get_by_role("article", name="Answer").nth(number)
        expect(turn.get_by_role("list", name="Numbers of this answer")).to_be_visible()
        return turn.locator(".text").inner_text()

    def number(self, name: str, answer: int = 0) -> float:
        """One of the numbers below an answer."""
        turn = self.page.get_by_role("article", name="Answer").nth(answer)
        text = turn.locator(f"[data-number={name}]").inner_text()
        return next(float(word) for word in text.split() if word.replace(".", "").isdigit())

    def error(self) -> str:
        """What the page says went wrong, once it says so."""
        alert = self.page.get_by_role("alert")
        alert.wait_for()
        return alert.inner_text()

    def turns(self) -> int:
        return self.page.get_by_role("article").count()


@contextmanager
def visiting(browser: Browser, address: str, **window: Any) -> Iterator[Visit]:
    """Open the playground at `address`; when the block ends nothing must have gone wrong."""
    context = browser.new_context(**window)
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    visit = Visit(context.new_page())
    visit.watch()
    try:
        visit.page.goto(address)
        yield visit
        visit.assert_clean()
    finally:
        context.close()

"""Draws router/ui/screenshot.png: `python -m tests.end_to_end.screenshot`, or `make screenshot`."""

from pathlib import Path

from tests.browser import chromium, visiting
from tests.end_to_end.stack import running

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "launcher" / "demo" / "picture.png"
WINDOW = {"width": 1120, "height": 720}


def main() -> None:
    with (
        chromium() as browser,
        running(None) as stack,
        visiting(browser, f"{stack.url}/ui", viewport=WINDOW) as visit,
    ):
        visit.attach(PICTURE)
        visit.send("What is shown in this image?")
        visit.answer(0)
        visit.send("How many shapes are there?")
        visit.answer(1)
        visit.page.screenshot(path=ROOT / "router" / "ui" / "screenshot.png")


if __name__ == "__main__":
    main()

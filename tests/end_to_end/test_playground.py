"""The playground over the real processes and the demo model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Route, expect

from tests.browser import visiting
from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

PICTURE = Path(__file__).parents[2] / "launcher" / "demo" / "picture.png"
LENGTHS = """
window.lengths = [];
new MutationObserver(() => {
  const text = document.querySelector(".answer .text");
  const length = text ? text.textContent.length : 0;
  if (length !== window.lengths.at(-1)) window.lengths.push(length);
}).observe(document, { subtree: true, childList: true, characterData: true });
"""
# Whoever looks from outside may come after the answer's end.
STOP_AT_FIRST_TEXT = """
new MutationObserver((_, observer) => {
  if (!document.querySelector(".answer .text")?.textContent) return;
  observer.disconnect();
  document.querySelector("#stop").click();
}).observe(document, { subtree: true, childList: true, characterData: true });
"""


@pytest.fixture(scope="module")
def stack(browser: Browser) -> Iterator[Stack]:
    """Needs the browser so that nothing is started where there is none."""
    with running(None, "--num-shard", "1") as stack:
        yield stack


def endless(route: Route) -> None:
    """The same request, but it may not end by itself."""
    body = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps(body | {"logit_bias": {"2": -100}}))


def test_a_chat_about_a_picture(browser: Browser, stack: Stack) -> None:
    with visiting(browser, f"{stack.url}/ui") as visit:
        expect(visit.page.locator("#model")).to_have_text("tessera-demo")
        visit.attach(PICTURE)
        visit.page.evaluate(LENGTHS)
        visit.send("What is shown in this image?")
        assert visit.answer().startswith("A red circle, a blue star and a green triangle")
        lengths = visit.page.evaluate("window.lengths")
        assert len(lengths) >= 3 and lengths == sorted(lengths)  # it grew before one's eyes
        assert visit.number("image") == 90
        assert visit.number("prompt") > 90
        assert visit.number("answer") > 10
        assert visit.number("ttft") > 0
        assert visit.number("rate") > 0
        visit.send("How many shapes are there?")
        assert visit.answer(1) == "Three."  # the picture is still known
        assert visit.number("cached", 1) >= 90
        assert visit.number("rate", 1) > 0  # of few tokens too


def test_stop_frees_the_sequence(browser: Browser, stack: Stack) -> None:
    dropped = 'tgi_request_failure{err="dropped"}'
    before, done = stack.metric(dropped), stack.metric("tgi_request_success")
    with visiting(browser, f"{stack.url}/ui") as visit:
        visit.page.route("**/chat/completions", endless)
        visit.page.evaluate(STOP_AT_FIRST_TEXT)
        visit.send("Hello")
        assert visit.answer()
        stack.wait_metric(dropped, before + 1)
        stack.wait_metric("tgi_batch_current_size", 0)
        assert stack.metric("tgi_request_success") == done  # it was cut off, not waited for
        visit.page.unroute("**/chat/completions")
        visit.send("Hello")
        assert visit.answer(1)


def test_a_refusal_is_shown_and_the_question_kept(browser: Browser, stack: Stack) -> None:
    with visiting(browser, f"{stack.url}/ui") as visit:
        visit.page.get_by_label("Max tokens").fill("1000000")
        visit.attach(PICTURE)
        visit.send("How many shapes are there?")
        assert "1000000" in visit.error()
        expect(visit.page.get_by_role("img", name="picture.png")).to_be_visible()
        assert visit.turns() == 0
        visit.page.get_by_label("Max tokens").fill("")
        visit.page.get_by_role("button", name="Send").click()
        assert visit.answer() == "Three."
        expect(visit.page.get_by_role("alert")).to_be_hidden()

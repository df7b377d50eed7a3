"""The playground in a browser, over a model that says what the test wants."""

import base64
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.browser import Visit, visiting
from tests.router.http_fakes import FakeGenerator, Script, served, wait_until

App = Callable[..., Starlette]
PICTURE = Path(__file__).parents[2] / "launcher" / "demo" / "picture.png"
ATTACK = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
PASTE = """(box, clipboardData) =>
  box.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }))"""
TRANSFER = """(name) => {
  const bytes = Uint8Array.from(atob("%s"), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  return transfer;
}"""


def transfer(visit: Visit, name: str):  # type: ignore[no-untyped-def]
    """A picture as the system's clipboard or a drag hands it over."""
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    return visit.page.evaluate_handle(TRANSFER % data, name)


class BelowPrefix:
    """A proxy that takes /some/where off every path, and knows no other."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["path"].startswith("/some/where/")
        path = scope["path"].removeprefix("/some/where")
        await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, send)


def test_a_key_is_asked_for_and_kept_in_the_tab_below_a_prefix(
    browser: Browser, text_app: App
) -> None:
    app = BelowPrefix(text_app(api_key="Secret"))
    with served(app) as address, visiting(browser, f"{address}/some/where/ui/") as visit:  # type: ignore[arg-type]
        assert "needs a key" in visit.error()
        expect(visit.page.get_by_label("API key")).to_be_focused()
        visit.send("Hello")
        assert "needs a key" in visit.error()
        expect(visit.page.get_by_role("textbox", name="Message")).to_have_value("Hello")
        visit.page.get_by_label("API key").fill("Secret")
        visit.send("Hello")
        assert visit.answer() == "Hello there"
        expect(visit.page.get_by_role("alert")).to_be_hidden()
        visit.page.reload()
        expect(visit.page.get_by_label("API key")).to_have_value("Secret")
        assert visit.page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


def test_markup_is_text_whoever_wrote_it(browser: Browser, text_app: App) -> None:
    app = text_app(FakeGenerator(Script(texts=("As ", ATTACK, "!"))))
    with served(app) as address, visiting(browser, f"{address}/ui") as visit:
        visit.send(ATTACK)
        assert visit.answer() == f"As {ATTACK}!"
        question = visit.page.get_by_role("article", name="You")
        expect(question).to_have_text(ATTACK)
        assert visit.page.evaluate("window.broken") is None
        assert visit.page.locator("#conversation script, #conversation article img").count() == 0


def test_pictures_are_chosen_pasted_dropped_and_taken_away(
    browser: Browser, vision_app: App
) -> None:
    generator = FakeGenerator()
    with served(vision_app(generator)) as address, visiting(browser, f"{address}/ui") as visit:
        attached = visit.page.get_by_role("list", name="Pictures to send").get_by_role("img")
        visit.attach(PICTURE)
        expect(attached).to_have_count(1)
        box = visit.page.get_by_role("textbox", name="Message")
        box.evaluate(PASTE, transfer(visit, "pasted.png"))
        expect(attached).to_have_count(2)
        dropped = {"dataTransfer": transfer(visit, "dropped.png")}
        visit.page.locator("body").dispatch_event("dragenter", dropped)
        expect(visit.page.get_by_text("Drop pictures to add them")).to_be_visible()
        visit.page.locator("body").dispatch_event("drop", dropped)
        expect(attached).to_have_count(3)
        expect(visit.page.get_by_text("Drop pictures to add them")).to_be_hidden()
        visit.page.get_by_role("button", name="Remove pasted.png").click()
        expect(attached).to_have_count(2)
        visit.send("")
        visit.answer()
        expect(attached).to_have_count(0)
        shown = visit.page.get_by_role("article", name="You").get_by_role("img")
        assert [shown.nth(n).get_attribute("alt") for n in (0, 1)] == ["picture.png", "dropped.png"]
    assert len(generator.requests[0].images) == 2


def test_too_much_is_told_before_it_is_sent(browser: Browser, vision_app: App) -> None:
    generator = FakeGenerator()
    app = vision_app(generator, payload_limit=3000)
    with served(app) as address, visiting(browser, f"{address}/ui") as visit:
        visit.attach(PICTURE)
        expect(visit.page.get_by_role("status")).to_contain_text("the server reads at most")
        visit.send("What is it?")
        assert "Take smaller or fewer pictures" in visit.error()
        visit.page.get_by_role("button", name="Remove picture.png").click()
        expect(visit.page.get_by_role("status")).to_be_hidden()
        assert visit.turns() == 0
        visit.send("Hello")
        assert visit.answer() == "Hello there"
    assert len(generator.requests) == 1


def test_settings_are_sent_and_the_history_with_them(browser: Browser, make_app: App) -> None:
    generator = FakeGenerator()
    app = make_app("next-yi", generator)  # its template knows system prompts
    with served(app) as address, visiting(browser, f"{address}/ui") as visit:
        settings = {"System prompt": "Be brief.", "Temperature": "0.5", "Top p": "0.9"}
        for label, value in (settings | {"Max tokens": "7", "Seed": "42"}).items():
            visit.page.get_by_label(label).fill(value)
        visit.send("One")
        visit.answer(0)
        visit.send("Two")
        visit.answer(1)
        visit.page.get_by_role("button", name="New chat").click()
        assert visit.turns() == 0
        visit.send("Three")
        visit.answer(0)
    first, second, third = generator.requests
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 42)
    assert first.stopping.max_new_tokens == 7
    assert "Be brief." in first.prompt_text
    assert all(word in second.prompt_text for word in ("Be brief.", "One", "Hello there", "Two"))
    assert "Two" not in third.prompt_text and "Three" in third.prompt_text


def test_enter_sends_and_shift_enter_does_not(browser: Browser, text_app: App) -> None:
    with served(text_app()) as address, visiting(browser, f"{address}/ui") as visit:
        box = visit.page.get_by_role("textbox", name="Message")
        expect(box).to_be_focused()
        visit.page.keyboard.type("a")
        visit.page.keyboard.press("Shift+Enter")
        visit.page.keyboard.type("b")
        expect(box).to_have_value("a\nb")
        visit.page.keyboard.press("Enter")
        visit.answer()
        assert visit.page.get_by_role("article", name="You").inner_text() == "a\nb"


@pytest.mark.parametrize("button", ["Stop", "New chat"])
def test_an_answer_nobody_waits_for_ends_on_the_server(
    browser: Browser, text_app: App, button: str
) -> None:
    generator = FakeGenerator(Script(hang_after=1))
    with served(text_app(generator)) as address, visiting(browser, f"{address}/ui") as visit:
        visit.send("Hello")
        expect(visit.page.get_by_role("article", name="Answer")).to_have_text("Hel")
        expect(visit.page.get_by_role("button", name="Send")).to_be_hidden()
        assert not generator.all_closed
        visit.page.get_by_role("button", name=button).click()
        wait_until(lambda: generator.all_closed)
        expect(visit.page.get_by_role("button", name="Send")).to_be_visible()
        if button == "Stop":
            assert visit.answer() == "Hel"
            expect(visit.page.get_by_text("stopped")).to_be_visible()
        else:
            assert visit.turns() == 0


REPLY = 'data: {"choices":[{"delta":{"content":"Half"}}]}\n\n'


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        (
            'data: {"choices":[],"warnings":["It was scaled."]}\n\ndata: [DONE]\n\n',
            "It was scaled.",
        ),
        ('data: {"error":{"message":"A shard died."}}\n\ndata: [DONE]\n\n', "A shard died."),
        ("", "The connection was lost before the answer was complete."),
    ],
)
def test_what_a_stream_says_beside_its_text(
    browser: Browser, text_app: App, rest: str, told: str
) -> None:
    with served(text_app()) as address, visiting(browser, f"{address}/ui") as visit:
        visit.page.route(
            "**/chat/completions",
            lambda route: route.fulfill(content_type="text/event-stream", body=REPLY + rest),
        )
        visit.send("Hello")
        assert visit.answer() == "Half"
        expect(visit.page.get_by_role("article", name="Answer")).to_contain_text(told)


def test_a_server_that_is_gone(browser: Browser, text_app: App) -> None:
    with served(text_app()) as address, visiting(browser, f"{address}/ui") as visit:
        visit.page.route("**/chat/completions", lambda route: route.abort())
        visit.send("Hello")
        assert visit.error() == "The server cannot be reached."
        expect(visit.page.get_by_role("textbox", name="Message")).to_have_value("Hello")
        assert visit.turns() == 0


def test_it_fits_a_phone_and_follows_the_colour_scheme(browser: Browser, text_app: App) -> None:
    colours = set()
    phone = {"width": 360, "height": 640}
    with served(text_app()) as address:
        for scheme in ("light", "dark"):
            with visiting(browser, f"{address}/ui", viewport=phone, color_scheme=scheme) as visit:
                visit.send("w" * 300)
                visit.answer()
                page = visit.page
                assert page.evaluate("document.documentElement.scrollWidth") == phone["width"]
                for name in ("Send", "New chat"):
                    expect(page.get_by_role("button", name=name)).to_be_in_viewport(ratio=1)
                colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2

"""The playground as files: what is served, to whom, and how little it may do."""

import tomllib
from collections.abc import Callable

import pytest
from starlette.applications import Starlette

from tessera.router.playground import FOLDER, PATHS
from tests.router.http_fakes import call

App = Callable[..., Starlette]
LOADED = {"index.html", "style.css", "icon.svg", "page.js", "api.js", "turns.js", "pictures.js"}


@pytest.mark.parametrize("path", sorted(PATHS - {"/ui/"}))
def test_files_are_served_without_a_key_and_locked_down(text_app: App, path: str) -> None:
    reply = call(text_app(api_key="Secret"), "GET", path)
    assert reply.status_code == 200 and reply.content
    policy = reply.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
    assert not any(word in reply.headers["content-security-policy"] for word in ("unsafe", "http"))
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "Secret" not in reply.text


def test_every_file_of_the_folder_is_served() -> None:
    served = {path.rpartition("/")[2] for path in PATHS - {"/ui", "/ui/"}} | {"index.html"}
    assert served == LOADED == {path.name for path in FOLDER.iterdir()} - {"screenshot.png"}


def test_every_served_file_is_in_the_wheel_and_the_screenshot_is_not() -> None:
    pyproject = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["tessera.router"]
    packed = {path.name for pattern in patterns for path in FOLDER.parent.glob(pattern)}
    assert packed == LOADED


def test_the_page_knows_how_much_it_may_send(text_app: App) -> None:
    page = call(text_app(payload_limit=12345), "GET", "/ui")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert 'data-payload-limit="12345"' in page.text


def test_a_slash_too_many_leads_back_below_any_prefix(text_app: App) -> None:
    reply = call(text_app(api_key="Secret"), "GET", "/ui/")
    assert (reply.status_code, reply.headers["location"]) == (307, "../ui")


@pytest.mark.parametrize("path", ["/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/index.html", "/uix"])
def test_nothing_else_is_served(text_app: App, path: str) -> None:
    assert call(text_app(), "GET", path).status_code == 404
    assert call(text_app(api_key="Secret"), "GET", path).status_code == 401


def test_only_reading_is_open(text_app: App) -> None:
    assert call(text_app(api_key="Secret"), "POST", "/ui").status_code == 401
    assert call(text_app(), "POST", "/ui").status_code == 405


def test_it_can_be_switched_off(text_app: App) -> None:
    app = text_app(playground=False)
    assert {call(app, "GET", path).status_code for path in PATHS} == {404}

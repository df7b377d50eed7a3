"""Pictures that a request names instead of sending, on every route."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from tessera.proto.image_layout import AnyResLayout
from tessera.router.images import prepare_image
from tests.router.http_fakes import FakeGenerator, post, served, wait_until
from tests.router.image_server import OK, ImageServer, image_server, reply
from tests.router.test_pictures import png, source

App = Callable[..., Starlette]


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with image_server() as one:
        one.replies["/a.png"] = reply(png())
        one.endless["/slow"] = (OK + b"Content-Length: 100000\r\n\r\n", b"x", 0.05)
        yield one


def allowing(server: ImageServer, **more: Any) -> dict[str, Any]:
    return {"allowed_image_domains": (server.host,), "allow_private_image_hosts": True, **more}


def chat(*addresses: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": address} for address in addresses]
    text = {"type": "text", "text": "What?"}
    return {"messages": [{"role": "user", "content": [*parts, text]}]}


def spellings(address: str) -> list[tuple[str, dict[str, Any]]]:
    """One request of every kind; the first four say the same."""
    return [
        ("/generate", {"inputs": f"![]({address})What?"}),
        ("/generate", {"inputs": f"![a cat]({address})What?"}),
        ("/generate_stream", {"inputs": f"<image>{address}</image>What?"}),
        ("/v1/completions", {"prompt": f"![]({address})What?"}),
        ("/", {"inputs": f"<image> {address}\n</image>What?"}),
        ("/v1/chat/completions", chat(address)),
        ("/v1/chat/completions", chat({"url": address})),
        ("/v1/chat/completions", chat({"url": address}) | {"stream": True}),
    ]


def test_every_route_and_spelling_takes_urls_and_files(
    vision_app: App, server: ImageServer, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    addresses = [server.url("/a.png"), f"file://{tmp_path}/a.png"]
    hashes = set()
    for address in addresses:
        for path, body in spellings(address):
            generator = FakeGenerator()
            settings = allowing(server, allowed_image_paths=(str(tmp_path),))
            response = post(vision_app(generator, **settings), path, body)
            assert response.status_code == 200, (path, response.text)
            (request,) = generator.requests
            hashes.add(request.images[0].image.content_hash)
    assert len(hashes) == 1
    assert len(server.requests) == 8
    bare = {"inputs": f"![]({tmp_path}/a.png)What?"}
    app = vision_app(allowed_image_paths=(str(tmp_path),))
    assert post(app, "/generate", bare).status_code == 200


@pytest.mark.parametrize("address", ["http://a.b/c", "https://a.b/c", "file:///tmp/a", "ftp://a/b"])
def test_nothing_is_opened_by_default(
    vision_app: App, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("getaddrinfo", "socket.connect"):
        monkeypatch.setattr(f"socket.{name}", lambda *_: pytest.fail("it was opened"))
    for path, body in [*spellings(address), ("/tokenize", {"inputs": f"![]({address})"})]:
        response = post(vision_app(), path, body)
        assert response.status_code == 422
        told = response.text
        assert "a.b" not in told and "/tmp" not in told
        assert "ALLOWED_IMAGE_DOMAINS" in told or "ALLOWED_IMAGE_PATHS" in told


def test_a_text_model_refuses_and_fetches_nothing(text_app: App, server: ImageServer) -> None:
    app = text_app(**allowing(server))
    for path, body in spellings(server.url("/a.png")):
        response = post(app, path, body)
        assert response.status_code == 422 and "pictures" in response.text
    assert server.requests == []


def test_a_picture_named_twice_is_fetched_once(vision_app: App, server: ImageServer) -> None:
    url = server.url("/a.png")
    generator = FakeGenerator()
    app = vision_app(generator, **allowing(server))
    assert post(app, "/generate", {"inputs": f"![]({url})" * 3}).status_code == 200
    assert len(generator.requests[0].images) == 3 and len(server.requests) == 1
    prompts = [f"![]({url})a", f"![]({url})b"]
    assert post(app, "/v1/completions", {"prompt": prompts}).status_code == 200
    assert len(server.requests) == 2


def test_the_picture_at_fault_is_named_by_its_number(vision_app: App, server: ImageServer) -> None:
    app = vision_app(**allowing(server))
    urls = [server.url("/a.png"), server.url("/missing"), server.url("/a.png")]
    server.replies["/missing"] = reply(b"secret", status="404 Not Found")
    server.replies["/html"] = reply(b"<html>secret</html>")
    told = post(app, "/v1/chat/completions", chat(*urls)).text
    assert "picture 2 of 3: the picture's server answered" in told
    told = post(app, "/v1/chat/completions", chat(*urls[:1], server.url("/html"))).text
    assert "picture 2 of 2: the picture is not a PNG" in told and "secret" not in told
    told = post(app, "/v1/chat/completions", chat(server.url("/html"))).text
    assert "error: the picture is not a PNG" in told


def test_bytes_are_counted_per_request(
    vision_app: App, server: ImageServer, tmp_path: Path
) -> None:
    size = len(png())
    (tmp_path / "a.png").write_bytes(png())
    settings = allowing(server, allowed_image_paths=(str(tmp_path),), max_image_fetch_size=2 * size)
    app = vision_app(**settings)
    both = [server.url("/a.png"), f"{tmp_path}/a.png"]
    assert post(app, "/v1/chat/completions", chat(*both)).status_code == 200
    server.replies["/a.png?2"] = reply(png())
    response = post(app, "/v1/chat/completions", chat(*both, server.url("/a.png?2")))
    assert response.status_code == 422 and "MAX_IMAGE_FETCH_SIZE" in response.text
    prompts = [f"![]({address})" for address in (*both, server.url("/a.png?2"))]
    response = post(app, "/v1/completions", {"prompt": prompts})
    assert response.status_code == 422 and "MAX_IMAGE_FETCH_SIZE" in response.text


def test_pixels_of_a_request_are_summed_before_any_is_decoded(
    vision_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counting(data: bytes, layout: AnyResLayout, *more: Any) -> Any:
        decoded.append(len(data))
        return prepare_image(data, layout, *more)

    monkeypatch.setattr("tessera.router.pictures.prepare_image", counting)
    app = vision_app(max_request_pixels=2 * 112 * 112)
    picture = f"<image>{source()}</image>"
    assert post(app, "/generate", {"inputs": picture * 2}).status_code == 200
    decoded.clear()
    told = post(app, "/generate", {"inputs": picture * 3}).text
    assert f"{3 * 112 * 112} pixels together" in told and "MAX_REQUEST_PIXELS" in told
    assert decoded == []
    response = post(app, "/v1/completions", {"prompt": [picture * 2, picture]})
    assert response.status_code == 422 and "MAX_REQUEST_PIXELS" in response.text


def test_few_pictures_of_a_request_are_fetched_at_once(
    vision_app: App, server: ImageServer
) -> None:
    app = vision_app(**allowing(server, image_fetch_timeout=0.5))
    urls = [server.url(f"/slow?{n}") for n in range(8)]
    for n in range(8):
        server.endless[f"/slow?{n}"] = server.endless["/slow"]
    response = post(app, "/v1/chat/completions", chat(*urls))
    assert response.status_code == 422 and "IMAGE_FETCH_TIMEOUT" in response.text
    assert server.most_connections == 4


def test_a_client_that_leaves_ends_its_fetches(vision_app: App, server: ImageServer) -> None:
    app = vision_app(**allowing(server))
    with served(app) as url:
        for path, body in spellings(server.url("/slow")):
            with httpx.Client(timeout=0.4) as client, pytest.raises(httpx.ReadTimeout):
                client.post(f"{url}{path}", json=body)
            wait_until(lambda: server.open_connections == 0)
        assert len(server.requests) == 8


def test_text_and_other_pictures_do_not_wait_for_fetches(
    vision_app: App, server: ImageServer
) -> None:
    app = vision_app(**allowing(server, validation_workers=1))
    with served(app) as url:
        slow = [
            threading.Thread(
                target=lambda: httpx.post(
                    f"{url}/generate", json={"inputs": f"![]({server.url('/slow')})"}, timeout=30
                )
            )
            for _ in range(8)
        ]
        for thread in slow:
            thread.start()
        wait_until(lambda: len(server.requests) == 8)
        for inputs in ("Hello", f"<image>{source()}</image>Hello", f"![]({server.url('/a.png')})"):
            assert httpx.post(f"{url}/generate", json={"inputs": inputs}).status_code == 200
        assert server.open_connections == 8  # they were still at it
        server.stopped.set()
        for thread in slow:
            thread.join(20)


def test_one_request_of_many_pictures_does_not_hold_up_another(
    vision_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    turns = threading.Semaphore(0)

    def in_turn(data: bytes, layout: AnyResLayout, *more: Any) -> Any:
        assert turns.acquire(timeout=20)
        decoded.append(len(data))
        return prepare_image(data, layout, *more)

    monkeypatch.setattr("tessera.router.pictures.prepare_image", in_turn)
    app = vision_app(validation_workers=1)

    async def go() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            inputs = f"<image>{source()}</image>"
            many = asyncio.ensure_future(client.post("/generate", json={"inputs": inputs * 12}))
            await asyncio.sleep(0.3)  # its first picture is being decoded
            one = asyncio.ensure_future(client.post("/generate", json={"inputs": inputs}))
            while not one.done():
                turns.release()
                await asyncio.sleep(0.2)
            assert (await one).status_code == 200
            assert 2 <= len(decoded) < 10
            turns.release(100)
            assert (await many).status_code == 200

    asyncio.run(go())

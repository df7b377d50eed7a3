"""Pictures by URL, from servers of every kind."""

import asyncio
import gzip
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trustme

from tessera.proto.env import SettingsError
from tessera.router.errors import ValidationError
from tessera.router.image_fetch import ImageFetcher
from tessera.router.picture_allowance import PictureAllowance
from tessera.router.settings import RouterSettings
from tests.router.image_server import DRIP_S, OK, ImageServer, image_server, redirect, reply
from tests.router.test_pictures import png

PICTURE = png()


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with image_server() as one:
        one.replies["/a.png"] = reply(PICTURE)
        yield one


def options(server: ImageServer | None = None, **changed: Any) -> RouterSettings:
    domains = (server.host,) if server else ("*",)
    defaults = {"allowed_image_domains": domains, "allow_private_image_hosts": server is not None}
    return RouterSettings(**(defaults | changed))


def fetch(url: str, settings: RouterSettings, **more: Any) -> bytes:
    async def go() -> bytes:
        return await ImageFetcher(settings, **more).fetch(url, PictureAllowance(settings))

    return asyncio.run(go())


def refusal(url: str, settings: RouterSettings, **more: Any) -> str:
    """Why it is not fetched; that nothing of the URL is told is checked here for all tests."""
    with pytest.raises(ValidationError) as refused:
        fetch(url, settings, **more)
    told = str(refused.value)
    assert "127.0.0" not in told and "secret" not in told and len(told) < 300
    return told


def test_a_picture_is_fetched_with_a_plain_request(
    server: ImageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:1")
    server.replies["/a.png?x=%20y"] = reply(PICTURE)
    assert fetch(f"  {server.url('/a.png')}?x=%20y#fragment \n", options(server)) == PICTURE
    head = server.requests[-1].lower()
    assert head.startswith("get /a.png?x=%20y http/1.1\r\n")
    assert f"host: {server.host}\r\n" in head and "accept-encoding: identity\r\n" in head
    for unwanted in ("authorization", "cookie", "referer", "proxy"):
        assert unwanted not in head


def test_chunked_and_unlengthed_answers(server: ImageServer) -> None:
    chunk = f"{len(PICTURE):x}\r\n".encode() + PICTURE + b"\r\n0\r\n\r\n"
    server.replies["/chunked"] = [OK + b"Transfer-Encoding: chunked\r\n\r\n", chunk]
    server.replies["/until-closed"] = [OK + b"\r\n", PICTURE]
    for path in ("/chunked", "/until-closed"):
        assert fetch(server.url(path), options(server)) == PICTURE


def test_off_by_default(server: ImageServer) -> None:
    told = refusal(server.url("/a.png"), RouterSettings())
    assert "switched off" in told and "ALLOWED_IMAGE_DOMAINS" in told
    assert server.requests == []


@pytest.mark.parametrize("scheme_and_slashes", ["http://", "HTTP://", " \thttp://"])
def test_spellings_of_the_scheme(server: ImageServer, scheme_and_slashes: str) -> None:
    assert fetch(f"{scheme_and_slashes}{server.host}/a.png", options(server)) == PICTURE


LOOPBACK = [
    "127.0.0.1",
    "127.1",
    "127.0.0.1.",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "0",
    "0.0.0.0",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:0:0:1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[2002:7f00:1::]",
    "[::1%25lo]",
    "[::1%lo]",
    "[fe80::1%25lo]",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "loc%61lhost",
    "１２７.0.0.1",
    "127。0。0。1",
    "169.254.169.254",
    "metadata.google.internal",
    "does-not-exist.invalid",
    ".localhost",
    "a" * 70,
]


@pytest.mark.parametrize("host", LOOPBACK)
def test_every_spelling_of_loopback_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    monkeypatch.setattr("socket.socket.connect", lambda *given: connected.append(given))
    told = refusal(f"http://{host}/secret", options())
    assert "no address that this server connects to" in told or "malformed" in told
    assert connected == []


@pytest.mark.parametrize(
    "url",
    [
        "http://user@example.org/secret",
        "http://user:secret@example.org/",
        "http://127.0.0.1:6666\\@1.1.1.1/",
        "http://1.1.1.1\\@127.0.0.1/",
        "http:\\\\127.0.0.1\\",
        "http://example.org/\r\nX-Injected: secret",
        "http://example.org/a b",
        "http://example.org\x00.localhost/",
        "http://",
        "http:///secret",
        "http:secret",
        "http://example.org:99999/",
        "http://example.org:-1/",
        "http://[::1/",
        "http://example.org/" + "a" * 9000,
        "https:/secret",
    ],
)
def test_malformed_urls(url: str) -> None:
    assert "malformed" in refusal(url, options())


def test_only_the_named_hosts(server: ImageServer) -> None:
    domains = ("example.org", "Images.Example.COM.", "bücher.de", "intranet:8080")
    settings = options(allowed_image_domains=domains)

    def allowed(url: str) -> bool:
        asked: list[str] = []

        def resolve(host: str, port: int) -> Sequence[str]:
            asked.append(host)
            raise OSError

        refusal(url, settings, resolve=resolve)
        return bool(asked)

    for url in (
        "http://example.org/a",
        "https://EXAMPLE.org:443/a",
        "http://example.org./a",
        "http://images.example.com:80/",
        "https://bücher.de/",
        "http://xn--bcher-kva.de/",
        "http://intranet:8080/",
    ):
        assert allowed(url), url
    for url in (
        "http://www.example.org/",
        "http://example.org.evil.net/",
        "http://evilexample.org/",
        "http://example.org:8080/",
        "http://intranet/",
        "http://example.org@evil.net/",
        "http://evil.net/?example.org",
        "http://evil.net#example.org",
        server.url("/a.png"),
    ):
        assert not allowed(url), url


def test_any_host_means_the_usual_ports() -> None:
    assert "80 and 443" in refusal("http://example.org:8080/", options())


@pytest.mark.parametrize(
    "entry", ["https://example.org", "*.example.org", "example.org/a", "a@b", "", "a b", "[::1"]
)
def test_unusable_entries_are_told_at_the_start(entry: str) -> None:
    with pytest.raises(SettingsError, match="ALLOWED_IMAGE_DOMAINS"):
        ImageFetcher(RouterSettings(allowed_image_domains=("example.org", entry)))


def test_a_name_is_resolved_once_and_the_connection_goes_there(server: ImageServer) -> None:
    """DNS rebinding: whatever a second look-up would say is never asked for."""
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])
    settings = options(server, allowed_image_domains=(f"rebind.test:{server.port}",))
    url = f"http://rebind.test:{server.port}/a.png"
    fetched = fetch(url, settings, resolve=lambda host, port: next(answers))
    assert fetched == PICTURE
    assert f"Host: rebind.test:{server.port}".lower() in server.requests[0].lower()
    assert next(answers) == ["169.254.169.254"]


def test_one_bad_address_among_good_ones_is_enough() -> None:
    def resolve(host: str, port: int) -> list[str]:
        return ["1.1.1.1", "127.0.0.1"]

    assert "no address" in refusal("http://example.org/", options(), resolve=resolve)


def test_the_next_address_is_tried(server: ImageServer) -> None:
    settings = options(server, allowed_image_domains=(f"two.test:{server.port}",))
    url = f"http://two.test:{server.port}/a.png"
    assert fetch(url, settings, resolve=lambda *_: ["127.0.0.2", "127.0.0.1"]) == PICTURE


def test_three_redirects_are_followed_and_no_more(server: ImageServer) -> None:
    for n in range(4):
        server.replies[f"/{n}"] = redirect(f"/{n + 1}" if n else server.url("/1"))
    server.replies["/4"] = reply(PICTURE)
    assert fetch(server.url("/1"), options(server)) == PICTURE
    assert "more than 3 times" in refusal(server.url("/0"), options(server))
    server.replies["/loop"] = redirect("/loop")
    server.requests.clear()
    assert "more than 3 times" in refusal(server.url("/loop"), options(server))
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254/latest", "none that this server fetches from"),
        ("http://localhost/", "none that this server fetches from"),
        ("//10.0.0.1/", "none that this server fetches from"),
        ("file:///etc/passwd", "malformed"),
        ("ftp://example.org/", "malformed"),
        ("http://u:p@example.org/", "malformed"),
        ("http://a\\@b/", "malformed"),
        ("", "redirects"),
    ],
)
def test_redirects_are_checked_like_first_urls(
    server: ImageServer, location: str, reason: str
) -> None:
    server.replies["/"] = redirect(location)
    assert reason in refusal(server.url("/"), options(server))


def test_redirect_from_any_host_to_a_private_one(server: ImageServer) -> None:
    server.replies["/"] = redirect("http://inside.test/")
    settings = options(server, allowed_image_domains=("*", f"out.test:{server.port}"))
    addresses = {"out.test": ["127.0.0.1"], "inside.test": ["169.254.169.254"]}
    told = refusal(
        f"http://out.test:{server.port}/", settings, resolve=lambda host, port: addresses[host]
    )
    assert "no address" in told and len(server.requests) == 1


@pytest.mark.parametrize("status", ["404 Not Found", "204 No Content", "206 Partial", "500 secret"])
def test_other_statuses(server: ImageServer, status: str) -> None:
    server.replies["/"] = reply(b"secret", status=status)
    assert "status other than 200" in refusal(server.url("/"), options(server))


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "zstd"])
def test_compressed_answers(server: ImageServer, encoding: str) -> None:
    server.replies["/"] = reply(gzip.compress(bytes(10**6)), f"Content-Encoding: {encoding}")
    assert "compressed" in refusal(server.url("/"), options(server))


def test_size_limit(server: ImageServer) -> None:
    size = len(PICTURE)
    assert fetch(server.url("/a.png"), options(server, max_image_fetch_size=size)) == PICTURE
    told = refusal(server.url("/a.png"), options(server, max_image_fetch_size=size - 1))
    assert f"{size - 1} bytes" in told and "MAX_IMAGE_FETCH_SIZE" in told


@pytest.mark.parametrize(
    "head",
    [
        OK + b"\r\n",
        OK + b"Content-Length: 99999999999\r\n\r\n",
        OK + b"Content-Length: 9" + b"9" * 50 + b"\r\n\r\n",
    ],
)
def test_endless_answers_are_cut_off(server: ImageServer, head: bytes) -> None:
    server.endless["/"] = (head, bytes(65536), 0.0)
    told = refusal(server.url("/"), options(server, max_image_fetch_size=10**6))
    assert "MAX_IMAGE_FETCH_SIZE" in told or "could not be reached" in told


def test_endless_chunks_and_heads(server: ImageServer) -> None:
    chunked = OK + b"Transfer-Encoding: chunked\r\n\r\n"
    server.endless["/chunks"] = (chunked, b"1000\r\n" + bytes(4096) + b"\r\n", 0.0)
    server.endless["/head"] = (OK, b"X-More: " + b"a" * 1000 + b"\r\n", 0.0)
    server.endless["/continue"] = (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0)
    settings = options(server, max_image_fetch_size=10**5, image_fetch_timeout=0.5)
    assert "MAX_IMAGE_FETCH_SIZE" in refusal(server.url("/chunks"), settings)
    assert "broke off" in refusal(server.url("/head"), settings)
    assert "IMAGE_FETCH_TIMEOUT" in refusal(server.url("/continue"), settings)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"secret\r\n\r\n"],
        reply(PICTURE, length=len(PICTURE) + 1),
        [OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\nsecret"],
        [OK + b"Content-Length: -1\r\n\r\n"],
        [b"HTTP/1.1 101 Switching Protocols\r\n\r\n"],
    ],
)
def test_broken_answers(server: ImageServer, parts: list[bytes]) -> None:
    server.replies["/"] = parts
    told = refusal(server.url("/"), options(server))
    assert "broke off" in told or "status other than 200" in told


def test_too_short_a_length_gives_no_more_than_it_says(server: ImageServer) -> None:
    server.replies["/"] = reply(PICTURE, length=10)
    assert fetch(server.url("/"), options(server)) == PICTURE[:10]


@pytest.mark.parametrize("head", [b"", OK + b"Content-Length: 10000\r\n\r\n"])
def test_slow_answers_end_at_the_deadline(server: ImageServer, head: bytes) -> None:
    server.endless["/"] = (head, b"H" if not head else b"x", DRIP_S)
    told = refusal(server.url("/"), options(server, image_fetch_timeout=0.3))
    assert "within 0.3 seconds" in told and "IMAGE_FETCH_TIMEOUT" in told


def test_a_silent_resolver_ends_at_the_deadline() -> None:
    def resolve(host: str, port: int) -> list[str]:
        time.sleep(1)
        return ["1.1.1.1"]

    told = refusal("http://a.test/", options(image_fetch_timeout=0.1), resolve=resolve)
    assert "IMAGE_FETCH_TIMEOUT" in told


def test_nobody_listening() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = RouterSettings(
        allowed_image_domains=(f"127.0.0.1:{port}",), allow_private_image_hosts=True
    )
    assert "could not be reached" in refusal(f"http://127.0.0.1:{port}/", settings)


def test_certificates_are_verified_for_the_host_and_not_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("images.test").configure_cert(tls)
    with image_server(tls) as server:
        server.replies["/a.png"] = reply(PICTURE)
        domains = tuple(f"{name}.test:{server.port}" for name in ("images", "other"))
        settings = options(server, allowed_image_domains=domains)
        url = f"https://images.test:{server.port}/a.png"

        def resolve(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        assert "could not be reached" in refusal(url, settings, resolve=resolve)
        authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        assert fetch(url, settings, resolve=resolve) == PICTURE
        other = url.replace("images.", "other.")
        assert "could not be reached" in refusal(other, settings, resolve=resolve)


def test_cookies_are_not_kept(server: ImageServer) -> None:
    server.replies["/"] = reply(PICTURE, "Set-Cookie: secret=1")
    settings = options(server)

    async def twice() -> None:
        fetcher = ImageFetcher(settings)
        for _ in range(2):
            await fetcher.fetch(server.url("/"), PictureAllowance(settings))

    asyncio.run(twice())
    assert len(server.requests) == 2 and "cookie" not in server.requests[1].lower()

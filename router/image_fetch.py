"""Pictures by URL: off by default, from allowed hosts only, at addresses that were checked.

A URL is taken apart once, by the library that also connects. Its host is resolved once, every
address is checked, and the connection goes to one of them, whatever a second look-up would say.
Redirects are followed by hand, so each hop passes the same checks. Nothing of a URL, an address or
a reply reaches the client: what cannot be fetched looks alike, whether it exists or not.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpx2

from tessera.proto.env import SettingsError
from tessera.router.errors import ValidationError
from tessera.router.picture_allowance import PictureAllowance
from tessera.router.public_address import may_connect
from tessera.router.settings import RouterSettings

MAX_REDIRECTS = 3
MAX_URL_LENGTH = 8192
MAX_CONCURRENT = 128
"""Fetches of all requests at once."""

MAX_ADDRESSES = 4
"""Addresses of one host that are tried."""

CONNECT_TIMEOUT_S = 3.0  # per address, so that a dead one leaves time for the next
RESOLVERS = 16  # threads: the system's resolver blocks

_DEFAULT_PORTS = {"http": 80, "https": 443}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

Resolve = Callable[[str, int], Sequence[str]]
"""The IP addresses of (host, port), best first; blocks, and raises OSError when there are none."""


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class ImageFetcher:
    """Fetches pictures for requests."""

    def __init__(self, settings: RouterSettings, resolve: Resolve = _resolve) -> None:
        """`resolve` is called in threads.

        Raises:
            SettingsError: ALLOWED_IMAGE_DOMAINS holds something else than hosts.
        """
        domains = settings.allowed_image_domains
        self._any_host = "*" in domains
        self._hosts = frozenset(_allowed_host(domain) for domain in domains if domain != "*")
        self._allow_private = settings.allow_private_image_hosts
        self._timeout_s = settings.image_fetch_timeout
        self._resolve = resolve
        self._resolvers = ThreadPoolExecutor(RESOLVERS, "resolve")
        self._fetching = asyncio.Semaphore(MAX_CONCURRENT)
        self._transport = _transport() if domains else None

    def close(self) -> None:
        """Stop the threads; fetches under way are their callers' to cancel."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str, allowance: PictureAllowance) -> bytes:
        """The file at a URL.

        Args:
            url: as the client wrote it, http or https.
            allowance: how many bytes it may have and when it must be there; waiting for one's turn
                counts.

        Raises:
            ValidationError: it may not be fetched, cannot be, is too large or takes too long.
        """
        if self._transport is None:
            raise ValidationError(
                "fetching pictures by URL is switched off; send the picture itself as a data URI, "
                "or start the server with ALLOWED_IMAGE_DOMAINS (`*`: any public host)"
            )
        try:
            async with (
                asyncio.timeout_at(allowance.fetch_deadline),
                allowance.fetching,
                self._fetching,
            ):
                return await self._follow(self._transport, url.strip(), allowance)
        except TimeoutError:
            raise ValidationError(
                f"the request's pictures could not be fetched within {self._timeout_s:g} seconds "
                "(IMAGE_FETCH_TIMEOUT)"
            ) from None
        except (httpx2.TransportError, httpx2.StreamError):
            raise _unreachable() from None

    async def _follow(
        self, transport: httpx2.AsyncBaseTransport, text: str, allowance: PictureAllowance
    ) -> bytes:
        url = _parsed(text, None)
        for _ in range(1 + MAX_REDIRECTS):
            self._check_host(url)
            async with self._get(transport, url) as response:
                if response.status_code not in _REDIRECTS:
                    return await _body(response, allowance)
                location = response.headers.get("location", "")
            url = _parsed(location, url)
        raise ValidationError(f"the picture's URL redirects more than {MAX_REDIRECTS} times")

    def _check_host(self, url: httpx2.URL) -> None:
        host, port = _host(url), _port(url)
        usual = port in _DEFAULT_PORTS.values()
        if (host, port) in self._hosts or (usual and (host, None) in self._hosts):
            return
        if not self._any_host:
            raise ValidationError(
                "the picture's host is none that this server fetches from "
                "(ALLOWED_IMAGE_DOMAINS); send the picture itself as a data URI"
            )
        if not usual:
            raise ValidationError("pictures of any host are fetched from ports 80 and 443 only")

    @asynccontextmanager
    async def _get(
        self, transport: httpx2.AsyncBaseTransport, url: httpx2.URL
    ) -> AsyncIterator[httpx2.Response]:
        """The answer of the first address that can be connected to."""
        addresses = await self._addresses(url)
        response = None
        for address in addresses[:MAX_ADDRESSES]:
            try:
                response = await transport.handle_async_request(_request(url, address))
                break
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
        if response is None:
            raise _unreachable()
        try:
            yield response
        finally:
            await response.aclose()

    async def _addresses(self, url: httpx2.URL) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        try:
            addresses = await loop.run_in_executor(
                self._resolvers, self._resolve, _host(url), _port(url)
            )
        except (OSError, UnicodeError):
            addresses = ()
        allow_private = self._allow_private
        if not addresses or not all(may_connect(a, allow_private=allow_private) for a in addresses):
            raise ValidationError(
                "the picture's host has no address that this server connects to; those of private "
                "networks need ALLOW_PRIVATE_IMAGE_HOSTS"
            )
        return addresses


def _transport() -> httpx2.AsyncHTTPTransport:
    """Connections of which each serves one request.

    Beneath a client there are no cookies, redirects, proxies or credentials. A connection kept
    alive would be known by its address alone, and could serve a host it was not verified for.
    Certificates are trusted as the machine does, or as SSL_CERT_FILE says.
    """
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx2.AsyncHTTPTransport(limits=limits)


def _request(url: httpx2.URL, address: str) -> httpx2.Request:
    """A request to `address` for what `url` names."""
    host = _host(url)
    headers = {
        "host": url.copy_with(host=host).netloc.decode("ascii"),
        "accept": "image/png, image/jpeg, image/webp, image/gif",
        "accept-encoding": "identity",
        "user-agent": "tessera",
        "connection": "close",
    }
    extensions = {
        "sni_hostname": host,
        "timeout": {"connect": CONNECT_TIMEOUT_S},  # all else is bounded by the deadline
    }
    return httpx2.Request(
        "GET", url.copy_with(host=address), headers=headers, extensions=extensions
    )


async def _body(response: httpx2.Response, allowance: PictureAllowance) -> bytes:
    if response.status_code != 200:
        raise ValidationError("the picture's server answered with a status other than 200")
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ValidationError("the picture's server sent it compressed, which was not asked for")
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > allowance.num_bytes:
        allowance.take_bytes(int(length[:20]))
    parts = []
    async for part in response.aiter_raw():
        allowance.take_bytes(len(part))
        parts.append(part)
    return b"".join(parts)


def _parsed(text: str, base: httpx2.URL | None) -> httpx2.URL:
    """A URL, or where a redirect from `base` leads.

    Raises:
        ValidationError: other programs might read it differently, or it is none for http.
    """
    # Backslashes and blanks are where parsers disagree about which host is meant.
    well_formed = text.isprintable() and not any(mark in text for mark in "\\ ")
    try:
        if not well_formed or len(text) > MAX_URL_LENGTH:
            raise httpx2.InvalidURL("refused")
        url = httpx2.URL(text) if base is None else base.join(text)
    except (httpx2.InvalidURL, ValueError):
        raise _malformed() from None
    if url.scheme not in _DEFAULT_PORTS or url.userinfo or not _host(url):
        raise _malformed()
    if not 0 < _port(url) < 65_536:
        raise _malformed()
    return url


def _host(url: httpx2.URL) -> str:
    """The host in ASCII and lower case, without the dot that may end it."""
    return url.raw_host.decode("ascii").lower().removesuffix(".")


def _port(url: httpx2.URL) -> int:
    return _DEFAULT_PORTS[url.scheme] if url.port is None else url.port


def _allowed_host(text: str) -> tuple[str, int | None]:
    """(host, port) of an entry of ALLOWED_IMAGE_DOMAINS; no port: the usual ones."""
    try:
        url = httpx2.URL(f"http://{text}")
        usable = bool(_host(url)) and not set(text) & set("*% /?#@")
    except (httpx2.InvalidURL, ValueError):
        usable = False
    if not usable:
        raise SettingsError(
            f"ALLOWED_IMAGE_DOMAINS holds {text!r}; it takes hosts such as example.org or "
            "example.org:8080, or * alone for any public host."
        )
    return _host(url), url.port


def _malformed() -> ValidationError:
    return ValidationError(
        "the picture's URL is malformed; it must read http(s)://<host>/<path>, without user name"
    )


def _unreachable() -> ValidationError:
    return ValidationError("the picture's server could not be reached or broke off its answer")

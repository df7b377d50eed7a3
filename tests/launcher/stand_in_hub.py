"""A hub on this machine: the few routes that a download needs, with failures on demand."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_stand_in"


@dataclass
class Hub:
    """One repository, and what the server does with requests."""

    files: dict[str, bytes]
    name: str = "owner/model"
    gated: bool = False
    break_after: int | None = None  # the next download of weights ends after so many bytes
    errors: int = 0  # so many requests for weights get status 500
    endpoint: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    ranges: list[str] = field(default_factory=list)

    def listing(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
            for name, data in self.files.items()
        ]

    def info(self) -> dict[str, Any]:
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
        return {"id": self.name, "sha": COMMIT, "siblings": siblings, "tags": []}


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve(hub: Hub, address: str = "127.0.0.1") -> Iterator[Hub]:
    """Serve `hub` on a free port of one of this machine's addresses; sets its endpoint."""

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer((address, 0), Handler)
    hub.endpoint = f"http://{address}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.served.requests[f"{self.command} {path}"] += 1
        owner, _, model = self.served.name.partition("/")
        match path.strip("/").split("/"):
            case ["api", "models", first, second, *rest] if (first, second) == (owner, model):
                self._api(rest)
            case [first, second, "resolve", _, name] if (first, second) == (owner, model):
                if name in self.served.files:
                    self._file(name)
                else:
                    self._refuse(404, "EntryNotFound")
            case _:
                self._refuse(404, "RepoNotFound")

    def log_message(self, *_: object) -> None: ...

    def _api(self, rest: list[str]) -> None:
        match rest:
            case [] | ["revision", "main"]:
                self._json(self.served.info())
            case ["revision", commit] if commit == COMMIT:
                self._json(self.served.info())
            case ["tree", _]:
                self._json(self.served.listing())
            case _:
                self._refuse(404, "RevisionNotFound")

    def _file(self, name: str) -> None:
        hub, data = self.served, self.served.files[name]
        if hub.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "GatedRepo")
        is_weights = name.endswith(".safetensors") and self.command == "GET"
        if is_weights and hub.errors:
            hub.errors -= 1
            return self._refuse(500, "")
        start = 0
        if wanted := self.headers.get("Range"):
            hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if is_weights and hub.break_after is not None:
            self.wfile.write(data[start : start + hub.break_after])
            hub.break_after = None
            self.close_connection = True
            return None
        self.wfile.write(data[start:])
        return None

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "refused by the stand-in")
        self.send_header("Content-Length", "0")
        self.end_headers()

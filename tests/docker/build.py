"""Builds the images as a user would, with the machine's package indexes as secrets."""

import configparser
import contextlib
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.docker.engine import FOLDER, ROOT, Engine, ensure_image

BASE = "python:3.11-slim-bookworm"
IMAGE = "tessera:test-cpu"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BUILD_TIMEOUT_S = 900
TORCH = "torch==2.13.0"
SECRET_MARK = "a-word-that-only-the-secret-has"


def build_image(engine: Engine, file: str, tag: str, *more: str) -> None:
    """Build `docker/<file>`; `more` are further arguments."""
    ensure_image(engine, BASE)
    with torch_index() as index:
        secrets = [f"--secret=id={name},src={path}" for name, path in _secrets().items()]
        engine.run(
            *("build", "--network=host", f"--file={ROOT / 'docker' / file}", f"--tag={tag}"),
            *(f"--build-arg=TORCH_INDEX={index}", *secrets, *more, str(ROOT)),
            timeout=BUILD_TIMEOUT_S,
        )


@contextlib.contextmanager
def torch_index() -> Iterator[str]:
    """TORCH_INDEX where that is said, else an index of the one wheel that pip finds here."""
    if given := os.environ.get("TORCH_INDEX"):
        yield given
        return
    folder = FOLDER / "index"
    if not any((folder / "torch").glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", TORCH]
        subprocess.run([*command, "-d", folder / "torch"], check=True, timeout=600)
    handler = functools.partial(_QuietHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def _secrets() -> dict[str, Path]:
    """Files for `--secret`: this machine's pip settings and the authorities it trusts."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    index = os.environ.get("PIP_INDEX_URL") or said.stdout.strip()
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = {"timeout": "60"} | ({"index-url": index} if index else {})
    secrets = {"pip_conf": FOLDER / "pip.conf"}
    certificates = Path(os.environ.get("PIP_CERT") or CERTIFICATES)
    if certificates.exists():
        config["global"]["cert"] = "/run/secrets/ca"
        secrets["ca"] = certificates
    config["a-section-that-pip-ignores"] = {"password": SECRET_MARK}
    with secrets["pip_conf"].open("w") as file:
        config.write(file)
    return secrets

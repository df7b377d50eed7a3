"""Builds the images as a user would, with the machine's package indexes as secrets."""

import configparser
import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
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
        engine.run(
            *("build", "--network=host", f"--file={ROOT / 'docker' / file}", f"--tag={tag}"),
            *(f"--build-arg=TORCH_INDEX={index}", *secrets(), *more, str(ROOT)),
            timeout=BUILD_TIMEOUT_S,
        )


@contextlib.contextmanager
def torch_index() -> Iterator[str]:
    """TORCH_INDEX where that is said; an index of the one wheel that was installed here, if that is
    a CPU build; else none, for the image will have what pip finds."""
    given = os.environ.get("TORCH_INDEX", "")
    if given or not metadata.version("torch").endswith("+cpu"):
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


def secrets() -> list[str]:
    """`--secret` flags: this machine's settings of pip and apt, and the authorities it trusts."""
    certificates = Path(os.environ.get("PIP_CERT") or CERTIFICATES)
    files = {"pip_conf": FOLDER / "pip.conf", "apt_conf": FOLDER / "apt.conf"}
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = {"timeout": "60"} | _pip_settings()
    if certificates.exists():
        config["global"]["cert"] = "/run/secrets/ca"
        files["ca"] = certificates
    config["a-section-that-pip-ignores"] = {"password": SECRET_MARK}
    with files["pip_conf"].open("w") as file:
        config.write(file)
    files["apt_conf"].write_text(_apt_settings())
    return [f"--secret=id={name},src={path}" for name, path in files.items()]


def _pip_settings() -> dict[str, str]:
    """Where pip finds packages here."""
    found = {}
    for name in ("index-url", "extra-index-url", "trusted-host", "proxy"):
        command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        variable = f"PIP_{name.upper().replace('-', '_')}"
        if value := os.environ.get(variable) or told.stdout.strip():
            found[name] = value
    return found


def _apt_settings() -> str:
    """How apt reaches its mirrors here."""
    if shutil.which("apt-config") is None:
        return ""
    told = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True)
    lines = told.stdout.splitlines()
    return "\n".join(line for line in lines if re.match(r"Acquire::https?::Proxy", line)) + "\n"

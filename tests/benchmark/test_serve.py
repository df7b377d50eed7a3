"""The load generator, against a server that is told what to answer."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from benchmark import serve
from benchmark.load.arrivals import dealt, poisson_times_s
from benchmark.load.client import Client, Record
from benchmark.load.measure import Objective, Percentiles, Summary, summarise
from benchmark.load.protocol import (
    APIS,
    ChatApi,
    CompletionApi,
    Exchange,
    GenerateApi,
    Heard,
    api_named,
    parse_event,
)
from benchmark.load.sweep import Sweep, sweep
from benchmark.load.workload import Conversation, Turn, Workload

HELLO = Conversation((Turn("Hello"),))


# What is asked, and when


def test_a_seed_gives_the_same_conversations_again() -> None:
    workload = Workload(turns=2, picture_share=0.5, shared_words=5, num_shared=2)
    asked = workload.conversations(3, 8)
    assert asked == workload.conversations(3, 8) != workload.conversations(4, 8)
    assert asked[:3] == workload.conversations(3, 3)
    assert {len(one.turns) for one in asked} == {2}
    assert len({one.system for one in asked}) == 2
    pictures = [picture for one in asked for picture in one.turns[0].pictures]
    assert 0 < len(pictures) < 8 and len(set(pictures)) == len(pictures)


def test_prompt_lengths_follow_the_distribution() -> None:
    asked = Workload(prompt_words=50, max_prompt_words=200).conversations(1, 400)
    lengths = sorted(len(one.turns[0].text.split()) for one in asked)
    assert 40 < lengths[200] < 60 and lengths[0] < 25 and 100 < lengths[-1] <= 200
    alike = Workload(prompt_words=50, prompt_spread=0).conversations(1, 5)
    assert {len(one.turns[0].text.split()) for one in alike} == {50}


def test_arrivals_have_the_rate_and_keep_no_distance() -> None:
    times = poisson_times_s(Random(1), 10.0, 2000)
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(0.1, rel=0.1) and deviation == pytest.approx(mean, rel=0.1)
    with pytest.raises(ValueError, match="above 0"):
        poisson_times_s(Random(1), 0.0, 1)


def test_everything_is_dealt_once() -> None:
    for hands in (1, 3, 20):
        assert sorted(n for hand in dealt(10, hands) for n in hand) == list(range(10))


# What events mean


@pytest.mark.parametrize(
    ("api", "event", "heard"),
    [
        (ChatApi("m"), {"choices": [{"delta": {"content": "a"}}]}, Heard("a")),
        (ChatApi("m"), {"choices": [{"delta": {"content": None}}]}, Heard()),
        (ChatApi("m"), {"choices": [], "usage": {"completion_tokens": 7}}, Heard("", 7)),
        (ChatApi("m"), {"error": {"type": "server_error"}}, Heard(error="server_error")),
        (CompletionApi("m"), {"choices": [{"text": "a"}], "usage": None}, Heard("a")),
        (GenerateApi(), {"index": 2, "token": {"text": "a", "special": False}}, Heard("a", 2)),
        (GenerateApi(), {"index": 3, "token": {"text": "</s>", "special": True}}, Heard("", 3)),
        (GenerateApi(), {"error": "no", "error_type": "overloaded"}, Heard(error="overloaded")),
    ],
)
def test_events_are_understood(api: Any, event: dict[str, Any], heard: Heard) -> None:
    assert api.read(event) == heard


def test_lines_that_are_no_events_are_passed_over() -> None:
    assert parse_event(b'data: {"a": 1}\n') == parse_event(b'data:{"a": 1}\r\n') == {"a": 1}
    for line in (b": comment\n", b"\n", b"event: x\n", b"data: [DONE]\n"):
        assert parse_event(line) is None


@pytest.mark.parametrize("name", APIS)
def test_bodies_hold_the_conversation_so_far(name: str) -> None:
    past = [Exchange(Turn("first"), "answer")]
    body = json.dumps(api_named(name, "m").body("system", past, Turn("second"), 9))
    places = [body.index(word) for word in ("system", "first", "answer", "second")]
    assert name == "chat" or places == sorted(places)
    assert "9" in body


def test_pictures_go_where_each_api_wants_them() -> None:
    turn = Turn("what?", ("data:image/png;base64,AA",))
    (message,) = ChatApi("m").body("", [], turn, 1)["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert GenerateApi().body("", [], turn, 1)["inputs"] == "![](data:image/png;base64,AA)what?"


# Numbers


def record(*times: float, due: float = 0.0, error: str = "", end: float | None = None) -> Record:
    ended = times[-1] if end is None else end
    return Record(due, due, list(times), ended, len(times), "", error)


def test_known_times_give_known_numbers() -> None:
    records = [
        record(1.0, 1.5, 2.5),
        record(3.0, 3.2, due=2.5),
        record(due=3.0, error="status 429", end=3.1),
    ]
    summary = summarise(records, Objective(ttft_s=0.6))
    assert (summary.requests, summary.answered, summary.good) == (3, 2, 1)
    assert summary.errors == {"status 429": 1}
    assert summary.ttft_s == Percentiles(0.5, 1.0, 1.0)
    assert summary.itl_s == Percentiles(0.5, 1.0, 1.0)  # of 0.2, 0.5 and 1.0
    assert summary.e2e_s == Percentiles(0.7, 2.5, 2.5)
    assert summary.duration_s == 3.2 and summary.output_tokens == 5
    assert summary.output_tokens_per_s == pytest.approx(5 / 3.2)
    assert summary.goodput_per_s == pytest.approx(1 / 3.2)
    assert summary.good_share == pytest.approx(1 / 3)


def test_percentiles_are_values_of_the_sample() -> None:
    assert Percentiles.of(range(1, 101)) == Percentiles(50, 90, 99)
    assert Percentiles.of([7.0]) == Percentiles(7.0, 7.0, 7.0)
    assert Percentiles.of([]) == Percentiles(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("objective", "is_met"),
    [
        (Objective(), True),
        (Objective(ttft_s=0.5, itl_s=0.25), True),
        (Objective(ttft_s=0.49), False),
        (Objective(itl_s=0.24), False),
    ],
)
def test_the_objective_is_inclusive(objective: Objective, is_met: bool) -> None:
    assert objective.is_met(record(0.5, 0.75, 1.0)) is is_met
    assert not objective.is_met(record(0.5, error="timeout"))


def test_an_answer_without_text_is_judged_by_its_end() -> None:
    assert Objective(ttft_s=0.5).is_met(record(end=0.5))
    assert not Objective(ttft_s=0.5).is_met(record(end=0.6))


def test_nothing_measured_is_no_division_by_zero() -> None:
    assert summarise([], Objective()).as_json()["requests_per_s"] == 0


# Sweeps


def swept(limit_per_s: float, start: float, **options: Any) -> Sweep:
    async def run(per_s: float) -> Summary:
        good = per_s <= limit_per_s
        return summarise([record(0.1 if good else 9.0)], Objective(ttft_s=1.0))

    return asyncio.run(sweep(run, start, **options))


@pytest.mark.parametrize("limit", [0.3, 1.0, 5.0, 23.0])
def test_a_sweep_closes_in_on_the_limit(limit: float) -> None:
    found = swept(limit, 1.0, precision=0.05)
    assert found.best_per_s is not None
    assert limit / 1.06 <= found.best_per_s <= limit
    assert len({trial.per_s for trial in found.trials}) == len(found.trials)


def test_a_sweep_ends_when_nothing_is_good_and_when_everything_is() -> None:
    assert swept(0.0, 1.0, max_trials=5).best_per_s is None
    everything = swept(math.inf, 1.0, max_trials=5)
    assert everything.best_per_s == 16.0 and len(everything.trials) == 5


# The client, against a server


class Stub:
    """Streams the pieces it is given; what `faults` holds for the n-th request happens instead."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces
        self.faults: dict[int, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        fault = self.faults.get(len(self.bodies) - 1, "")
        if fault.isdigit():
            return web.json_response({"error": "no"}, status=int(fault))
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        async for line in self._lines(fault):
            await response.write(line)
        self.at_once -= 1
        if fault == "cut":
            assert request.transport is not None
            request.transport.abort()
        return response

    async def _lines(self, fault: str) -> AsyncIterator[bytes]:
        yield b": a comment\n\n"
        for piece in () if fault == "silent" else self.pieces:
            yield _event({"choices": [{"delta": {"content": piece}}]})
            await asyncio.sleep(0)
        if fault == "garbage":
            yield b"data: {no json\n\n"
        elif fault == "error":
            yield _event({"error": {"message": "no", "type": "server_error"}})
        elif not fault:
            yield _event({"choices": [], "usage": {"completion_tokens": 9}})
            yield b"data: [DONE]\n\n"


def _event(payload: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(payload)}\n\n".encode()


async def serving(stub: Stub) -> tuple[web.AppRunner, str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", stub.chat)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


def asked(stub: Stub, ask: Callable[[Client], Any], **options: Any) -> list[Record]:
    """The records of a client that has asked `stub`."""

    async def go() -> list[Record]:
        runner, address = await serving(stub)
        try:
            async with aiohttp.ClientSession() as session:
                client = Client(session, address, ChatApi("m"), max_tokens=5, **options)
                await asyncio.wait_for(ask(client), 30)
                return client.records
        finally:
            await runner.cleanup()

    return asyncio.run(go())


def ticking() -> Callable[[], float]:
    """A clock that moves on by a second whenever somebody looks."""
    ticks: Iterator[int] = iter(range(10**6))
    return lambda: float(next(ticks))


def test_times_are_those_of_the_events_with_text() -> None:
    stub = Stub("a", "", "b", "c")
    (one,) = asked(stub, lambda c: c.closed_loop([HELLO], 1), clock=ticking())
    assert (one.due_at, one.sent_at, one.text_times, one.ended_at) == (0, 1, [2, 3, 4], 5)
    assert (one.answer, one.num_tokens, one.error) == ("abc", 9, "")


def test_every_request_is_sent_once_and_answered() -> None:
    stub = Stub("a", "b")
    conversations = Workload().conversations(1, 30)
    ended: list[Record] = []
    records = asked(stub, lambda c: c.closed_loop(conversations, 4), on_end=ended.append)
    assert len(records) == len(ended) == len(stub.bodies) == 30
    assert stub.most_at_once <= 4
    sent = sorted(body["messages"][-1]["content"] for body in stub.bodies)
    assert sent == sorted(one.turns[0].text for one in conversations)
    assert {body["max_tokens"] for body in stub.bodies} == {5}


def test_arrivals_do_not_wait_for_answers() -> None:
    stub = Stub("a")
    records = asked(stub, lambda c: c.open_loop([HELLO] * 5, [0.0] * 5), extra={"top_k": 3})
    assert [one.error for one in records] == [""] * 5
    assert len({one.due_at for one in records}) == 1
    assert all(body["top_k"] == 3 for body in stub.bodies)


def test_later_turns_hold_the_answers_to_earlier_ones() -> None:
    stub = Stub("x", "y")
    chat = Conversation((Turn("one"), Turn("two")), system="be brief")
    asked(stub, lambda c: c.closed_loop([chat], 1))
    said = [(m["role"], m["content"]) for m in stub.bodies[1]["messages"]]
    assert said == [("system", "be brief"), ("user", "one"), ("assistant", "xy"), ("user", "two")]


def test_errors_are_counted_by_kind_and_end_their_conversation() -> None:
    stub = Stub("a")
    stub.faults = {0: "429", 1: "cut", 2: "garbage", 3: "error", 4: "silent", 5: "429"}
    chat = Conversation((Turn("one"), Turn("two")))
    records = asked(stub, lambda c: c.closed_loop([chat] * 7, 1))
    assert len(records) == len(stub.bodies) == 6 + 2
    errors = summarise(records, Objective()).errors
    assert errors.pop("status 429") == 2
    expected = {"ClientPayloadError", "unreadable event", "server_error", "empty answer"}
    assert set(errors) == expected and set(errors.values()) == {1}


def test_a_server_that_is_not_there_is_an_error_like_others() -> None:
    async def go() -> Record:
        async with aiohttp.ClientSession() as session:
            client = Client(session, "http://127.0.0.1:1", ChatApi("m"), max_tokens=5)
            await client.closed_loop([HELLO], 1)
            return client.records[0]

    assert asyncio.run(go()).error == "ClientConnectorError"


# The command


def test_the_command_writes_what_it_measured(tmp_path: Path) -> None:
    async def go(arguments: list[str]) -> int:
        runner, address = await serving(Stub("a", "b"))
        try:
            return await asyncio.to_thread(serve.main, ["--url", address, *arguments])
        finally:
            await runner.cleanup()

    out, chart = tmp_path / "out.json", tmp_path / "chart.svg"
    paths = ["--out", str(out), "--plot", str(chart), "--api-key", "hidden"]
    assert asyncio.run(go(["--requests", "6", "--rate", "500", *paths])) == 0
    report = json.loads(out.read_text())
    assert report["runs"][0]["answered"] == 6 and report["runs"][0]["output_tokens"] == 54
    assert {"command", "machine", "versions", "commit"} <= set(report["about"])
    assert "hidden" not in out.read_text() and chart.read_text().startswith("<?xml")
    limits = ["--sweep", "--sweep-trials", "2", "--slo-ttft-ms", "60000"]
    assert asyncio.run(go(["--requests", "3", "--rate", "500", *limits, *paths])) == 0
    report = json.loads(out.read_text())
    assert (report["best_per_s"], len(report["runs"])) == (1000.0, 2)
    limits += ["--least-seconds", "0.01"]
    assert asyncio.run(go(["--requests", "3", "--rate", "500", *limits, *paths])) == 0
    assert [run["requests"] for run in json.loads(out.read_text())["runs"]] == [5, 10]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rate", "0"],
        ["--rate", "1", "--concurrency", "2"],
        ["--sweep"],
        ["--requests", "0"],
        ["--body", "[]"],
        ["--api", "completions", "--picture-share", "0.5"],
    ],
)
def test_commands_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        serve.main(arguments)
    assert refusal.value.code == 2

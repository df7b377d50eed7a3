"""Server-sent events on their way out."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tessera.router.chat_replies import ChatWriter, chat_choice
from tessera.router.event_stream import (
    KEEP_ALIVE,
    WRITE_NOW,
    EventStream,
    number_to_json,
    text_to_json,
    to_json,
)
from tessera.router.native_bodies import GenerateParameters
from tessera.router.native_replies import plain_event, stream_event
from tessera.router.request import Completion, FinishReason, Timings, TokenEvent, TokenInfo
from tessera.router.schemas import ChatBody
from tessera.router.token_streams import Collected


class Texts:
    """Has one text after the other, each after a pause; then it is over, or fails."""

    def __init__(self, *texts: str, pause_s: float = 0.0, error: Exception | None = None) -> None:
        self._coming = list(texts)
        self._ready: list[str] = []
        self._pause_s = pause_s
        self._error = error

    @property
    def is_over(self) -> bool:
        return not self._coming and not self._ready and self._error is None

    def listen(self, on_news: Callable[[], None]) -> None:
        self._on_news = on_news
        asyncio.get_running_loop().call_later(self._pause_s, self._come)

    def take(self) -> str:
        if not self._ready and not self._coming and self._error is not None:
            raise self._error
        text, self._ready = "".join(self._ready), []
        return text

    def _come(self) -> None:
        has_more = len(self._coming) > 1 or self._error is not None
        if self._coming:
            self._ready.append(self._coming.pop(0))
            if has_more:
                asyncio.get_running_loop().call_later(self._pause_s, self._come)
        self._on_news()


@dataclass
class Client:
    """What a server hands an application, and what a client gets of it."""

    send_s: float | None = None  # that each message takes; None: it need not be waited for
    takes_now: bool = False  # whether the server can write at once, unless a message is under way
    leaves_at: bytes | None = None  # `send` fails with this body
    hangs_up_at: bytes | None = None  # `receive` tells so after this body
    got: list[bytes] = field(default_factory=list)
    is_busy: bool = False
    has_left: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> dict[str, Any]:
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    def write_now(self, content: bytes) -> bool:
        if not self.takes_now or self.has_left.is_set() or content == self.leaves_at:
            return False
        if len(self.got) % 3 == 0:  # it is behind, so that `send` has to be waited for
            return False
        self._take(content)
        return True

    async def send(self, message: Any) -> None:
        assert not self.is_busy, "two messages at once"
        self.is_busy = True
        if self.send_s is not None:
            await asyncio.sleep(self.send_s)
        self.is_busy = False
        self._take(message.get("body", b"head"))

    def _take(self, body: bytes) -> None:
        assert not self.is_busy, "two messages at once"
        if body == self.leaves_at:
            raise OSError("client left")
        self.got.append(body)
        if body == self.hangs_up_at:
            self.has_left.set()


def stream_to(client: Client, texts: Texts, keep_alive_s: float = 15.0) -> list[bytes]:
    """What the client gets; the stream's end is told exactly once."""
    ended: list[bool] = []
    stream = EventStream(texts, lambda: ended.append(True), {}, keep_alive_s)
    try:
        scope = {"type": "http", "state": {WRITE_NOW: client.write_now}}
        asyncio.run(stream(scope, client.receive, client.send))
    finally:
        assert ended == [True]
    return client.got


@pytest.mark.parametrize("send_s", [None, 0.0, 0.02])
@pytest.mark.parametrize("pause_s", [0.0, 0.01])
@pytest.mark.parametrize("takes_now", [False, True])
def test_everything_is_sent_in_its_order(
    takes_now: bool, pause_s: float, send_s: float | None
) -> None:
    events = [f"data: {number}\n\n" for number in range(20)]
    got = stream_to(Client(send_s, takes_now), Texts(*events, pause_s=pause_s))
    assert got[0] == b"head" and got[-1] == b"" and b"" not in got[:-1]
    assert b"".join(got[1:]) == "".join(events).encode()


def test_what_is_ready_together_is_sent_together() -> None:
    texts = Texts("data: 1\n\ndata: 2\n\n", "data: 3\n\n")
    assert stream_to(Client(), texts) == [b"head", b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n", b""]


def test_silence_is_filled_with_comments() -> None:
    texts = Texts("data: 1\n\n", "data: 2\n\n", pause_s=0.1)
    got = stream_to(Client(), texts, keep_alive_s=0.03)
    assert [one for one in got if one != KEEP_ALIVE] == [
        b"head",
        b"data: 1\n\n",
        b"data: 2\n\n",
        b"",
    ]
    for before in (b"data: 1\n\n", b"data: 2\n\n"):
        assert got[got.index(before) - 1] == KEEP_ALIVE


def test_a_stream_that_talks_needs_no_comments() -> None:
    texts = Texts(*["data: 1\n\n"] * 30, pause_s=0.05)
    assert KEEP_ALIVE not in stream_to(Client(), texts, keep_alive_s=0.8)


def test_no_comment_comes_into_a_pause_for_a_slow_client() -> None:
    texts = Texts("data: 1\n\n", "data: 2\n\n")
    got = stream_to(Client(send_s=0.1), texts, keep_alive_s=0.01)  # `Client` tells two at once
    assert got == [b"head", b"data: 1\n\n", b"data: 2\n\n", b""]


@pytest.mark.parametrize("takes_now", [False, True])
@pytest.mark.parametrize("pause_s", [0.04, 0.06])
def test_what_comes_while_a_comment_is_sent_waits_for_it(pause_s: float, takes_now: bool) -> None:
    texts = Texts("data: 1\n\n", "data: 2\n\n", pause_s=pause_s)
    got = stream_to(Client(0.03, takes_now), texts, keep_alive_s=0.02)  # `Client` tells two at once
    assert KEEP_ALIVE in got and got[-1] == b""
    assert [one for one in got if one.startswith(b"data")] == [b"data: 1\n\n", b"data: 2\n\n"]


@pytest.mark.parametrize("send_s", [None, 0.01])
@pytest.mark.parametrize("takes_now", [False, True])
@pytest.mark.parametrize(
    "way", [{"leaves_at": b"data: 2\n\n"}, {"hangs_up_at": b"data: 1\n\n"}], ids=["send", "receive"]
)
def test_a_client_that_leaves_ends_it(
    way: dict[str, Any], takes_now: bool, send_s: float | None
) -> None:
    client = Client(send_s, takes_now, **way)
    texts = Texts(*(f"data: {n}\n\n" for n in range(1, 1000)), pause_s=0.01)
    got = stream_to(client, texts)
    assert got[:2] == [b"head", b"data: 1\n\n"] and len(got) < 5


def test_a_client_that_leaves_ends_it_in_the_middle_of_silence() -> None:
    assert stream_to(Client(hangs_up_at=b"head"), Texts("data: 1\n\n", pause_s=60)) == [b"head"]


@pytest.mark.parametrize("client", [Client(), Client(0.01), Client(0.01, takes_now=True)])
def test_a_defect_of_the_source_ends_it_without_a_proper_end(client: Client) -> None:
    with pytest.raises(ValueError, match="a defect"):
        stream_to(client, Texts("data: 1\n\n", error=ValueError("a defect")))
    assert client.got == [b"head", b"data: 1\n\n"]  # so that nobody takes it for complete


@pytest.mark.parametrize("value", [0.0, -0.0, -1.25, 1e-30, -1e22, 0.1, -103.27892303466797])
def test_numbers_are_written_as_in_every_other_reply(value: float) -> None:
    assert number_to_json(value) == to_json(value) == json.dumps(value)


@pytest.mark.parametrize("value", ["", " dog", '"\\\n\x00\x7f', "ü\u2028\u0085🐶", "\ud800"])
def test_texts_are_written_as_in_every_other_reply(value: str) -> None:
    assert text_to_json(value) == to_json(value) == json.dumps(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_has_no_number_for(value: float) -> None:
    assert number_to_json(value) == "null"
    with pytest.raises(ValueError, match="Out of range"):
        to_json({"logprob": value})


@pytest.mark.parametrize("logprob", [-0.5, -float("inf")])
@pytest.mark.parametrize("text", [" dog", '"\\\n\x00\x7f', "ü\u2028🐶", "\ud800", ""])
@pytest.mark.parametrize("special", [False, True])
def test_an_event_between_says_what_the_last_one_would(
    text: str, logprob: float, special: bool
) -> None:
    token = TokenInfo(7, text, logprob, special)
    generation: Any = None  # read for the last event only
    step = TokenEvent(token, text, (token, TokenInfo(8, "b", -1.5)))
    for top_n in (None, 2):
        options = GenerateParameters(top_n_tokens=top_n)
        event = stream_event(3, step, generation, options, False)
        assert plain_event(3, step, wants_top=bool(top_n)) == to_json(event)


@pytest.mark.parametrize("text", [" dog", '"\\\n', "ü\u2028🐶"])
def test_a_chat_streams_the_logprobs_of_whole_replies(text: str) -> None:
    token = TokenInfo(7, text, -0.1)
    step = TokenEvent(token, text, (token, TokenInfo(8, "b", -float("inf"), utf8=b"\xff")))
    completion = Completion(FinishReason.LENGTH, text, 1, None, Timings(1.0, 0.0, 0.0, 1.0, 1.0))
    generation: Any = None  # not read
    collected = Collected(generation, completion, [step.token], [step.top_tokens])
    body = ChatBody.model_validate(
        {"messages": [{"role": "user", "content": "Hello"}], "logprobs": True}
    )
    whole = chat_choice(0, collected, body)
    streamed = [json.loads(choice) for choice in ChatWriter(body).choices(0, step)]
    assert [one["logprobs"] for one in streamed if one["logprobs"]] == [whole["logprobs"]]

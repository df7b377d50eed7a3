"""Server-sent events on their way out."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tessera.router.chat_replies import ChatWriter, chat_choice
from tessera.router.event_stream import MOST_JOINED_BYTES, EventStream, number_to_json, to_json
from tessera.router.native_bodies import GenerateParameters
from tessera.router.native_replies import plain_event, stream_event
from tessera.router.request import Completion, FinishReason, Timings, TokenEvent, TokenInfo
from tessera.router.schemas import ChatBody
from tessera.router.token_streams import Collected


def bodies(events: list[str], ready_after: list[bool]) -> list[bytes]:
    """What an `EventStream` sends; `ready_after[n]`: more is ready after event n."""
    given = iter(ready_after)
    sent: list[bytes] = []

    async def text() -> AsyncGenerator[str, None]:
        for one in events:
            yield one

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"head"))

    stream = EventStream(text(), lambda: None, {}, more_ready=lambda: next(given))
    asyncio.run(stream({"type": "http"}, receive, send))
    assert sent[0] == b"head" and sent[-1] == b""
    return sent[1:-1]


def test_events_that_are_ready_together_go_out_together() -> None:
    events = ["data: 1\n\n", "data: 2\n\n", "data: 3\n\n"]
    assert bodies(events, [True, False, False]) == [b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n"]


def test_an_end_that_was_promised_more_loses_nothing() -> None:
    assert bodies(["data: 1\n\n", "data: 2\n\n"], [False, True]) == [b"data: 1\n\n", b"data: 2\n\n"]


def test_what_is_joined_is_bounded() -> None:
    large = "data: " + "x" * MOST_JOINED_BYTES + "\n\n"
    assert bodies([large] * 3, [True] * 3) == [large.encode()] * 3


@pytest.mark.parametrize("value", [0.0, -0.0, -1.25, 1e-30, -1e22, 0.1, -103.27892303466797])
def test_numbers_are_written_as_in_every_other_reply(value: float) -> None:
    assert number_to_json(value) == to_json(value) == json.dumps(value)


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

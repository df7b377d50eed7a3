"""Server-sent events on their way out."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from tessera.router.chat_replies import ChatWriter, chat_choice
from tessera.router.event_stream import EventStream, number_to_json, to_json
from tessera.router.native_bodies import GenerateParameters
from tessera.router.native_replies import plain_event, stream_event
from tessera.router.request import Completion, FinishReason, Timings, TokenEvent, TokenInfo
from tessera.router.schemas import ChatBody
from tessera.router.token_streams import Collected


def sent_by(texts: list[str]) -> list[bytes]:
    """What an `EventStream` sends between its head and its end."""
    sent: list[bytes] = []

    async def given() -> AsyncGenerator[str, None]:
        for text in texts:
            yield text

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"head"))

    asyncio.run(EventStream(given(), lambda: None, {})({"type": "http"}, receive, send))
    assert sent[0] == b"head" and sent[-1] == b""
    return sent[1:-1]


def test_texts_are_sent_one_by_one_in_their_order() -> None:
    texts = ["data: 1\n\ndata: 2\n\n", "data: 3\n\n"]
    assert sent_by(texts) == [text.encode() for text in texts]


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

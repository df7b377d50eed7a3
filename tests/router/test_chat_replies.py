"""The logprobs of a chat: each token with its own bytes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.router.chat_replies import ChatWriter, chat_choice
from tessera.router.json_body import parse_body
from tessera.router.openai_stream import Chunks
from tessera.router.request import (
    Completion,
    FinishReason,
    Request,
    SamplingParams,
    StoppingParams,
    TokenEvent,
    TokenInfo,
)
from tessera.router.schemas import ChatBody
from tessera.router.ticket import Generation
from tessera.router.token_streams import Collected
from tessera.router.tokenizer import Tokenizer
from tests.router.http_fakes import TIMINGS, FakeStream, Script

BODY = parse_body(b'{"messages": [{"role": "user", "content": "a"}], "logprobs": true}', ChatBody)


@pytest.mark.parametrize("kind", ["llama", "next-mistral"])
def test_bytes_of_parts_of_a_character(checkpoint: Callable[[str], Path], kind: str) -> None:
    """As the tokenizer has them, while the token's text is empty until the character is whole."""
    tokenizer = Tokenizer.from_folder(checkpoint(kind))
    pieces = (tokenizer.token_utf8(i) for i in range(tokenizer.vocab_size))
    ids = {piece: token_id for token_id, piece in enumerate(pieces)}
    infos = [
        TokenInfo(ids[bytes([byte])], text, -1.0, False, tokenizer.token_utf8(ids[bytes([byte])]))
        for byte, text in zip("€".encode(), ("", "", "€"), strict=True)
    ]
    request = Request((1,), (), SamplingParams(), StoppingParams(3))
    stream = FakeStream(Script(), request, 0)
    done = Completion(FinishReason.LENGTH, "€", 3, None, TIMINGS)
    collected = Collected(Generation(request, stream, lambda _: None), done, infos, [()] * 3)
    content = chat_choice(0, collected, BODY)["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xE2], [0x82], [0xAC]]
    writer = ChatWriter(BODY)
    streamed = [
        json.loads(choice)["logprobs"]["content"][0]
        for info in infos
        for choice in writer.choices(0, TokenEvent(info, info.text))
        if json.loads(choice)["logprobs"]
    ]
    assert streamed == content


def test_chunks_are_json_around_a_choice() -> None:
    chunks = Chunks({"id": 'a"b', "object": "c"}, wants_usage=True)
    text = chunks.one('{"index":0}', {"warnings": ["w"]})
    assert text.startswith("data: ") and text.endswith("\n\n")
    assert json.loads(text[6:]) == {
        "id": 'a"b',
        "object": "c",
        "choices": [{"index": 0}],
        "usage": None,
        "warnings": ["w"],
    }

"""Requests of the tests of the whole stack, and ways to send many of them."""

import asyncio
import base64
import io
import json
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
from PIL import Image

from tests.end_to_end.stack import Stack

Body = dict[str, Any]
Event = dict[str, Any]

EOS = "2"  # of the tiny checkpoints
FIRST_WORD, WORDS = 260, 240  # ids of the tiny checkpoints that are pieces of words


def png(width: int, height: int, seed: int) -> str:
    """A picture of noise, as base64."""
    pixels = random.Random(seed).randbytes(3 * width * height)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def question(seed: int, *pictures: tuple[int, int]) -> str:
    """A prompt nobody else has from its first token on, with noise of these sizes in it."""
    shown = "".join(
        f"<image>{png(*size, seed + number)}</image>\n" for number, size in enumerate(pictures)
    )
    return f"[INST] {seed} {shown}what about {seed * 7919 % 1000}? [/INST]"


def ask(inputs: str, max_new_tokens: int, **parameters: object) -> Body:
    """The body of a native request."""
    told = {"max_new_tokens": max_new_tokens, "details": True, **parameters}
    return {"inputs": inputs, "parameters": told}


def words(seed: int, count: int) -> list[int]:
    """`count` token ids that are ordinary words."""
    rng = random.Random(seed)
    return [FIRST_WORD + rng.randrange(WORDS) for _ in range(count)]


def endless(prompt: str | list[int], max_tokens: int = 4000, **fields: object) -> Body:
    """A stream that goes on until its client leaves; for /v1/completions."""
    told = {"max_tokens": max_tokens, "logit_bias": {EOS: -100}, "stream": True}
    return {"prompt": prompt, **told, **fields}


async def token_ids(client: httpx.AsyncClient, body: Body, delay_s: float = 0) -> list[int]:
    """The answer to a native request."""
    await asyncio.sleep(delay_s)
    reply = await client.post("/generate", json=body)
    assert reply.status_code == 200, reply.text
    return [token["id"] for token in reply.json()["details"]["tokens"]]


async def together(stack: Stack, bodies: Iterable[Body]) -> list[list[int]]:
    """The answers to requests that are sent at once."""
    async with stack.client() as client:
        return await asyncio.gather(*(token_ids(client, body) for body in bodies))


def alone(stack: Stack, bodies: Iterable[Body]) -> list[list[int]]:
    """The answers to requests that are sent one after the other."""

    async def go() -> list[list[int]]:
        async with stack.client() as client:
            return [await token_ids(client, body) for body in bodies]

    return asyncio.run(go())


@asynccontextmanager
async def streaming(
    client: httpx.AsyncClient, body: Body, **headers: str
) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of a /v1/completions stream; leaving the block is hanging up."""
    stream = client.stream("POST", "/v1/completions", json=body, headers=headers)
    async with stream as reply:
        assert reply.status_code == 200, await reply.aread()
        async with aclosing(_events(reply)) as events:
            yield events


async def _events(reply: httpx.Response) -> AsyncIterator[Event]:
    async for line in reply.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])

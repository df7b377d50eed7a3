"""The server at the other end, over its OpenAI API."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletionChunk

from tessera.launcher.chat.conversation import Message
from tessera.launcher.chat.errors import ChatError

CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 600.0  # a large model on a small cpu takes its time


class Answer:
    """An answer as it comes: iterate over it for pieces of text, then read the rest.

    Attributes:
        text: what has come so far, without the space many models begin with.
        usage: the server's counts of tokens; None until the end, and if it never comes.
        warnings: sentences of the server about what it did differently than asked.
        first_s: seconds from asking to the first piece; None before it.
        seconds: from asking to the latest chunk; once it is over, of the whole answer.
    """

    def __init__(self, pieces: Iterator[ChatCompletionChunk]) -> None:
        self._pieces = pieces
        self._asked = time.monotonic()
        self.text = ""
        self.usage: Mapping[str, Any] | None = None
        self.warnings: list[str] = []
        self.first_s: float | None = None
        self.seconds = 0.0

    def __iter__(self) -> Iterator[str]:
        """Pieces of text. Raises ChatError."""
        for chunk in self._pieces:
            self.seconds = time.monotonic() - self._asked
            self.warnings += (chunk.model_extra or {}).get("warnings", [])
            if chunk.usage is not None:
                self.usage = chunk.usage.model_dump()
            piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
            piece = piece if self.text else piece.lstrip()
            if piece:
                self.first_s = self.seconds if self.first_s is None else self.first_s
                self.text += piece
                yield piece
        if self.usage is None:
            raise ChatError("the connection was lost before the answer was complete.")


class Server:
    """A server and how to talk to it."""

    def __init__(self, url: str, key: str) -> None:
        """`url` may end with /v1 or not; `key` is empty where the server needs none.

        Raises:
            ChatError: the address or the key can be none.
        """
        if not _is_address(url):
            raise ChatError(f"{url} is no address; write it like http://localhost:3000.")
        if not key.isascii():
            raise ChatError("the API key holds characters that no key can have.")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._client = openai.OpenAI(
            base_url=f"{self._url}/v1",
            api_key=key or "-",  # the client insists on one
            max_retries=0,  # who chats sees what happens and decides
            timeout=openai.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        )

    def model_name(self) -> str:
        """What the server calls its model. Raises ChatError, also when there is no server."""
        with self._explained():
            models = self._client.get("/models", cast_to=object)
        match models:
            case {"data": [{"id": str(name)}, *_]}:
                return name
        raise ChatError(f"what answers at {self._url} is no server of this kind.")

    def ask(self, model: str, messages: Sequence[Message], sampling: Mapping[str, Any]) -> Answer:
        """Nothing is sent before the answer is iterated over."""
        return Answer(self._chunks(model, messages, sampling))

    def _chunks(
        self, model: str, messages: Sequence[Message], sampling: Mapping[str, Any]
    ) -> Iterator[ChatCompletionChunk]:
        told: Any = messages  # plain dicts; the client has a type for every role
        with (
            self._explained(),
            self._client.chat.completions.create(
                model=model,
                messages=told,
                stream=True,
                stream_options={"include_usage": True},
                **sampling,
            ) as chunks,  # leaving the block hangs up, and the server stops computing
        ):
            yield from chunks

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except openai.APITimeoutError:
            raise ChatError(f"{self._url} took too long to answer.") from None
        except openai.APIConnectionError:
            raise ChatError(f"no server answers at {self._url}; is it running there?") from None
        except openai.APIError as error:
            raise ChatError(_message(error)) from None
        except (UnicodeError, ValueError):
            raise ChatError(f"{self._url} gave an answer that cannot be read.") from None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _message(error: openai.APIError) -> str:
    """The server's own words where there are some."""
    body = error.body
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        return str(body["message"])
    if isinstance(error, openai.APIStatusError):
        return f"the server answered with status {error.status_code}."
    return error.message

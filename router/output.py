"""From generated ids to the text a client may see: detokenised, stop strings honoured."""

from typing import NamedTuple

from tessera.router.detokenizer import IncrementalDetokenizer
from tessera.router.request import Request
from tessera.router.stop import StopMatcher
from tessera.router.tokenizer import Tokenizer


class OutputStep(NamedTuple):
    """What one token added."""

    token_text: str  # of the token itself, specials kept
    text: str  # newly readable and certainly not part of a stop string
    stopped: bool  # a stop string is complete


class Output:
    """The text of one request, growing token by token."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        stopping = request.stopping
        # A stop sequence must be seen as soon as it is complete, even inside a run of byte tokens.
        eager = bool(stopping.stop_sequences)
        self._detokenizer = IncrementalDetokenizer(tokenizer, request.prompt_ids, eager=eager)
        self._stop = StopMatcher(stopping.stop_sequences, stopping.include_stop_text)
        self._min_tokens = stopping.min_tokens
        self._num_tokens = 0
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything handed out so far."""
        return "".join(self._pieces)

    def add(self, token_id: int) -> OutputStep:
        """Take one more token."""
        token_text = self._detokenizer.token_text_in_context(token_id)
        self._num_tokens += 1
        may_stop = self._num_tokens > self._min_tokens
        text = self._stop.feed(self._detokenizer.add(token_id), may_stop=may_stop)
        self._pieces.append(text)
        return OutputStep(token_text, text, self._stop.matched is not None)

    def finish(self) -> str:
        """What was held back and is text after all."""
        text = ""
        if self._stop.matched is None:
            text = self._stop.feed(self._detokenizer.flush()) + self._stop.flush()
        self._pieces.append(text)
        return text

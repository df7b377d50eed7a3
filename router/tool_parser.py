"""From the text of an answer to content and function calls, piece by piece.

The text follows the grammar of `tool_grammar`, unless it was cut: by its limit of tokens, by a stop
string. Whatever it holds, nothing here fails; how it is split into pieces makes no difference.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tessera.router.tool_formats import ToolFormat


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call whose name is known."""

    index: int  # of the call in its answer, from 0
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments; all pieces together are their JSON text."""

    index: int
    text: str


LEAST_BEGINNING = 5
"""Characters; fewer at the end of a cut answer are likelier text than the beginning of a call."""

Delta = str | CallStart | CallArguments
"""A piece of content, or of a call."""


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """What is known of calls before an answer begins."""

    format: ToolFormat
    names: tuple[str, ...]  # of the functions that may be called, at least one
    required: bool  # the answer is calls and nothing else


class ToolCallParser:
    """Reads one answer."""

    def __init__(self, syntax: CallSyntax) -> None:
        self._format = syntax.format
        self._names = syntax.names
        self._required = syntax.required
        self._heads = {self._format.first_head(name): name for name in self._names}
        self._pattern = _either(self._heads)
        self._held = ""
        self._num_calls = 0
        self._arguments: _JsonObject | None = None
        self._only_text = False  # how the answer begins has decided it

    @property
    def complete(self) -> bool:
        """Whether there are calls and the last one has all its arguments."""
        return self._num_calls > 0 and self._arguments is None

    def feed(self, text: str) -> list[Delta]:
        """Take the next piece of text and return what is certain now."""
        self._held += text
        deltas: list[Delta] = []
        while self._held:
            before = len(self._held)
            deltas += self._seek() if self._arguments is None else self._continue(self._arguments)
            if len(self._held) == before:
                break
        return deltas

    def finish(self, *, was_cut: bool = False) -> list[Delta]:
        """What was held back and is content after all.

        Args:
            was_cut: the model had not come to its end, so what looks like a call's beginning is
                one.
        """
        begun = self._unclear_from() if was_cut else len(self._held)
        held, self._held = self._held, ""
        if self._num_calls or self._required:
            return []
        if len(held) - begun >= LEAST_BEGINNING:
            held = held[:begun].rstrip()
        marker = self._format.visible(self._format.marker)
        before, found, _ = held.partition(marker) if marker else (held, "", "")
        text = before.rstrip() if found else before
        return [text] if text else []

    def _seek(self) -> list[Delta]:
        """Content up to the next call, and its name."""
        found = None if self._only_text else self._next_head()
        content_end = found.start() if found else self._unclear_from()
        if not self._only_text:  # space before a call is no content
            content_end = len(self._held[:content_end].rstrip())
        content = self._held[:content_end]
        self._held = self._held[found.end() if found else content_end :]
        deltas: list[Delta] = [content] if content and not self._num_calls else []
        if found:
            deltas.append(self._start(self._heads[found[0]]))
        elif content and not self._format.marker:
            self._only_text = True
        return deltas

    def _next_head(self) -> re.Match[str] | None:
        if self._format.marker or self._num_calls:
            return self._pattern.search(self._held)
        return self._pattern.match(self._held, len(self._held) - len(self._held.lstrip()))

    def _unclear_from(self) -> int:
        """Where a head may have begun; the length of what is held if nowhere."""
        held = self._held
        if self._only_text:
            return len(held)
        first = next(iter(self._heads))[0]
        place = held.find(first, max(0, len(held) - max(map(len, self._heads))))
        while place >= 0 and not self._may_be_head(place):
            place = held.find(first, place + 1)
        return len(held) if place < 0 else place

    def _may_be_head(self, place: int) -> bool:
        if not self._format.marker and not self._num_calls and self._held[:place].strip():
            return False
        rest = self._held[place:]
        return any(head.startswith(rest) for head in self._heads)

    def _start(self, name: str) -> CallStart:
        if not self._num_calls:
            self._heads = {self._format.head(name): name for name in self._names}
            self._pattern = _either(self._heads)
        self._arguments = _JsonObject()
        self._num_calls += 1
        return CallStart(self._num_calls - 1, self._format.new_id(), name)

    def _continue(self, arguments: "_JsonObject") -> list[Delta]:
        end = arguments.end(self._held)
        text, self._held = self._held[:end], self._held[end:]
        if arguments.is_over:
            self._arguments = None
        return [CallArguments(self._num_calls - 1, text)]


class _JsonObject:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self.is_over = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int:
        """How many characters of the next piece belong to it."""
        for place, character in enumerate(text):
            self._step(character)
            if self.is_over:
                return place + 1
        return len(text)

    def _step(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{}":
            self._depth += 1 if character == "{" else -1
            self.is_over = self._depth <= 0


def _either(heads: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, heads)))

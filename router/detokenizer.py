"""Generated tokens to readable text, one token at a time."""

import codecs
from collections.abc import Sequence

from tessera.router.pieces import PieceKind
from tessera.router.tokenizer import Tokenizer

MAX_HELD_BYTES = 24
"""Bytes of a byte-fallback run after which complete characters are shown without waiting longer."""


class IncrementalDetokenizer:
    """The text of one generation as it grows, special tokens left out.

    All pieces returned, `flush` included, concatenate to what decoding all generated tokens at once
    gives behind a prompt that ends in whole characters. Constant time per token.

    Byte-fallback decoders show a run of byte tokens as U+FFFD throughout if any of its bytes is
    invalid. So a run is held back until it ends, and only an invalid byte that follows more than
    `MAX_HELD_BYTES` valid ones makes a difference to decoding at once: what was shown stays.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, eager: bool = False
    ) -> None:
        """Start behind a prompt.

        Args:
            tokenizer: of the model.
            prompt_ids: what the generation follows.
            eager: show each character of a byte run once it is complete; for stop sequences, which
                must be found with the token that completes them (a line break is a byte token).
        """
        self._tokenizer = tokenizer
        starts_text = all(tokenizer.is_special(id_) for id_ in reversed(prompt_ids))
        self._text = _joiner(tokenizer, prompt_ids, starts_text, eager)
        self._token_text = _joiner(tokenizer, prompt_ids, not prompt_ids, eager=True)

    def add(self, token_id: int) -> str:
        """Take the next token; the text that became readable with it, often "" ."""
        return "" if self._tokenizer.is_special(token_id) else self._text.add(token_id)

    def flush(self) -> str:
        """What is left when the generation ends; an incomplete character becomes U+FFFD."""
        return self._text.flush()

    def token_text_in_context(self, token_id: int) -> str:
        """The text of one token for a stream's `token.text`: specials kept, "" inside a character.

        To be called once for every token, in order, beside `add`.
        """
        if not self._tokenizer.is_special(token_id):
            return self._token_text.add(token_id)
        return self._token_text.flush() + self._tokenizer.token_text(token_id)


def _joiner(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], starts_text: bool, eager: bool
) -> "_Runs | _Bytes | _Windows":
    if tokenizer.kind is PieceKind.BYTE_LEVEL:
        return _Bytes(tokenizer)
    if tokenizer.kind is PieceKind.OTHER:
        return _Windows(tokenizer, prompt_ids)
    strips = tokenizer.kind is PieceKind.BYTE_FALLBACK_STRIP
    return _Runs(tokenizer, strips and starts_text, eager)


class _Runs:
    """Byte fallback: texts, and runs of bytes that must be valid as a whole."""

    def __init__(self, tokenizer: Tokenizer, strips_space: bool, eager: bool) -> None:
        self._tokenizer = tokenizer
        self._strips_space = strips_space  # the text has not begun, and loses its first space
        self._limit = 1 if eager else MAX_HELD_BYTES
        self._held = b""
        self._is_broken = False  # the run has an invalid byte, so the rest of it is invalid too

    def add(self, token_id: int) -> str:
        piece = self._tokenizer.piece(token_id)
        if not piece:  # a row of the embedding without a token: decoders never see it
            return ""
        if isinstance(piece, str):
            is_in_run = self._held or self._is_broken
            return self._shown(self._end_of_run() + piece if is_in_run else piece)
        self._held += piece
        return self._shown(self._complete_characters()) if len(self._held) >= self._limit else ""

    def flush(self) -> str:
        return self._shown(self._end_of_run())

    def _end_of_run(self) -> str:
        held, self._held = self._held, b""
        is_broken, self._is_broken = self._is_broken, False
        if not is_broken:
            try:
                return held.decode()
            except UnicodeDecodeError:
                pass
        return "\ufffd" * len(held)

    def _complete_characters(self) -> str:
        if not self._is_broken:
            try:
                text, used = codecs.utf_8_decode(self._held, "strict", False)
            except UnicodeDecodeError:
                self._is_broken = True
            else:
                self._held = self._held[used:]
                return text
        held, self._held = self._held, b""
        return "\ufffd" * len(held)

    def _shown(self, text: str) -> str:
        if text and self._strips_space:
            self._strips_space = False
            return text.removeprefix(" ")
        return text


class _Bytes:
    """Byte level: one stream of bytes, decoded as it comes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Windows:
    """Any decoder: the difference that new tokens make to the text of a few tokens before them."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._shown = list(prompt_ids[-8:])  # enough for any decoder's look at its neighbours
        self._new: list[int] = []

    def add(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._difference()
        return "" if text.endswith("\ufffd") and len(self._new) < 8 else self._show(text)

    def flush(self) -> str:
        return self._show(self._difference())

    def _difference(self) -> str:
        before = self._tokenizer.decode(self._shown, skip_special=False)
        both = self._tokenizer.decode(self._shown + self._new, skip_special=False)
        return both.removeprefix(before)

    def _show(self, text: str) -> str:
        if text:
            self._shown, self._new = (self._shown + self._new)[-8:], []
        return text

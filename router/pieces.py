"""What each token of a vocabulary adds to a text: the decoder of tokenizer.json, token by token.

Two families of decoders join tokens without looking at their neighbours, except where bytes make up
a character: byte fallback (sentencepiece's: llama, mistral, yi) and byte level (GPT-2's: llama 3,
qwen). For them a generation can be decoded one token at a time, exactly. All others are `OTHER`.
"""

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # sentencepiece's visible space


class PieceKind(enum.Enum):
    """How token texts join up."""

    BYTE_FALLBACK = "byte fallback"  # tokens are texts, but <0xNN> is a byte
    BYTE_FALLBACK_STRIP = "byte fallback, first space of the text dropped"
    BYTE_LEVEL = "byte level"  # tokens are bytes
    OTHER = "other"  # a token's text depends on its neighbours


def piece_kind(decoder: Mapping[str, Any] | None) -> PieceKind:
    """The family of tokenizer.json's "decoder"."""
    if decoder is None:
        return PieceKind.OTHER
    if decoder.get("type") == "ByteLevel":
        return PieceKind.BYTE_LEVEL
    steps = decoder.get("decoders") if decoder.get("type") == "Sequence" else None
    if not steps or [step.get("type") for step in steps[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return PieceKind.OTHER
    replace = steps[0]
    if replace.get("pattern") != {"String": _SPACE} or replace.get("content") != " ":
        return PieceKind.OTHER
    if steps[3:] == []:
        return PieceKind.BYTE_FALLBACK
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return PieceKind.BYTE_FALLBACK_STRIP if steps[3:] == [strip] else PieceKind.OTHER


class Pieces:
    """Every token's piece, by id."""

    def __init__(self, names: Sequence[str], kind: PieceKind) -> None:
        """Make the table.

        Args:
            names: the vocabulary's own spelling of each token, by id; "" where there is none.
            kind: the decoder's family.
        """
        self.kind = kind
        self._pieces = [_PIECE_OF[kind](name) for name in names]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, token_id: int) -> str | bytes:
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else ""


def _byte_fallback(name: str) -> str | bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else _plain(name)


def _byte_level(name: str) -> str | bytes:
    if all(character in _BYTE_OF for character in name):
        return bytes(_BYTE_OF[character] for character in name)
    return name.encode("utf-8")  # an added token, spelt as it is


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet, its `bytes_to_unicode`: printable bytes as they are, others from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def _plain(name: str) -> str:
    return name.replace(_SPACE, " ")


_BYTE_OF = _byte_of_character()
_PIECE_OF: Mapping[PieceKind, Callable[[str], str | bytes]] = {
    PieceKind.BYTE_FALLBACK: _byte_fallback,
    PieceKind.BYTE_FALLBACK_STRIP: _byte_fallback,
    PieceKind.BYTE_LEVEL: _byte_level,
    PieceKind.OTHER: _plain,
}

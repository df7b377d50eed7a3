"""What the text of an answer must look like, as the client described it."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any


class GrammarKind(enum.Enum):
    """How `Grammar.source` is written."""

    JSON_SCHEMA = "json_schema"  # the schema's JSON text; `{}`-typed object for "any JSON object"
    REGEX = "regex"  # Rust's regex syntax, anchored at both ends
    LARK = "lark"  # llguidance's dialect of Lark
    CHOICE = "choice"  # a JSON list of strings, one of which is the answer
    TOOLS = "tools"  # that Lark, as `tool_grammar` writes it around clients' schemas


@dataclass(frozen=True, slots=True)
class Grammar:
    """A description of all answers that are allowed. Not compiled, perhaps not even well-formed."""

    kind: GrammarKind
    source: str = field(repr=False)

    @property
    def digest(self) -> str:
        """What logs may say of it: 16 hexadecimal digits that tell nothing of the source."""
        source = self.source.encode("utf-8", "surrogatepass")
        return blake2b(source, digest_size=8, person=self.kind.value.encode()[:16]).hexdigest()


def with_listed_only(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without properties it does not list, unless it speaks of such.

    JSON Schema allows them, but models rarely stop making them up. text-generation-inference's
    grammars have only what is listed, and a function has just the arguments it lists.
    """
    is_plain = schema.keys() <= _PLAIN_KEYS and "properties" in schema
    return {**schema, "additionalProperties": False} if is_plain else dict(schema)


_PLAIN_KEYS = frozenset(
    {"type", "properties", "required", "title", "description", "$schema", "$defs", "definitions"}
)

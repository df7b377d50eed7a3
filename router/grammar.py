"""What the text of an answer must look like, as the client described it."""

import enum
from dataclasses import dataclass, field


class GrammarKind(enum.Enum):
    """How `Grammar.source` is written."""

    JSON_SCHEMA = "json_schema"  # the schema's JSON text; `{}`-typed object for "any JSON object"
    REGEX = "regex"  # Rust's regex syntax, anchored at both ends
    LARK = "lark"  # llguidance's dialect of Lark
    CHOICE = "choice"  # a JSON list of strings, one of which is the answer


@dataclass(frozen=True, slots=True)
class Grammar:
    """A description of all answers that are allowed. Not compiled, perhaps not even well-formed."""

    kind: GrammarKind
    source: str = field(repr=False)

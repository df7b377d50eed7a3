"""What the text of an answer must look like, as the client described it."""

import enum
from dataclasses import dataclass, field
from hashlib import blake2b


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

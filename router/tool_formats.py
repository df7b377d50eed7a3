"""How a model writes function calls in its text, known from its chat template.

Every format is one shape: a first part, calls with something between them, a last part, and each
call a JSON object of a name and the arguments. A template that knows no tools, as those of LLaVA,
or one in a format of none of these, gets the tagged format, explained in the prompt.
"""

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]")
"""What tokenizers may have a special token for; the text a client sees is without those."""

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls: marker, opening, call, between, call, ..., last."""

    marker: str  # what nothing but calls begins with; "": calls are told by how the answer begins
    opening: str
    between: str | None  # None: one call in a turn
    last: str
    arguments_key: str = "arguments"
    is_native: bool = True  # the template shows tools, calls and results in its own way
    has_short_ids: bool = False  # the template refuses ids of another length than 9
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """Those of `MARKERS` that are special tokens in this model."""

    def head(self, name: str) -> str:
        """A call up to its arguments; after them comes "}"."""
        return f'{{"name": "{name}", "{self.arguments_key}": '

    def first_head(self, name: str) -> str:
        """As `head`, with all visible text that leads to an answer's first call."""
        return self.visible(self.marker + self.opening).lstrip() + self.head(name)

    def visible(self, text: str) -> str:
        """`text` as clients would see it: special tokens skipped."""
        for marker in self.special_ids:
            text = text.replace(marker, "")
        return text

    def new_id(self) -> str:
        """A random id for a call."""
        if self.has_short_ids:
            return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


TAGGED = ToolFormat(
    marker="<tool_call>",
    opening="\n",
    between="\n</tool_call>\n<tool_call>\n",
    last="\n</tool_call>",
)
LISTED = ToolFormat(marker="[TOOL_CALLS]", opening=" [", between=", ", last="]", has_short_ids=True)
BARE = ToolFormat(marker="", opening="", between=None, last="", arguments_key="parameters")
EXPLAINED = replace(TAGGED, is_native=False)


def find_format(template: str | None, find_special: Callable[[str], int | None]) -> ToolFormat:
    """The format of a model.

    Args:
        template: the source of its chat template, if that prints the variable `tools`.
        find_special: the id of a special token, None for other texts.
    """
    found = {marker: find_special(marker) for marker in MARKERS}
    special_ids = {marker: id_ for marker, id_ in found.items() if id_ is not None}
    return replace(_native(template or "") or EXPLAINED, special_ids=special_ids)


def _native(template: str) -> ToolFormat | None:
    text = template.replace("\\", "")  # quotes inside Jinja's strings
    if "<tool_call>" in text:  # some models write something else than JSON into the tag
        is_json = '"name"' in text and '"arguments"' in text and "<function=" not in text
        return TAGGED if is_json else None
    if "[TOOL_CALLS]" in text:
        opening = "[" if "[TOOL_CALLS][" in text else LISTED.opening
        return None if "[ARGS]" in text else replace(LISTED, opening=opening)
    return BARE if '{"name": ' in text and '"parameters": ' in text else None

"""From the bytes of a body to a checked value, strictly, with errors that name the field."""

import re
from codecs import BOM_UTF8
from collections.abc import Sequence
from typing import Any, TypeVar

import pydantic
from pydantic_core import ErrorDetails, from_json
from starlette.requests import Request

from tessera.router.errors import MalformedBody, UnsupportedBody, ValidationError
from tessera.router.schemas import Body

BodyT = TypeVar("BodyT", bound=Body)

LARGE_BODY = 256 * 1024  # bytes; below, counting is not worth it
MAX_VALUES = 2**18
"""Commas and opening brackets of a large body. Parsing holds the interpreter, so a thread would not
let other requests go on meanwhile; 20 MB of tiny values would take two seconds, these 0.1."""

_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}\Z")
# Names of types that pydantic puts into the location of a union's member; no field is called so.
_UNION_MEMBER = re.compile(r"(str|int|float|bool)\Z|list\[|[A-Z]")
_SENTENCES = {
    "missing": "is required",
    "string_type": "must be a string",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "finite_number": "must be a finite number",
}


async def read_body(request: Request, shape: type[BodyT]) -> BodyT:
    """Read a request's body as `shape`.

    Raises:
        UnsupportedBody: it is not declared as JSON.
        MalformedBody: it is not JSON as RFC 8259 has it: NaN, a lone surrogate, bytes that are no
            UTF-8, or nesting deeper than 200.
        ValidationError: a field is missing, of the wrong type or out of its type's range.
    """
    _check_content_type(request)
    return parse_body(await request.body(), shape)


def parse_body(content: bytes, shape: type[BodyT]) -> BodyT:
    """What `read_body` does once the bytes are here."""
    return as_body(_parse_object(content), shape)


async def read_object(request: Request) -> dict[str, Any]:
    """Read a request's body where only its content says which shape it has; then `as_body`."""
    _check_content_type(request)
    return _parse_object(await request.body())


def _parse_object(content: bytes) -> dict[str, Any]:
    if len(content) > LARGE_BODY and sum(map(content.count, b",[{")) > MAX_VALUES:
        raise ValidationError(
            f"the body holds more than {MAX_VALUES} values; send fewer or shorter prompts."
        )
    try:
        value = from_json(content.removeprefix(BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:  # says what and at which line and column, never quotes the body
        raise MalformedBody(f"the body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValidationError("the body must be a JSON object.")
    return value


def as_body(value: dict[str, Any], shape: type[BodyT]) -> BodyT:
    """A parsed body as `shape`; raises `ValidationError`."""
    try:
        return shape.model_validate(value)
    except pydantic.ValidationError as error:
        raise _as_validation_error(error.errors(include_url=False, include_input=False)) from None


def _check_content_type(request: Request) -> None:
    """Refuse what is declared as something else; nothing declared is taken for JSON."""
    declared = request.headers.get("content-type", "application/json")
    media_type = declared.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedBody(
            "this route reads JSON; send the header content-type: application/json."
        )


def _as_validation_error(errors: Sequence[ErrorDetails]) -> ValidationError:
    """One sentence about one field.

    A union reports every member; the one that got deepest is the one the client meant, and members
    that failed equally early are told as alternatives.
    """
    first = errors[0]["loc"][:1]
    same_field = [error for error in errors if error["loc"][:1] == first]
    places = {id(error): _place(error["loc"]) for error in same_field}
    deepest = max(places.values(), key=len)
    sentences = [_sentence(error) for error in same_field if places[id(error)] == deepest]
    name = _dotted(deepest)
    return ValidationError(f"`{name}` {' or '.join(dict.fromkeys(sentences))}.", param=name)


def _sentence(error: ErrorDetails) -> str:
    kind = error["type"]
    if kind in _SENTENCES:
        return _SENTENCES[kind]
    limits: dict[str, Any] = error.get("ctx", {})
    if kind == "greater_than_equal":
        return f"must be at least {limits['ge']}"
    if kind == "less_than_equal":
        return f"must be at most {limits['le']}"
    if kind == "literal_error":
        return f"must be {limits['expected']}"
    if kind == "too_long":
        return f"must have at most {limits['max_length']} entries"
    if kind == "too_short":
        return "must not be empty"
    return "has the wrong type"


def _place(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The location without the names of union members."""
    return tuple(
        part for part in location if isinstance(part, int) or not _UNION_MEMBER.match(part)
    )


def _dotted(place: tuple[int | str, ...]) -> str:
    """`a.b[3]`. A key that only the client can have chosen is not repeated."""
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _FIELD_NAME.match(part):
            text += f".{part}" if text else part
        else:
            text += ".…"
    return text

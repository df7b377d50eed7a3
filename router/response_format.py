"""What the answer to an OpenAI request must look like, in the many ways clients say it.

OpenAI's and text-generation-inference's `response_format`, and vLLM's `structured_outputs` with its
older `guided_*`. What a schema or an expression holds is checked when it is compiled.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json, to_json

from tessera.router.errors import ValidationError
from tessera.router.grammar import Grammar, GrammarKind
from tessera.router.schemas import MAX_ENTRIES, OpenAIBody

ANY_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"object"}')


def openai_grammar(body: OpenAIBody) -> Grammar | None:
    """The one form that the answer must have; None: any text.

    Raises:
        ValidationError: a form that is none, or several of them.
    """
    found = dict(_forms(body))
    if len(found) > 1:
        first, second, *_ = found
        raise ValidationError(
            f"`{first}` and `{second}` cannot both be given: an answer has one form.", second
        )
    return next(iter(found.values()), None)


def _forms(body: OpenAIBody) -> Iterator[tuple[str, Grammar]]:
    """Every form that is asked for, by its field."""
    if body.response_format is not None:
        grammar = _response_format(body.response_format)
        if grammar is not None:
            yield "response_format", grammar
    outputs = _structured_outputs(body.structured_outputs)
    for key, read in _READERS.items():
        for name, value in (
            (f"structured_outputs.{key}", outputs.get(key)),
            (f"guided_{key}", getattr(body, f"guided_{key}")),
        ):
            if value is not None:
                yield name, read(value, name)
    if outputs.get("json_object"):
        yield "structured_outputs.json_object", ANY_OBJECT


def _structured_outputs(outputs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What of it is set; it must be a form and nothing that would change one."""
    given = {key: value for key, value in (outputs or {}).items() if value not in (None, False)}
    if outputs is not None and (not given or given.keys() - _READERS.keys() - {"json_object"}):
        allowed = ", ".join([*_READERS, "json_object"])
        raise ValidationError(
            f"`structured_outputs` must have one of the keys {allowed}, and no other.",
            "structured_outputs",
        )
    return given


def _response_format(form: Mapping[str, Any]) -> Grammar | None:
    name = "response_format"
    kind, value = form.get("type"), form.get("value")
    if kind == "text":
        return None
    if kind == "regex":
        return _regex(value, f"{name}.value")
    if kind == "json_schema":
        inner = form.get("json_schema") or value
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        return _schema(schema, f"{name}.json_schema.schema")
    if kind == "json_object" or kind == "json":
        schema = form.get("schema") if value is None else value
        return ANY_OBJECT if schema is None else _schema(schema, f"{name}.value")
    raise ValidationError(
        "`response_format.type` must be text, json_object, json_schema, json or regex.", name
    )


def _schema(value: Any, name: str) -> Grammar:
    if isinstance(value, str):
        try:
            value = from_json(value, allow_inf_nan=False)
        except ValueError:
            value = None
    if not isinstance(value, dict):
        raise ValidationError(f"`{name}` must be a JSON schema: an object, or its text.", name)
    return Grammar(GrammarKind.JSON_SCHEMA, to_json(value).decode())


def _regex(value: Any, name: str) -> Grammar:
    return Grammar(GrammarKind.REGEX, _text(value, name))


def _lark(value: Any, name: str) -> Grammar:
    return Grammar(GrammarKind.LARK, _text(value, name))


def _choice(value: Any, name: str) -> Grammar:
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_ENTRIES
    if not is_list or not all(isinstance(text, str) and text for text in value):
        raise ValidationError(
            f"`{name}` must be a list of 1 to {MAX_ENTRIES} strings that are not empty.", name
        )
    return Grammar(GrammarKind.CHOICE, to_json(value).decode())


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValidationError(f"`{name}` must be a string that is not empty.", name)
    return value


_READERS = {"json": _schema, "regex": _regex, "choice": _choice, "grammar": _lark}

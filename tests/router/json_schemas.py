"""JSON schemas of the kinds that the public test suite of the standard has, all supported ones.

Strings and arrays are mostly bounded, because whoever answers may be a random model.
"""

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

Schema = dict[str, Any]

WORD: Schema = {"type": "string", "maxLength": 4}
DIGIT: Schema = {"type": "integer", "minimum": 0, "maximum": 9}
SCALARS: list[Schema] = [
    WORD,
    DIGIT,
    {"type": "boolean"},
    {"type": "null"},
    {"type": "number", "minimum": -1, "maximum": 1},
    {"enum": ["a", 1, None, True, 2.5, ["x"], {"k": "v"}]},
    {"const": "constant"},
]


def supported() -> list[Schema]:
    """Some 250 schemas whose answers must be valid."""
    parts = [_scalars, _strings, _numbers, _arrays, _objects, _combined, _references, _mixed]
    return [schema for part in parts for schema in part()]


def object_of(**properties: Schema) -> Schema:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _scalars() -> Iterator[Schema]:
    yield from SCALARS
    for names in combinations(["boolean", "null", "integer", "object", "array"], 2):
        if "integer" in names or "boolean" in names or "null" in names:
            yield {"type": list(names), "maxItems": 2, "maximum": 99, "minimum": -99}
    for values in (["x"], ["x", "y"], [1, 2, 3], [True], [None], ["a b", 'q"q', "\\", "é", "日本"]):
        yield {"enum": values}
        yield {"const": values}
    for value in (0, -1, 1.5, "", "a\nb", {"a": [1, {"b": None}]}, [[], {}], False):
        yield {"const": value}


def _strings() -> Iterator[Schema]:
    for low, high in ((0, 0), (0, 1), (1, 1), (1, 3), (3, 3), (2, 6)):
        yield {"type": "string", "minLength": low, "maxLength": high}
    for pattern in (
        "^a{3}$",
        "^[a-c]{1,3}$",
        "^(yes|no)$",
        "^\\d{2}-\\d{2}$",
        "^x?y?z?$",
        "^[A-Z][a-z]{0,3}$",
        "^\\+?[0-9]{3,5}$",
        "^(a|b(c|d)){2}$",
    ):
        yield {"type": "string", "pattern": pattern}
        yield object_of(value={"type": "string", "pattern": pattern})
    for name in ("date-time", "date", "time", "uuid", "ipv4", "email", "duration", "hostname"):
        yield {"type": "string", "format": name}
    yield {"type": "string", "format": "ipv6"}
    yield {"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 4}


def _numbers() -> Iterator[Schema]:
    for low, high in ((0, 9), (-5, 5), (10, 20), (-20, -10), (99, 101), (0, 0), (-1000, 1000)):
        for kind in ("integer", "number"):
            yield {"type": kind, "minimum": low, "maximum": high}
    for low, high in ((0, 2), (-3, 0), (0.5, 1.5)):
        yield {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
    yield {"type": "integer", "exclusiveMinimum": 4, "exclusiveMaximum": 6}
    for divisor in (2, 3, 5, 10, 7):
        yield {"type": "integer", "multipleOf": divisor, "minimum": 0, "maximum": 200}
    yield {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 10}


def _arrays() -> Iterator[Schema]:
    for items, (low, high) in product(SCALARS, ((0, 0), (0, 2), (1, 1), (2, 3))):
        yield {"type": "array", "items": items, "minItems": low, "maxItems": high}
    yield {"type": "array", "prefixItems": [WORD, DIGIT], "items": False}
    yield {"type": "array", "prefixItems": [DIGIT, WORD], "items": False, "minItems": 2}
    yield {
        "type": "array",
        "prefixItems": [{"type": "null"}],
        "items": DIGIT,
        "minItems": 1,
        "maxItems": 3,
    }
    inner = {"type": "array", "items": DIGIT, "maxItems": 2}
    yield {"type": "array", "items": inner, "minItems": 1, "maxItems": 2}


def _objects() -> Iterator[Schema]:
    for first, second in combinations(SCALARS, 2):
        yield object_of(a=first, b=second)
    for scalar in SCALARS:
        yield object_of(a=scalar) | {"required": []}
        yield {"type": "object", "additionalProperties": scalar, "maxProperties": 1}
    nested: Schema = DIGIT
    for depth in range(8):
        nested = object_of(**{f"level{depth}": nested})
        yield nested
    yield object_of(**{'odd "name"': DIGIT, "ключ": DIGIT, "with space": DIGIT})
    yield {"type": "object", "properties": {"a": DIGIT}, "required": ["a", "b"], "maxProperties": 2}
    yield {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,2}$": DIGIT},
        "additionalProperties": False,
        "maxProperties": 1,
    }


def _combined() -> Iterator[Schema]:
    for first, second in combinations(SCALARS[:5], 2):
        yield {"anyOf": [first, second]}
    for first, second in combinations(SCALARS[:4], 2):
        yield {"oneOf": [first, second]}
    yield {
        "oneOf": [
            object_of(kind={"const": "circle"}, radius=DIGIT),
            object_of(kind={"const": "square"}, side=DIGIT),
        ]
    }
    yield {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]}
    yield {"allOf": [{"type": "string", "minLength": 1}, {"maxLength": 2}]}
    yield {
        "allOf": [
            {"type": "object", "properties": {"a": DIGIT}, "required": ["a"]},
            {"properties": {"b": WORD}, "required": ["b"]},
        ],
        "maxProperties": 2,
    }
    yield {"anyOf": [{"allOf": [DIGIT, {"minimum": 5}]}, {"const": "none"}]}


def _references() -> Iterator[Schema]:
    for scalar in SCALARS[:5]:
        yield {"$defs": {"one": scalar}, "$ref": "#/$defs/one"}
        yield object_of(a={"$ref": "#/$defs/x"}, b={"$ref": "#/$defs/x"}) | {"$defs": {"x": scalar}}
    yield {"definitions": {"d": DIGIT}, "type": "array", "items": {"$ref": "#/definitions/d"}} | {
        "maxItems": 2
    }
    leaf = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    yield {"$defs": {"node": object_of(value=DIGIT, next=leaf)}, "$ref": "#/$defs/node"}
    children = {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}
    yield object_of(name=WORD, children=children)
    yield {
        "$defs": {
            "even": {"anyOf": [{"const": 0}, object_of(then={"$ref": "#/$defs/odd"})]},
            "odd": object_of(then={"$ref": "#/$defs/even"}),
        },
        "$ref": "#/$defs/even",
    }
    yield object_of(a={"$ref": "#/properties/b"}, b=DIGIT)


def _mixed() -> Iterator[Schema]:
    person = object_of(
        name={"type": "string", "minLength": 1, "maxLength": 5},
        age={"type": "integer", "minimum": 0, "maximum": 150},
        email={"type": ["string", "null"], "maxLength": 3},
    )
    yield person
    yield {"type": "array", "items": person, "minItems": 1, "maxItems": 2}
    yield object_of(objects={"type": "array", "items": object_of(color=WORD), "maxItems": 2})
    yield {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Answer",
        "description": "with everything that only describes",
        **object_of(
            box={"type": "array", "items": DIGIT, "minItems": 4, "maxItems": 4},
            label={"type": "string", "enum": ["cat", "dog"], "default": "cat", "examples": ["dog"]},
        ),
    }


UNSUPPORTED: list[Schema] = [
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"minLength": 1}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "array", "contains": {"type": "integer"}},
    {"type": "array", "uniqueItems": True},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "object", "unevaluatedProperties": False},
    {"oneOf": [{"type": "number"}, {"type": "integer"}]},
    {"type": "string", "format": "made-up"},
    {"x-guidance": {"lenient": True}, "not": {}},
]

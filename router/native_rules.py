"""What the parameters of the native routes mean, and which of them are refused."""

from typing import Any

from pydantic_core import from_json, to_json

from tessera.router.errors import ValidationError
from tessera.router.grammar import Grammar, GrammarKind, with_listed_only
from tessera.router.native_bodies import GenerateParameters, GrammarSpec
from tessera.router.rules import Wishes


def native_wishes(options: GenerateParameters) -> Wishes:
    """The native API: greedy unless anything about sampling is said.

    So no parameters at all mean greedy as well, where text-generation-inference samples with a
    random seed: a first try without parameters should give the same answer twice.
    """
    said = (options.temperature, options.top_k, options.top_p, options.typical_p, options.min_p)
    return Wishes(
        sample=bool(options.do_sample) or any(value is not None for value in said),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        typical_p=options.typical_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        frequency_penalty=options.frequency_penalty,
        presence_penalty=options.presence_penalty,
        seed=options.seed,
        top_n_tokens=options.top_n_tokens or 0,
        copies=options.best_of or 1,
        max_new_tokens=options.max_new_tokens,
        stop=tuple(options.stop or ()),
        priority=options.priority or 0,
        cache_salt=options.cache_salt or "",
        cache_prompt=options.cache_prompt is not False,
        names={"copies": "best_of"},
    )


def check_native(options: GenerateParameters, wishes: Wishes, *, streaming: bool) -> None:
    """What only the native API forbids.

    Raises:
        ValidationError: the first rule that is broken.
    """
    best_of = options.best_of or 1
    if best_of > 1 and streaming:
        raise ValidationError("`best_of` != 1 is not supported when streaming tokens", "best_of")
    if best_of > 1 and not wishes.sample:
        raise ValidationError("you must use sampling when `best_of` is > 1", "best_of")
    if best_of > 1 and options.seed is not None:
        raise ValidationError("`seed` must not be set when `best_of` > 1", "seed")
    if options.decoder_input_details and streaming:
        raise ValidationError(
            "`decoder_input_details` == true is not supported when streaming tokens",
            "decoder_input_details",
        )
    if options.adapter_id is not None:
        raise ValidationError(
            "`adapter_id` is not supported: no adapters are loaded.", "adapter_id"
        )
    if options.watermark:
        raise ValidationError("`watermark` is not supported; leave it out.", "watermark")


def native_grammar(spec: GrammarSpec | None) -> Grammar | None:
    """What the answer must look like, in one vocabulary for both APIs.

    Raises:
        ValidationError: `value` is not what `type` needs.
    """
    if spec is None:
        return None
    value = spec.value
    if spec.type == "regex":
        if not isinstance(value, str):
            raise _bad_value("must be a regular expression, as a string")
        return Grammar(GrammarKind.REGEX, value)
    if spec.type == "json_object" and value is None:
        value = {"type": "object"}
    if spec.type == "json_schema":
        value = value.get("schema") if isinstance(value, dict) else None
        if not isinstance(value, dict):
            raise _bad_value("must be an object with a JSON schema in `schema`")
    elif isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, dict):
        raise _bad_value("must be a JSON schema: an object, or its text")
    if spec.type != "json_schema":
        value = with_listed_only(value)
    return Grammar(GrammarKind.JSON_SCHEMA, to_json(value).decode())


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _bad_value(rule: str) -> ValidationError:
    return ValidationError(f"`grammar` is not valid: `value` {rule}.", "grammar")

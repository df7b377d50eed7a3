"""What the router needs to know about a model, read from the small files of its folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tessera.proto.image_layout import ImageLayout, ImageLayoutError, layout_from_config

PipelineTag = Literal["image-text-to-text", "text-generation"]

_MAX_POSITIONS = {"llama": 2048, "mistral": 131_072}
"""What an absent max_position_embeddings means: transformers 5.23, LlamaConfig, MistralConfig."""

_VOCAB_SIZE = 32_000  # what an absent vocab_size means, in both
_IMAGE_TOKEN_ID = 32_000  # what an absent image_token_index means; LlavaConfig, LlavaNextConfig
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelFilesError(ValueError):
    """A file of the model is missing or does not hold what it must. Names the file and the key."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's folder, as far as the router reads it."""

    folder: Path
    config: Mapping[str, Any] = field(repr=False)  # config.json
    model_type: str
    layout: ImageLayout | None  # None: the model takes no pictures
    image_token_id: int | None
    image_token: str | None  # its text
    max_positions: int  # longest sequence the position embedding was made for, tokens
    vocab_size: int  # rows of the embedding: every token id is below
    eos_ids: frozenset[int]  # tokens that end a generation; the tokenizer may know one more
    pipeline_tag: PipelineTag
    sha: str | None  # commit of the hub's snapshot; None: not a snapshot

    @classmethod
    def read(cls, folder: Path) -> "ModelFiles":
        """Read config.json and the optional files beside it.

        Raises:
            ModelFilesError: config.json is missing, or a file holds something unusable.
        """
        config = read_json(folder / "config.json")
        text = _text_config(config)
        layout = _layout(config, folder)
        return cls(
            folder=folder,
            config=config,
            model_type=_model_type(config, folder),
            layout=layout,
            image_token_id=_image_token_id(config) if layout else None,
            image_token=_image_token(folder) if layout else None,
            max_positions=_max_positions(text),
            vocab_size=_positive(text, "vocab_size", _VOCAB_SIZE),
            eos_ids=_eos_ids(config, text, read_json(folder / "generation_config.json", {})),
            pipeline_tag="image-text-to-text" if layout else "text-generation",
            sha=_snapshot(folder),
        )


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        default: what an absent file means; None: it must be there.

    Raises:
        ModelFilesError: missing, unreadable, not JSON, or not an object.
    """
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFilesError(
            f"{path} is missing; is {path.parent} the folder of a model?"
        ) from None
    except OSError as error:
        raise ModelFilesError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise ModelFilesError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def token_text(value: object) -> str | None:
    """The text of a token as the hub's files spell it: a string, or an object with "content"."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _model_type(config: Mapping[str, Any], folder: Path) -> str:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelFilesError(f"{folder / 'config.json'} names no model_type.")
    return model_type


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config", config)
    return text if isinstance(text, Mapping) else {}


def _layout(config: Mapping[str, Any], folder: Path) -> ImageLayout | None:
    try:
        return layout_from_config(config)
    except (ImageLayoutError, TypeError, ValueError, AttributeError) as error:
        raise ModelFilesError(f"{folder / 'config.json'}: {error}") from None


def _image_token_id(config: Mapping[str, Any]) -> int:
    for key in ("image_token_index", "image_token_id"):
        if config.get(key) is not None:
            return _integer(config, key, 0)
    return _IMAGE_TOKEN_ID


def _image_token(folder: Path) -> str:
    processor = read_json(folder / "processor_config.json", {})
    tokenizer = read_json(folder / "tokenizer_config.json", {})
    extra = tokenizer.get("extra_special_tokens")
    named = extra.get("image_token") if isinstance(extra, Mapping) else None
    candidates = (processor.get("image_token"), tokenizer.get("image_token"), named)
    return next((text for value in candidates if (text := token_text(value))), "<image>")


def _max_positions(text: Mapping[str, Any]) -> int:
    default = _MAX_POSITIONS.get(str(text.get("model_type", "llama")), 2048)
    return _positive(text, "max_position_embeddings", default)


def _positive(values: Mapping[str, Any], key: str, default: int) -> int:
    return default if values.get(key) is None else _integer(values, key, 1)


def _integer(values: Mapping[str, Any], key: str, least: int) -> int:
    value = values[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelFilesError(
            f"config.json: {key}={value!r} must be an integer of at least {least}."
        )
    return value


def _eos_ids(
    config: Mapping[str, Any], text: Mapping[str, Any], generation: Mapping[str, Any]
) -> frozenset[int]:
    """End tokens of the first file that names any: generation_config.json overrides config.json."""
    for source in (generation, config, text):
        value = source.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
            raise ModelFilesError(f"eos_token_id={value!r} must be a token id or a list of them.")
        return frozenset(ids)
    return frozenset()


def _snapshot(folder: Path) -> str | None:
    path = folder.absolute()
    is_snapshot = path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name)
    return path.name if is_snapshot else None

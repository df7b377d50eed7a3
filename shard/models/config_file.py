"""Reading the JSON files of a model's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.shard.errors import CheckpointError

# What is said there is said in config.json by newer tools.
OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder.

    Raises:
        CheckpointError: it is absent or not a JSON object.
    """
    config = read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder} has no config.json: it is not a model's folder")
    if quantization := _quantization(config, folder):
        config["quantization_config"] = quantization
    return config


def _quantization(config: Mapping[str, Any], folder: Path) -> Any:
    """The `quantization_config`, wherever it stands; old checkpoints have a file of its own."""
    text = config.get("text_config")
    for part in (config, text):
        if isinstance(part, Mapping) and part.get("quantization_config"):
            return part["quantization_config"]
    for name, method in OWN_FILES.items():
        if found := read_json(folder / name):
            return {"quant_method": method, **found}
    return None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds {type(value).__name__}, not an object")
    return value

"""One file per config.json `model_type`; the file's name is the registration.

A model file offers `build(config, folder, placement) -> LoadableModel`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from tessera.shard.errors import CheckpointError
from tessera.shard.models.base import LoadableModel, Placement

PACKAGE = "tessera.shard.models"

Build = Callable[[Mapping[str, Any], Path, Placement], LoadableModel]


def build_model(config: Mapping[str, Any], folder: Path, placement: Placement) -> LoadableModel:
    """The model of a config.json, without its weights.

    Raises:
        CheckpointError: no file is named like the `model_type`, or the configuration is unusable.
    """
    return _builder(config.get("model_type"), "model_type")(config, folder, placement)


def build_text_model(
    config: Mapping[str, Any], folder: Path, placement: Placement
) -> LoadableModel:
    """The model of a `text_config`; as `build_model`."""
    kind = config.get("model_type")
    return _builder(kind, "text_config.model_type")(config, folder, placement)


def model_types() -> list[str]:
    """Every model_type that can be loaded."""
    return [name for name in _files() if hasattr(_module(name), "build")]


def _builder(model_type: object, key: str) -> Build:
    if model_type in _files() and hasattr(_module(str(model_type)), "build"):
        return cast(Build, _module(str(model_type)).build)
    raise CheckpointError(
        f"{key}={model_type!r} in config.json is not supported; supported are "
        f"{', '.join(model_types())}"
    )


def _files() -> list[str]:
    package = importlib.import_module(PACKAGE)
    return [file.name for file in pkgutil.iter_modules(package.__path__)]


def _module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")

"""The models. `load_model` picks the file named like config.json's `model_type`."""

from pathlib import Path

from tessera.shard.models.base import Model, Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.models.dtype import resolve_dtype
from tessera.shard.models.registry import build_model
from tessera.shard.weights import Checkpoint, load_weights

__all__ = ["load_model", "resolve_dtype"]


def load_model(folder: Path, placement: Placement) -> Model:
    """One rank of the model in `folder`, loaded and packed.

    Raises:
        CheckpointError: the folder holds no model that can be served. The message is one line and
            names the file, key or tensor.
    """
    model = build_model(read_config(folder), folder, placement)
    with Checkpoint(folder) as checkpoint:
        load_weights(model, checkpoint, placement.backend, placement.dtype)
    return model

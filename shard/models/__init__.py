"""The models. `load_model` picks the file named like config.json's `model_type`."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.shard.errors import CheckpointError
from tessera.shard.models.base import Model, Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.models.dtype import resolve_cache_dtype, resolve_dtype
from tessera.shard.models.registry import build_model
from tessera.shard.prequantized import PackedFormat, packed_format
from tessera.shard.quantization_names import Quantization
from tessera.shard.weights import Checkpoint, load_weights

__all__ = ["load_model", "quantized_as", "resolve_cache_dtype", "resolve_dtype"]

logger = logging.getLogger(__name__)


def load_model(folder: Path, placement: Placement) -> Model:
    """One rank of the model in `folder`, loaded and packed.

    Raises:
        CheckpointError: the folder holds no model that can be served. The message is one line and
            names the file, key or tensor.
    """
    config = read_config(folder)
    packed = packed_format(config)
    bits = _bits(placement, packed)
    model = build_model(config, folder, placement)
    with Checkpoint(folder, packed) as checkpoint:
        load_weights(model, checkpoint, placement.backend, placement.dtype, bits)
    return model


def quantized_as(config: Mapping[str, Any], asked: Quantization) -> str:
    """What linear layers are kept in: "int8", "int4", "awq", "gptq"; empty: floats.

    Raises:
        CheckpointError: the checkpoint's own format is not one that is read.
    """
    packed = packed_format(config)
    if packed is not None:
        return packed.method
    return f"int{asked.bits}" if asked.bits else ""


def _bits(placement: Placement, packed: PackedFormat | None) -> int | None:
    """What to quantise to; None: what is in the checkpoint stays as it is."""
    asked, first = placement.quantization, placement.group.rank == 0
    if asked.method and (packed is None or packed.method != asked.method):
        is_there = f"quantised by {packed.method}" if packed else "not quantised"
        raise CheckpointError(
            f"QUANTIZE={asked.method} but the checkpoint is {is_there}; leave QUANTIZE empty"
            + ("" if packed else ", or set it to int8 or int4 to quantise while loading")
        )
    if packed is None:
        if first and asked.bits:
            note = f" ({asked.note})" if asked.note else ""
            logger.info("linear layers are quantised to %d bits%s", asked.bits, note)
        return asked.bits
    if first:
        note = f", rounded once more to {packed.kept_bits} (desc_act)" if packed.act_order else ""
        logger.info(
            "linear layers are in %d bits (%s checkpoint)%s", packed.bits, packed.method, note
        )
        if asked.bits not in (None, packed.kept_bits):
            logger.warning("QUANTIZE asks for %d bits; it changes nothing here", asked.bits)
    return packed.kept_bits if packed.act_order else None

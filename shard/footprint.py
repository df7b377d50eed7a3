"""What a model takes, from its configuration alone: `python -m tessera.shard.footprint FOLDER`.

The model is built without its weights, so that every number comes from the layers themselves.
Weights and cache are exact. What a step takes is an estimate; the warm-up measures it.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tessera.proto.image_layout import layout_from_config
from tessera.shard.backends.base import CacheShape
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.errors import ShardError
from tessera.shard.layers.base import Layer, Parameter
from tessera.shard.layers.linear import ColumnParallelLinear
from tessera.shard.models.base import LoadableModel, Placement
from tessera.shard.models.clip import NAME as TOWER
from tessera.shard.models.config_file import read_config
from tessera.shard.models.dtype import CACHE_DTYPES, resolve_dtype
from tessera.shard.models.registry import build_model
from tessera.shard.parallel import Group
from tessera.shard.prequantized import packed_format
from tessera.shard.quantization_names import quantization
from tessera.shard.quantized import GROUP, can_quantize

OVERHEAD_BITS = 32 / GROUP  # of a quantised weight: scale and zero point of its group
SAMPLING_COPIES = 6  # of float32 logits: filtered, sorted, summed up
PIXEL_BYTES = 3 * 3 * 4  # of three channels: a value, its place in the table and what stands there


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on the rank that holds most, unless said otherwise."""

    world_size: int
    model_type: str
    dtype: str
    parameters: int  # numbers that are loaded, over all ranks
    max_positions: int
    weights: int
    kv_token: int  # of the cache, for one token
    forward_token: int  # of a step, for one token of it
    vision_tile: int  # of a step, for one tile it encodes
    sampling_row: int  # of a step, for one sequence it samples
    feature_token: int  # of a picture's kept features, for one token
    picture_tokens: int  # of the picture with most; 0 for text models


def footprint(
    folder: Path,
    world_size: int,
    device: str,
    dtype: str = "auto",
    quantize: str = "",
    kv_cache_dtype: str = "auto",
) -> Footprint:
    """The numbers of a model's folder, of which only JSON files are read.

    Args:
        device: "cpu", "cuda" or "xpu"; it need not be here.
        dtype: as the setting DTYPE.
        quantize: as the setting QUANTIZE.
        kv_cache_dtype: as the setting KV_CACHE_DTYPE.

    Raises:
        CheckpointError: config.json is not that of a model that can be served.
        DeviceError: the dtype is none.
    """
    config = read_config(folder)
    packed = packed_format(config)
    bits = packed.kept_bits if packed else quantization(quantize).bits
    numbers = resolve_dtype(dtype, config, device)
    host = ReferenceBackend(torch.device("cpu"))
    ranks = [
        build_model(config, folder, Placement(host, Group(rank, world_size), numbers))
        for rank in range(world_size)
    ]
    first = ranks[0]
    layout = layout_from_config(config)
    size = numbers.itemsize
    cached = CACHE_DTYPES.get(kv_cache_dtype, numbers)
    cache = CacheShape(first.num_layers, first.num_kv_heads, first.head_size, 1, cached)
    copies = 2 if device == "cpu" else 1  # a table that is looked up in and multiplied with
    return Footprint(
        world_size=world_size,
        model_type=str(config["model_type"]),
        dtype=str(numbers).removeprefix("torch."),
        parameters=_parameters(first),
        max_positions=first.max_positions,
        weights=max(_weights(model, size, bits, copies) for model in ranks),
        kv_token=cache.block_bytes,
        forward_token=(2 * first.width + 3 * _widest(first, tower=False) // 2) * size,
        vision_tile=_vision_tile(first, config, size),
        sampling_row=first.vocab_size * 4 * SAMPLING_COPIES,
        feature_token=first.width * size if layout else 0,
        picture_tokens=layout.max_tokens if layout else 0,
    )


def _parameters(model: LoadableModel) -> int:
    """Numbers of all checkpoint tensors that are read."""
    sources = {source.name: source for p in _of(model) for source in p.sources}
    return sum(math.prod(source.shape) for source in sources.values())


def _weights(model: LoadableModel, size: int, bits: int | None, copies_if_tied: int) -> int:
    total = sum(_parameter_bytes(parameter, size, bits) for parameter in _of(model))
    is_tied = any("lm_head." in name for layer in model.layers() for name in layer.unused)
    tables = [p for p in _of(model) if any("embed_tokens" in s.name for s in p.sources)]
    twice = sum(_parameter_bytes(table, size, None) for table in tables) if is_tied else 0
    return total + twice * (copies_if_tied - 1)


def _parameter_bytes(parameter: Parameter, size: int, bits: int | None) -> int:
    count = math.prod(parameter.shape)
    if parameter.quantizable and bits and can_quantize(parameter.shape[1]):
        return int(count * (bits + OVERHEAD_BITS) / 8)
    return count * size


def _of(model: Layer) -> Iterator[Parameter]:
    for layer in model.layers():
        yield from layer.parameters.values()


def _widest(model: Layer, *, tower: bool) -> int:
    """Most outputs of one multiplication in the decoder, or in the vision tower."""
    widths = [
        parameter.shape[0]
        for layer in model.layers()
        if isinstance(layer, ColumnParallelLinear)
        for parameter in layer.parameters.values()
        if parameter.sources[0].name.startswith(TOWER) == tower
    ]
    return max(widths, default=0)


def _vision_tile(model: Layer, config: Mapping[str, Any], size: int) -> int:
    """Pixels; later a residual stream, its norm, and the widest product with its activation."""
    layout = layout_from_config(config)
    if layout is None:
        return 0
    patches = (layout.tile // layout.patch) ** 2 + 1
    inputs = [
        parameter.shape[1]
        for layer in model.layers()
        if isinstance(layer, ColumnParallelLinear)
        for parameter in layer.parameters.values()
        if parameter.sources[0].name.startswith(TOWER) and len(parameter.shape) == 2
    ]
    hidden = patches * (2 * max(inputs) + 2 * _widest(model, tower=True)) * size
    return max(hidden, layout.tile**2 * PIXEL_BYTES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the footprints for several numbers of ranks as a JSON list."""
    parser = argparse.ArgumentParser(prog="tessera-footprint", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", default="")
    parser.add_argument("--kv-cache-dtype", default="auto")
    told = parser.parse_args(arguments)
    try:
        found = [
            footprint(
                told.folder, ranks, told.device, told.dtype, told.quantize, told.kv_cache_dtype
            )
            for ranks in told.ranks
        ]
    except ShardError as error:
        print(f"Error: {error}.", file=sys.stderr)
        return 1
    print(json.dumps([asdict(each) for each in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

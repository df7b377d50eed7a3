"""Checkpoints in AWQ's and GPTQ's formats, made from float ones, and what they stand for.

Written from the formats' descriptions, word by word, without the code under test.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from tests import checkpoints
from tests.checkpoints import Array

LINEAR = re.compile(r"(.*\.layers\.\d+\.(?:self_attn|mlp)\.[a-z]+_proj)\.weight")
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column in each four bits of a word, lowest first


@dataclass(frozen=True)
class Packing:
    """One of the formats."""

    method: str
    bits: int = 4
    group_size: int = 32  # -1: a whole row
    file_format: str = ""  # of GPTQ: "gptq", "gptq_v2"
    text_only: bool = True
    bias: float | None = None  # GPTQ tools write one for every linear
    symmetric: bool = False  # of GPTQ: the zero point is in the middle
    act_order: bool = False  # of GPTQ: the inputs of a group lie anywhere

    @property
    def config(self) -> dict[str, Any]:
        common = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "awq":
            return common | {"version": "gemm", "zero_point": True, "modules_to_not_convert": None}
        named = {"checkpoint_format": self.file_format} if self.file_format else {}
        return common | {"desc_act": self.act_order, "sym": self.symmetric} | named


def convert(source: Path, packed: Path, plain: Path, packing: Packing) -> None:
    """Write `source` with packed linears, and once more with the floats these stand for."""
    tensors: dict[str, Array] = {}
    for path in source.glob("*.safetensors"):
        tensors |= {name: x.float().numpy() for name, x in load_file(path).items()}
    few, floats = dict(tensors), {k: v.astype(np.float32) for k, v in tensors.items()}
    for name in tensors:
        match = LINEAR.fullmatch(name)
        if match and "vision_tower" not in name:
            del few[name]
            parts, floats[name] = pack_linear(tensors[name].astype(np.float32), packing)
            few |= {f"{match[1]}.{part}": value for part, value in parts.items()}
    for folder, kept, config in (
        (packed, few, {"quantization_config": packing.config}),
        (plain, floats, {}),
    ):
        folder.mkdir()
        for file in source.glob("*.json"):
            if not file.name.endswith(".index.json"):
                (folder / file.name).write_bytes(file.read_bytes())
        original = json.loads((source / "config.json").read_text())
        checkpoints.write_json(folder / "config.json", original | config)
        checkpoints.write_tensors(folder, kept, num_files=2)


def pack_linear(weight_OI: Array, packing: Packing) -> tuple[dict[str, Array], Array]:
    """The tensors of one linear, and the float32 weight they stand for."""
    outputs, inputs = weight_OI.shape
    size = inputs if packing.group_size == -1 else packing.group_size
    groups = -(-inputs // size)
    group_I = np.arange(inputs) // size
    if packing.act_order:
        np.random.default_rng(inputs).shuffle(group_I)
    top = 2**packing.bits - 1
    scales = np.zeros((groups, outputs), np.float16)
    zeros = np.zeros((groups, outputs), np.int64)
    for g in range(groups):
        part = weight_OI[:, group_I == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if packing.symmetric:
            high = np.maximum(-low, high)
            low = -high
        scales[g] = ((high - low) / top).astype(np.float16)
        zeros[g] = np.round(-low / scales[g].astype(np.float32))
    # A zero point of 0 cannot be written less 1.
    zeros = np.full_like(zeros, (top + 1) // 2) if packing.symmetric else np.clip(zeros, 1, top)
    steps = scales.astype(np.float32)[group_I]  # [I, O]
    codes = np.clip(np.round(weight_OI.T / steps + zeros[group_I]), 0, top).astype(np.int64)
    floats = ((codes - zeros[group_I]).astype(np.float32) * steps).T
    if packing.method == "awq":
        parts = {
            "qweight": words_along_columns(codes, 4, AWQ_COLUMNS),
            "qzeros": words_along_columns(zeros, 4, AWQ_COLUMNS),
            "scales": scales,
        }
        return parts, np.ascontiguousarray(floats)
    in_order = tuple(range(32 // packing.bits))
    stored = zeros if packing.file_format == "gptq_v2" else zeros - 1
    parts = {
        "qweight": words_along_columns(codes.T, packing.bits, in_order).T.copy(),
        "qzeros": words_along_columns(stored, packing.bits, in_order),
        "scales": scales,
        "g_idx": group_I.astype(np.int32),
    }
    if packing.bias is not None:
        parts["bias"] = np.full(outputs, packing.bias, np.float16)
    return parts, np.ascontiguousarray(floats)


def words_along_columns(codes: Array, bits: int, columns: tuple[int, ...]) -> Array:
    """int32 [rows, columns / codes in a word]."""
    rows, width = codes.shape
    words = np.zeros((rows, width // len(columns)), np.uint32)
    for place, column in enumerate(columns):
        words |= codes[:, column :: len(columns)].astype(np.uint32) << np.uint32(bits * place)
    return words.view(np.int32)


def rewritten(folder: Path, changes: Mapping[str, Any]) -> Path:
    """`folder` with other entries in its quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    checkpoints.write_json(path, config)
    return folder

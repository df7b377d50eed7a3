"""Checkpoint tensors into a model's layers: safetensors files, read slice by slice.

Nothing is unpickled, and a rank reads only its own rows and columns. Layers are filled and packed
one after the other, so that beside the packed model no more than one layer is in memory.
"""

import json
import logging
import os
import re
import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tessera.shard.backends.base import Backend
from tessera.shard.backends.host_memory import return_freed_memory
from tessera.shard.errors import CheckpointError
from tessera.shard.layers.base import Layer, Parameter, Source
from tessera.shard.prequantized import PackedFormat
from tessera.shard.quantized import GROUP, QuantizedWeight, can_quantize, quantize, stacked

INDEX = "model.safetensors.index.json"
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
PACKED = frozenset({"I32"})
PACKED_NAMES = (".qweight", ".qzeros", ".g_idx")

logger = logging.getLogger(__name__)

_RENAMED = (
    # The hub's llava files; transformers up to 4.51 and again from 5.
    (re.compile(r"^language_model\.(lm_head\.)"), r"\1"),
    (re.compile(r"^language_model\.model\."), ""),
    # transformers 4.52 to 4.57.
    (re.compile(r"^model\.language_model\."), ""),
    (re.compile(r"^model\.(vision_tower\.|multi_modal_projector\.|image_newline$)"), r"\1"),
    # Text models.
    (re.compile(r"^model\."), ""),
    # CLIP had one level more before transformers 5.
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
)


def canonical_name(name: str) -> str:
    """One spelling for a tensor's name in all generations of checkpoints.

    The text model's tensors have no prefix: `layers.0.self_attn.q_proj.weight`, `lm_head.weight`;
    beside them stand `vision_tower.`, `multi_modal_projector.` and `image_newline`.
    """
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name, count=1)
    return name


class Checkpoint:
    """The tensors of a folder's safetensors files, by canonical name. A context manager."""

    def __init__(self, folder: Path, packed: PackedFormat | None = None) -> None:
        """Open the files; reads their headers only.

        Args:
            packed: the format of linears that are in few bits.

        Raises:
            CheckpointError: there are none, one is absent or damaged, or two hold one tensor.
        """
        self.packed = packed
        self._stack = ExitStack()
        self._paths: list[Path] = []
        self._files: dict[str, Any] = {}  # canonical name -> the open file that has it
        self._spelling: dict[str, str] = {}  # canonical name -> the name in that file
        self._shapes: dict[str, tuple[int, ...]] = {}
        with self._stack:
            for path in tensor_files(folder):
                self._add(path)
            self._stack = self._stack.pop_all()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Canonical name -> shape of every tensor."""
        return self._shapes

    def spelling(self, name: str) -> str:
        """The name a tensor has in its file."""
        return self._spelling.get(name, name)

    def read(self, source: Source) -> Tensor:
        """A rank's part of a tensor, on the host, in the file's dtype."""
        try:
            piece = self._files[source.name].get_slice(self._spelling[source.name])
            if source.span is None:
                read: Tensor = piece[:]
            else:
                part = slice(*source.span)
                read = piece[part] if source.dim == 0 else piece[:, part]
        except (SafetensorError, OSError) as error:
            raise _damaged(self.spelling(source.name), error) from None
        return read

    def read_weight(self, source: Source) -> Tensor | QuantizedWeight:
        """As `read`; in few bits where the file has it so and this rank's part allows it."""
        if self.packed is None or not self.is_packed(source):
            return self.read(source)
        return self.packed.read(source, self._shapes, self.read)

    def is_packed(self, weight: Source) -> bool:
        """Whether it is in few bits in the file."""
        return self.packed is not None and bool(self.packed.tensors(weight, self._shapes))

    def wanted(self, parameter: Parameter) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the tensors that make up a parameter."""
        shapes: dict[str, tuple[int, ...]] = {}
        for source in parameter.sources:
            packed = self.packed if parameter.quantizable else None
            tensors = packed.tensors(source, self._shapes) if packed else {}
            shapes |= tensors or {source.name: source.shape}
        return shapes

    def is_empty_bias(self, name: str) -> bool:
        """Whether it is a packed linear's bias of zeros: some tools always write one."""
        stem = name.removesuffix(".bias")
        if stem == name or f"{stem}.qweight" not in self._shapes:
            return False
        return not self.read(Source(name, self._shapes[name])).any()

    def read_ahead(self) -> None:
        """Have the files read from the disk in the background, from front to back.

        Whoever copies from mapped files waits for every small piece of them instead.
        """

        def read() -> None:
            for path in self._paths:
                with suppress(OSError), path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

        if hasattr(os, "posix_fadvise"):
            threading.Thread(target=read, name="read-ahead", daemon=True).start()

    def _add(self, path: Path) -> None:
        self._paths.append(path)
        try:
            file = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            for spelling in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                self._add_tensor(path, file, spelling)
        except (SafetensorError, OSError) as error:
            raise _damaged(path.name, error) from None

    def _add_tensor(self, path: Path, file: Any, spelling: str) -> None:
        name = canonical_name(spelling)
        if name in self._files:
            raise CheckpointError(
                f"{path.name} holds {spelling}, which is already there as {self._spelling[name]}"
            )
        self._files[name], self._spelling[name] = file, spelling
        self._shapes[name] = tuple(file.get_slice(spelling).get_shape())

    def check_dtype(self, name: str) -> None:
        """Refuse integers where floats belong, as other quantised checkpoints hold.

        Raises:
            CheckpointError: the tensor's numbers are of the wrong kind.
        """
        dtype = self._files[name].get_slice(self._spelling[name]).get_dtype()
        allowed = PACKED if name.endswith(PACKED_NAMES) else FLOATS
        if dtype not in allowed:
            raise CheckpointError(
                f"{self._spelling[name]} has dtype {dtype}; only {', '.join(sorted(allowed))} "
                "can be loaded there"
            )


def load_weights(
    model: Layer,
    checkpoint: Checkpoint,
    backend: Backend,
    dtype: torch.dtype,
    bits: int | None = None,
) -> None:
    """Fill and pack every layer of `model`.

    Args:
        dtype: what the parameters become; converted while they are copied.
        bits: 4 or 8: what quantisable parameters are rounded to, one layer after the other.

    Raises:
        CheckpointError: a tensor is missing, unexpected or mis-shaped; checked before anything
            is read.
    """
    layers = list(model.layers())
    _check(layers, checkpoint)
    if bits or checkpoint.packed:
        _warn_of_uneven(layers)
    checkpoint.read_ahead()
    for layer in layers:
        for attribute, parameter in layer.parameters.items():
            value = _load(parameter, checkpoint, backend.device, dtype, bits)
            setattr(layer, attribute, value)
            del value  # the layer's own reference is the last
        layer.pack(backend)
    return_freed_memory()


def _load(
    parameter: Parameter,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    bits: int | None,
) -> Tensor | QuantizedWeight:
    if parameter.quantizable and all(map(checkpoint.is_packed, parameter.sources)):
        pieces = [checkpoint.read_weight(source) for source in parameter.sources]
        quantized = [piece.to(device) for piece in pieces if isinstance(piece, QuantizedWeight)]
        if len(quantized) == len(pieces):
            return stacked(quantized)
    filled = _fill(parameter, checkpoint, device, dtype)
    if parameter.quantizable and bits and can_quantize(parameter.shape[1]):
        return quantize(filled, bits)
    return filled


def _warn_of_uneven(layers: Iterable[Layer]) -> None:
    parameters = (p for layer in layers for p in layer.parameters.values() if p.quantizable)
    uneven = [p.shape[1] for p in parameters if not can_quantize(p.shape[1])]
    if uneven:
        logger.warning(
            "%d linear layers are not quantised: their inputs on this rank (%s) are no multiple "
            "of %d; another NUM_SHARD may help",
            len(uneven),
            ", ".join(map(str, sorted(set(uneven)))),
            GROUP,
        )


def _fill(
    parameter: Parameter, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> Tensor:
    filled = torch.zeros(parameter.shape, dtype=dtype, device=device)
    for source in parameter.sources:
        piece = checkpoint.read_weight(source)
        if isinstance(piece, QuantizedWeight):  # a fused projection, and its others are floats
            piece = piece.dequantize(dtype)
        rows = piece.shape[0]
        filled[source.first_row : source.first_row + rows] = piece.reshape(
            rows, *parameter.shape[1:]
        )
    return filled


def _check(layers: Iterable[Layer], checkpoint: Checkpoint) -> None:
    """Compare what the layers want with what the headers say."""
    wanted: dict[str, tuple[int, ...]] = {}
    unused: list[str] = []
    for layer in layers:
        unused += layer.unused
        for parameter in layer.parameters.values():
            wanted |= checkpoint.wanted(parameter)
    have = checkpoint.shapes
    missing = sorted(wanted.keys() - have.keys())
    if missing:
        raise CheckpointError(f"the checkpoint has no tensor {_some(missing)}")
    unexpected = sorted(
        checkpoint.spelling(name)
        for name in have.keys() - wanted.keys()
        if not name.startswith(tuple(unused)) and not checkpoint.is_empty_bias(name)
    )
    if unexpected:
        raise CheckpointError(
            f"the checkpoint has a tensor this model has not: {_some(unexpected)}"
        )
    for name, shape in wanted.items():
        if have[name] != shape:
            raise CheckpointError(
                f"{checkpoint.spelling(name)} has the shape {list(have[name])}, but config.json "
                f"asks for {list(shape)}"
            )
        checkpoint.check_dtype(name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: those its index lists, or the only ones there are.

    Raises:
        CheckpointError: there are none, or the index names one that is not there.
    """
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    single = folder / "model.safetensors"
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(_no_files(folder))
    return paths


def _indexed_files(folder: Path) -> list[Path]:
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(INDEX, error) from None
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{INDEX} must map tensors to files of its own folder")
    paths = [folder / name for name in sorted(names)]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise CheckpointError(f"{INDEX} lists {_some(absent)}, which is not in {folder}")
    return paths


def _no_files(folder: Path) -> str:
    """What to do about a folder without safetensors files."""
    if not any(folder.glob("*.bin")):
        return f"{folder} has no *.safetensors file"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto = "ImageTextToText" if "vision_config" in config else "CausalLM"
    return (
        f"{folder} has only pickled weights (*.bin), which can run code when they are read; "
        "if you trust them, convert them once: "
        f'python -c "from transformers import AutoModelFor{auto} as M; '
        f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')\""
    )


def _damaged(what: str, error: Exception) -> CheckpointError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{what} is damaged: {first_line}; download it again")

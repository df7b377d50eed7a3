"""How 8-bit pixels become the numbers a vision tower was trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tessera.shard.errors import CheckpointError
from tessera.shard.models.config_file import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's (github.com/openai/CLIP, `_transform`): the training pictures' mean and deviation."""


@dataclass(frozen=True, slots=True)
class PixelScale:
    """(pixel * rescale - mean) / std for each of red, green and blue."""

    rescale: float = 1 / 255
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @classmethod
    def from_folder(cls, folder: Path) -> "PixelScale":
        """Read preprocessor_config.json, or its place in processor_config.json (transformers 5).

        Raises:
            CheckpointError: names the key that is unusable.
        """
        config = read_json(folder / "preprocessor_config.json")
        if config is None:
            config = (read_json(folder / "processor_config.json") or {}).get("image_processor")
        return cls.from_dict(config or {})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "PixelScale":
        """The keys of an image processor's configuration; absent ones mean CLIP's values."""
        normalised = config.get("do_normalize", True)
        rescale = config.get("rescale_factor", 1 / 255)
        if isinstance(rescale, bool) or not isinstance(rescale, int | float):
            raise CheckpointError(
                f"rescale_factor={rescale!r} in preprocessor_config.json must be a number"
            )
        return cls(
            rescale=float(rescale) if config.get("do_rescale", True) else 1.0,
            mean=_three(config, "image_mean", CLIP_MEAN) if normalised else (0.0, 0.0, 0.0),
            std=_three(config, "image_std", CLIP_STD) if normalised else (1.0, 1.0, 1.0),
        )

    def table(self) -> Tensor:
        """float32 [3, 256]: what each value of each channel becomes.

        A table, because it repeats transformers' arithmetic bit by bit on any device: rescaled in
        float64, then float32.
        """
        values_X = (torch.arange(256, dtype=torch.float64) * self.rescale).float()
        mean_31, std_31 = (
            torch.tensor(x, dtype=torch.float32)[:, None] for x in (self.mean, self.std)
        )
        return (values_X - mean_31) / std_31


def _three(config: Mapping[str, Any], key: str, default: Sequence[float]) -> tuple[float, ...]:
    value = config.get(key, default)
    values = value if isinstance(value, list | tuple) else [value] * 3
    numbers = [isinstance(x, int | float) and not isinstance(x, bool) for x in values]
    if len(values) != 3 or not all(numbers) or (key == "image_std" and 0 in values):
        raise CheckpointError(f"{key}={value!r} in preprocessor_config.json must be three numbers")
    return tuple(float(x) for x in values)

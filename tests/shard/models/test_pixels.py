"""Pixels become the same bits that transformers' processor computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tessera.shard.errors import CheckpointError
from tessera.shard.models.pixels import CLIP_MEAN, CLIP_STD, PixelScale


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]},
        {"image_mean": 0.5, "image_std": 0.2},
        {"rescale_factor": 1 / 127.5},
        {"do_normalize": False},
        {"do_rescale": False},
    ],
)
def test_table_equals_the_processor(config: dict[str, Any]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, **config)
    every_value = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    theirs = processor(every_value, return_tensors="pt", input_data_format="channels_last")
    expected = theirs["pixel_values"][0].flatten(1).float()
    assert torch.equal(PixelScale.from_dict(config).table(), expected)


def test_the_file_is_found_in_both_places(tmp_path: Path) -> None:
    assert PixelScale.from_folder(tmp_path) == PixelScale(1 / 255, CLIP_MEAN, CLIP_STD)
    nested = {"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert PixelScale.from_folder(tmp_path).mean == (0.1, 0.2, 0.3)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6]}')
    assert PixelScale.from_folder(tmp_path).mean == (0.4, 0.5, 0.6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": ["a", 1, 1]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"rescale_factor": None}, "rescale_factor"),
    ],
)
def test_unusable_values_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        PixelScale.from_dict(config)

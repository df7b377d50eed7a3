"""transformers' answers: what our models are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tessera.proto.image_layout import ImageLayout, layout_from_config
from tessera.shard.models.base import ImageTiles
from tessera.shard.models.config_file import read_config
from tests.shard.models.driver import Prompt

BLACK = (0, 0, 0)


@dataclass
class Case:
    """One prompt for both sides."""

    prompt: Prompt
    inputs: dict[str, Any]  # what transformers' processor made of it


class Oracle:
    """A checkpoint loaded by transformers, and prompts for it."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self._dtype = dtype

    @property
    def takes_images(self) -> bool:
        return "vision_config" in self.config

    @cached_property
    def layout(self) -> ImageLayout:
        layout = layout_from_config(self.config)
        assert layout is not None
        return layout

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        auto: Any = AutoModelForImageTextToText if self.takes_images else AutoModelForCausalLM
        model, info = auto.from_pretrained(self.folder, dtype=self._dtype, output_loading_info=True)
        assert not info["missing_keys"], info
        full = self.config.get("vision_feature_select_strategy") == "full"
        if full and self.config["model_type"] == "llava_next":
            model.model.pack_image_features = _packing_full(model.model)
        return model.eval()

    @cached_property
    def processor(self) -> Any:
        from transformers import AutoProcessor, AutoTokenizer

        auto: Any = AutoProcessor if self.takes_images else AutoTokenizer
        return auto.from_pretrained(
            self.folder, **({"backend": "pil"} if self.takes_images else {})
        )

    def case(self, text: str, images: Sequence[Image.Image] = ()) -> Case:
        """A prompt with one `<image>` per picture, for both sides."""
        arguments: dict[str, Any] = {"text": text, "return_tensors": "pt"}
        if images:
            arguments["images"] = list(images)
        inputs = dict(self.processor(**arguments))
        inputs.pop("token_type_ids", None)
        return Case(self._prompt(inputs["input_ids"][0].tolist(), images), inputs)

    def text_case(self, ids: Sequence[int]) -> Case:
        """A prompt of these ids."""
        return Case(Prompt(list(ids)), {"input_ids": torch.tensor([list(ids)])})

    def _prompt(self, ids: list[int], images: Sequence[Image.Image]) -> Prompt:
        tiles = [cut(image, self.layout) for image in images]
        return Prompt(ids, tiles, self.config.get("image_token_index", -1))

    @torch.inference_mode()
    def logits(self, case: Case) -> Tensor:
        """float32 [tokens, V]."""
        logits: Tensor = self.model(**self._typed(case)).logits[0].float()
        return logits

    @torch.inference_mode()
    def greedy(self, case: Case, count: int) -> list[int]:
        """`count` greedy ids; an end-of-sequence id does not end it."""
        out = self.model.generate(
            **self._typed(case),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        ids: list[int] = out[0, case.inputs["input_ids"].shape[1] :].tolist()
        assert len(ids) == count
        return ids

    def _typed(self, case: Case) -> dict[str, Any]:
        inputs = dict(case.inputs)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        return inputs


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture: noise enlarged, so that a wrong crop or order changes features."""
    generator = np.random.Generator(np.random.PCG64(seed * 1000003 + width * 1009 + height))
    small = generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def cut(image: Image.Image, layout: ImageLayout) -> ImageTiles:
    """The tiles of a picture, the overview first."""
    plan, tile = layout.plan(image.height, image.width), layout.tile
    fitted = image.resize(plan.resized[::-1], Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", plan.canvas[::-1], BLACK)
    canvas.paste(fitted, plan.offset[::-1])
    pieces = [canvas]
    if plan.grid != (0, 0):
        corners = [(x * tile, y * tile) for y in range(plan.grid[0]) for x in range(plan.grid[1])]
        grid = [canvas.crop((x, y, x + tile, y + tile)) for x, y in corners]
        pieces = [image.resize((tile, tile), Image.Resampling.BICUBIC), *grid]
    stacked = np.stack([np.asarray(piece) for piece in pieces])
    return ImageTiles(torch.from_numpy(stacked), image.height, image.width, plan.grid)


def _packing_full(model: Any) -> Any:
    """`pack_image_features` for "full": the overview keeps its class feature, the tiles do not.

    transformers 5.23 fails on every picture there: features and patches do not match in number.
    """
    original = model.pack_image_features

    def pack(image_features: Any, image_sizes: Any, **kwargs: Any) -> Any:
        heads = [features[0, :1] for features in image_features]
        rest = [features[:, 1:] for features in image_features]
        packed, lengths = original(rest, image_sizes, **kwargs)
        joined = [torch.cat((head, part)) for head, part in zip(heads, packed, strict=True)]
        return joined, lengths + 1

    return pack

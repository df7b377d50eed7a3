"""Random checkpoints in the sizes that are benchmarked, made on the spot: nothing is downloaded.

    python -m benchmark.checkpoints llama-125m          prints its folder, build/bench/llama-125m

    name              model
    llama-125m        12 layers of 768, 12 heads; 134 million parameters with its 32,000 tokens
    llama-1.1b        TinyLlama's shape: 22 layers of 2048, 32 heads over 4 key/value heads
    llava-next-small  llama-125m under a real CLIP ViT-L/14 336, so pictures take as many tokens
    llava-next-7b     the sizes of llava-v1.6-mistral-7b, for GPUs

Tensors are bfloat16 and their values random, so answers mean nothing; the times do. Answers never
end by themselves: the head's row of the end-of-sequence token is zero, and among 32,000 random
logits the largest is above that. Every id of the vocabulary has a text, so all tokens are seen.
"""

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tessera.proto.image_layout import LLAVA_NEXT_PINPOINTS
from tessera.shard.backends.reference import ReferenceBackend
from tessera.shard.layers.base import Source
from tessera.shard.models.base import Placement
from tessera.shard.models.registry import build_model
from tessera.shard.parallel import Group
from tests.checkpoints import (
    BASE_VOCABULARY,
    Config,
    generation_config,
    merged,
    model_config,
    write_json,
    write_processors,
    write_tokenizer,
)

CACHE = Path(__file__).parents[1] / "build" / "bench"
FILE_BYTES = 2 << 30  # of one safetensors file, about
COMPLETE = "complete"  # is written last

SMALL: Config = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
TINYLLAMA: Config = SMALL | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
MISTRAL_7B: Config = SMALL | {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
CLIP_LARGE: Config = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}


def _llava_next(text: Config) -> Config:
    return {
        "image_grid_pinpoints": [list(canvas) for canvas in LLAVA_NEXT_PINPOINTS],
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": CLIP_LARGE,
    }


CHECKPOINTS: Mapping[str, tuple[str, Config]] = {
    "llama-125m": ("llama", SMALL),
    "llama-1.1b": ("llama", TINYLLAMA),
    "llava-next-small": ("next-vicuna", _llava_next(SMALL | {"vocab_size": 32064})),
    "llava-next-7b": ("next-mistral", _llava_next(MISTRAL_7B)),
}
"""Name -> the kind of tiny checkpoint it is a large one of, and what is larger."""


def checkpoint(name: str, folder: Path = CACHE) -> Path:
    """The folder of a checkpoint, made below `folder` where it is missing.

    Raises:
        KeyError: it is none of `CHECKPOINTS`.
    """
    kind, changes = CHECKPOINTS[name]
    return make(kind, changes, folder / name)


def make(kind: str, changes: Mapping[str, Any], folder: Path) -> Path:
    """Write a checkpoint of a kind of `tests.checkpoints` with other sizes, if it is not there."""
    if (folder / COMPLETE).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = merged(model_config(kind), changes)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(kind))
    write_tokenizer(folder, kind)
    _fill_vocabulary(folder / "tokenizer.json", config.get("text_config", config)["vocab_size"])
    if "vision_config" in config:
        write_processors(folder, kind, config)
    _write_tensors(folder, config, generation_config(kind)["eos_token_id"])
    (folder / COMPLETE).touch()
    return folder


def _fill_vocabulary(path: Path, vocab_size: int) -> None:
    """Pieces for the ids that the small tokenizer does not have; no text is cut into them."""
    tokenizer = json.loads(path.read_text())
    pieces = tokenizer["model"]["vocab"]
    # Those that are no pieces would be numbered anew, behind all pieces.
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    for token_id in range(BASE_VOCABULARY, vocab_size):
        pieces[added.get(token_id, f"▁w{token_id}")] = token_id
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))


def _write_tensors(folder: Path, config: Config, eos: int) -> None:
    """Files of about `FILE_BYTES`, and their index; no more than one file is in memory."""
    weight_map: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    total_bytes = 0

    def write() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
        part.clear()

    for source in _sources(config, folder):
        tensor = _random(source)
        if source.name == "lm_head.weight":
            tensor[eos] = 0
        part[_hub_name(source.name, "vision_config" in config)] = tensor
        total_bytes += tensor.nbytes
        if sum(each.nbytes for each in part.values()) >= FILE_BYTES:
            write()
    if part:
        write()
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _sources(config: Config, folder: Path) -> Iterator[Source]:
    """Every tensor the model takes from its checkpoint."""
    backend = ReferenceBackend(torch.device("cpu"))
    model = build_model(config, folder, Placement(backend, Group(), torch.bfloat16))
    for layer in model.layers():
        for parameter in layer.parameters.values():
            yield from parameter.sources


def _random(source: Source) -> torch.Tensor:
    """The same numbers for the same name. Norms are near one, outputs as large as inputs."""
    generator = torch.Generator().manual_seed(zlib.crc32(source.name.encode()))
    x = torch.empty(source.shape, dtype=torch.bfloat16).normal_(generator=generator)
    if len(source.shape) > 1:
        return x.mul_(1 / math.sqrt(math.prod(source.shape[1:])))
    return x.mul_(0.1).add_(1.0 if "norm" in source.name and "bias" not in source.name else 0.0)


def _hub_name(name: str, has_vision: bool) -> str:
    """How the hub's files spell a canonical name (`tessera.shard.weights.canonical_name`)."""
    if name.startswith("vision_tower."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if name.startswith(("multi_modal_projector.", "image_newline")):
        return name
    inner = name if name.startswith("lm_head.") else f"model.{name}"
    return f"language_model.{inner}" if has_vision else inner


def main() -> int:
    parser = argparse.ArgumentParser(description="Makes a random checkpoint and prints its folder.")
    parser.add_argument("name", choices=CHECKPOINTS)
    parser.add_argument("--folder", type=Path, default=CACHE, help="where checkpoints are kept")
    asked = parser.parse_args()
    print(checkpoint(asked.name, asked.folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A model on this machine: the embedded demo, a local folder, and what a folder must have."""

import json
from pathlib import Path
from typing import Any

from tessera.launcher.errors import LaunchError
from tessera.proto.head_sharing import possible_ranks, shareable

DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
DEMO_NAME = "tessera-demo"
PATH_STARTS = ("/", "./", "../", "~", ".\\")


def local_folder(model_id: str, override: str = "") -> Path | None:
    """The folder of a model that needs no download; None for a model of the hub.

    Args:
        model_id: a folder, a hub id, or empty for the demo model.
        override: a folder that holds the model's files, whatever its id.

    Raises:
        LaunchError: it names a folder that is not there, or not a model's.
    """
    if override:
        return check_model(_existing(override, "WEIGHTS_CACHE_OVERRIDE"))
    if not model_id:
        return check_model(_existing(str(DEMO_FOLDER), "the demo model's folder"))
    if model_id.startswith(PATH_STARTS) or Path(model_id).is_dir():
        return check_model(_existing(model_id, "MODEL_ID"))
    return None


def check_model(folder: Path) -> Path:
    """`folder`, if it looks like a checkpoint in the format that is served.

    Raises:
        LaunchError: config.json or the weights are missing. Pickled weights are never read: they
            could run any code.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise LaunchError(f"{folder} has no config.json: it is no model's folder.")
    try:
        readable = isinstance(json.loads(config.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        readable = False
    if not readable:
        raise LaunchError(f"{config} cannot be read as JSON; fetch the model again.")
    if not any(folder.glob("*.safetensors")):
        raise LaunchError(
            f"{folder} has no *.safetensors; other weight formats are not read. Convert the "
            "checkpoint, or choose a repository that has them."
        )
    return folder


def check_heads(folder: Path, world_size: int) -> None:
    """Refuse a number of shards that cannot share the model's attention heads.

    What the configuration leaves to the model's defaults is left to the shards.

    Raises:
        LaunchError: it cannot be; the message says which numbers can.
    """
    num_heads, num_kv_heads = head_counts(folder)
    if num_heads and num_kv_heads and not shareable(num_heads, num_kv_heads, world_size):
        raise LaunchError(
            f"{num_heads} attention heads and {num_kv_heads} key/value heads cannot be shared by "
            f"{world_size} shards; NUM_SHARD can be {possible_ranks(num_heads, num_kv_heads)}."
        )


def head_counts(folder: Path) -> tuple[int, int]:
    """Query heads and key/value heads of the text model; 0 for what config.json leaves out."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    return _count(text, "num_attention_heads"), _count(text, "num_key_value_heads")


def _count(config: dict[str, Any], key: str) -> int:
    """A number of the configuration; 0 where it is absent or none."""
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0


def _existing(text: str, setting: str) -> Path:
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise LaunchError(f"{setting}: there is no folder {text}.")
    return folder.resolve()

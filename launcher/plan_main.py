"""`tessera-plan`: what a model needs and what fits, without loading or downloading its weights."""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from tessera.launcher.capacity import Load, as_json, as_text, plan
from tessera.launcher.devices import Machine, find_devices
from tessera.launcher.errors import LaunchError
from tessera.launcher.model_folder import DEMO_FOLDER, DEMO_NAME, PATH_STARTS
from tessera.launcher.settings import Settings
from tessera.proto.env import SettingsError, byte_size, process_environment
from tessera.proto.head_sharing import shareable

CONFIGS = ("config.json", "preprocessor_config.json")  # the first one must be there
RANKS = (1, 2, 4, 8)
DEFAULT_HEADS = 32  # of a configuration that leaves them out
FOOTPRINT_TIMEOUT_S = 300


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or JSON.

    Returns:
        0; 1 after an error; 3 when the memory that was named is not enough.
    """
    parser = argparse.ArgumentParser(
        prog="tessera-plan",
        description=__doc__,
        epilog="All flags of tessera-launcher, its environment and its environment files count.",
    )
    parser.add_argument("--memory", help="of each accelerator, or of the host: 24g")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    told, others = parser.parse_known_args(arguments)
    try:
        settings = Settings.read(others, process_environment())
        report = report_on(settings, None if told.memory is None else byte_size(told.memory))
    except (SettingsError, LaunchError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"Error: --memory {error}.", file=sys.stderr)
        return 1
    facts, plans = report
    print(json.dumps(as_json(facts, plans), indent=1) if told.json else as_text(facts, plans))
    return 0 if any(each.fits is not False for each in plans) else 3


def report_on(settings: Settings, memory: int | None) -> tuple[dict[str, Any], list[Any]]:
    """(what is true of the model, one `Plan` per number of shards).

    Raises:
        LaunchError: the model cannot be described.
    """
    router, shard = settings.router, settings.shard
    kind = shard.device.partition(":")[0]
    if kind == "auto":
        kind = find_devices("auto", Machine.here(settings.environ)).kind
    folder = config_folder(settings)
    ranks = [router.num_shard] if router.num_shard else list(possible_ranks(folder))
    footprints = describe(folder, kind, shard.dtype, shard.quantize, ranks)
    first = footprints[0]
    load = Load(
        step_tokens=router.max_batch_prefill_tokens,
        batch_size=min(
            router.max_batch_size or router.max_concurrent_requests,
            router.max_batch_prefill_tokens,
        ),
        step_tiles=router.max_step_tiles,
        vision_cache_tokens=router.vision_cache_tokens,
        total_tokens=router.max_total_tokens,
        batch_total_tokens=router.max_batch_total_tokens,
    )
    facts = {
        "model": router.model_id or DEMO_NAME,
        "model_type": first["model_type"],
        "parameters": first["parameters"],
        "dtype": first["dtype"],
        "quantized": f" (QUANTIZE={shard.quantize})" if shard.quantize else "",
        "device": kind,
        "total_tokens": load.total_tokens or first["max_positions"],
        "picture_tokens": first["picture_tokens"],
        "memory": memory,
    }
    usable = None if memory is None else int(memory * shard.cuda_memory_fraction)
    return facts, [plan(each, kind, load, usable) for each in footprints]


def config_folder(settings: Settings) -> Path:
    """A folder with the model's JSON files; they are fetched for a model of the hub.

    Raises:
        LaunchError: they cannot be had.
    """
    told, model_id = settings.launcher, settings.router.model_id
    local = told.weights_cache_override or model_id or str(DEMO_FOLDER)
    if local.startswith(PATH_STARTS) or Path(local).is_dir():
        folder = Path(local).expanduser()
        if not (folder / CONFIGS[0]).is_file():
            raise LaunchError(f"{local} has no config.json: it is no model's folder.")
        return folder
    cache, revision = told.huggingface_hub_cache or None, told.revision or None
    try:
        path = hf_hub_download(model_id, CONFIGS[0], revision=revision, cache_dir=cache)
        for name in CONFIGS[1:]:
            try:
                hf_hub_download(model_id, name, revision=revision, cache_dir=cache)
            except EntryNotFoundError:
                continue
    except Exception as error:  # the hub's library lets those of its HTTP library through
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise LaunchError(
            f"the configuration of {model_id} cannot be fetched: {lines[0].rstrip('.')}; check "
            "MODEL_ID, HF_TOKEN and the network, or name a folder with its config.json."
        ) from None
    return Path(path).parent


def possible_ranks(folder: Path) -> list[int]:
    """Numbers of shards that can share the model's heads, of those that machines have."""
    config = json.loads((folder / CONFIGS[0]).read_text(encoding="utf-8"))
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    heads = text.get("num_attention_heads") or DEFAULT_HEADS
    kv_heads = text.get("num_key_value_heads") or heads
    return [ranks for ranks in RANKS if shareable(heads, kv_heads, ranks)]


def describe(
    folder: Path, device: str, dtype: str, quantize: str, ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """The footprints, from a process of the shards' kind: this one has no torch.

    Raises:
        LaunchError: the configuration is not that of a model that can be served.
    """
    command = [sys.executable, "-P", "-m", "tessera.shard.footprint", str(folder)]
    command += ["--device", device, "--dtype", dtype, "--quantize", quantize]
    command += ["--ranks", *map(str, ranks)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=FOOTPRINT_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it ended without a word"]
        raise LaunchError(lines[-1].removeprefix("Error: "))
    footprints: list[dict[str, Any]] = json.loads(done.stdout)
    return footprints


if __name__ == "__main__":
    sys.exit(main())

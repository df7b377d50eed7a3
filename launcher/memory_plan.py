"""`tessera-launcher --plan`: what a model needs and what fits, without loading its weights.

Of a model of the hub only the JSON files are fetched. The numbers come from a process of the
shards' kind, which builds the layers without their weights; this one has no torch.
"""

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars

from tessera.launcher.capacity import Load, Plan, as_json, as_text, plan
from tessera.launcher.devices import AUTO, Machine, check_backend, check_device, find_devices
from tessera.launcher.download import Wish, fetch_small
from tessera.launcher.errors import LaunchError
from tessera.launcher.model_folder import DEMO_FOLDER, DEMO_NAME, PATH_STARTS, head_counts
from tessera.launcher.plan import HUB_SECRETS
from tessera.launcher.settings import Settings
from tessera.proto.env import byte_size
from tessera.proto.head_sharing import shareable

CONFIG = "config.json"
CONFIGS = (CONFIG, "preprocessor_config.json", "quantize_config.json", "quant_config.json")
RANKS = (1, 2, 4, 8)
DEFAULT_HEADS = 32  # of a configuration that leaves them out
FOOTPRINT_TIMEOUT_S = 300
NOT_ENOUGH = 3


def print_plan(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print the table, or JSON.

    Args:
        arguments: flags without `--plan`; all of the launcher's count.

    Returns:
        0, or `NOT_ENOUGH` when the memory that was named is not enough.

    Raises:
        SettingsError: a setting is unusable.
        LaunchError: the model cannot be described.
    """
    parser = argparse.ArgumentParser(
        prog="tessera-launcher --plan",
        description="Say what memory a model needs and what fits, without loading its weights.",
        epilog="Every other flag, the environment and its file say what is planned for.",
        allow_abbrev=False,
    )
    parser.add_argument("--memory", help="of each accelerator, or of the host for all shards: 24g")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    told, others = parser.parse_known_args(arguments)
    settings = Settings.read(others, environ)
    disable_progress_bars()  # only the plan is printed, or what is in its way
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    facts, plans = report_on(settings, _memory(told.memory))
    print(json.dumps(as_json(facts, plans), indent=1) if told.json else as_text(facts, plans))
    return 0 if any(each.fits is not False for each in plans) else NOT_ENOUGH


def report_on(settings: Settings, memory: int | None) -> tuple[dict[str, Any], list[Plan]]:
    """(what is true of the model, one plan for each number of shards).

    Args:
        memory: as in `plan`.

    Raises:
        LaunchError: the model cannot be described.
    """
    router, shard = settings.router, settings.shard
    check_device(shard.device)
    check_backend(shard.backend)
    kind = shard.device.partition(":")[0]
    if kind == AUTO:
        kind = find_devices(AUTO, Machine.here(settings.environ)).kind
    folder = config_folder(settings)
    ranks = [router.num_shard] if router.num_shard else possible_ranks(folder)
    footprints = describe(folder, kind, settings, ranks)
    first, load = footprints[0], load_of(settings)
    facts = {
        "model": router.model_id or DEMO_NAME,
        "model_type": first["model_type"],
        "parameters": first["parameters"],
        "dtype": first["dtype"],
        "quantize": shard.quantize,
        "device": kind,
        "total_tokens": load.total_tokens or first["max_positions"],
        "picture_tokens": first["picture_tokens"],
        "memory": memory,
    }
    return facts, [plan(each, kind, load, memory) for each in footprints]


def load_of(settings: Settings) -> Load:
    """The largest step that settings allow, as the router asks the shards to try it."""
    router, shard = settings.router, settings.shard
    asked = router.max_batch_size or router.max_concurrent_requests
    return Load(
        step_tokens=router.max_batch_prefill_tokens,
        batch_size=min(asked, router.max_batch_prefill_tokens),
        step_tiles=router.max_step_tiles,
        vision_cache_tokens=router.vision_cache_tokens,
        total_tokens=router.max_total_tokens,
        batch_total_tokens=router.max_batch_total_tokens,
        block_size=shard.block_size,
        memory_fraction=shard.cuda_memory_fraction,
    )


def config_folder(settings: Settings) -> Path:
    """A folder with the model's JSON files; they are fetched for a model of the hub.

    Raises:
        LaunchError: they cannot be had.
    """
    told, model_id = settings.launcher, settings.router.model_id
    local = told.weights_cache_override or model_id or str(DEMO_FOLDER)
    if local.startswith(PATH_STARTS) or Path(local).is_dir():
        folder = Path(local).expanduser()
    else:
        folder = fetch_small(_wish(settings), CONFIGS)
    if not (folder / CONFIG).is_file():
        raise LaunchError(f"{local} has no {CONFIG}: it is no model's folder.")
    return folder


def possible_ranks(folder: Path) -> list[int]:
    """Numbers of shards that can share the model's heads, of those that machines have."""
    heads, kv_heads = head_counts(folder)
    heads = heads or DEFAULT_HEADS
    return [ranks for ranks in RANKS if shareable(heads, kv_heads or heads, ranks)]


def describe(
    folder: Path, device: str, settings: Settings, ranks: Sequence[int]
) -> list[dict[str, Any]]:
    """The footprints for several numbers of ranks; see `tessera.shard.footprint`.

    Raises:
        LaunchError: the configuration is not that of a model that can be served.
    """
    shard = settings.shard
    command = [sys.executable, "-P", "-m", "tessera.shard.footprint", str(folder)]
    command += ["--device", device, "--dtype", shard.dtype, "--quantize", shard.quantize]
    command += ["--kv-cache-dtype", shard.kv_cache_dtype]
    command += ["--ranks", *map(str, ranks)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=FOOTPRINT_TIMEOUT_S, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it cannot be described"]
        raise LaunchError(lines[-1].removeprefix("Error: "))
    footprints: list[dict[str, Any]] = json.loads(done.stdout)
    return footprints


def _memory(text: str | None) -> int | None:
    try:
        return None if text is None else byte_size(text)
    except ValueError as error:
        raise LaunchError(f"--memory={text!r} {error}.") from None


def _wish(settings: Settings) -> Wish:
    told, environ = settings.launcher, settings.environ
    return Wish(
        settings.router.model_id,
        told.revision or None,
        Path(told.huggingface_hub_cache or constants.HF_HUB_CACHE).expanduser(),
        endpoint=environ.get("HF_ENDPOINT") or None,
        token=next((text for name in HUB_SECRETS if (text := environ.get(name))), None),
    )

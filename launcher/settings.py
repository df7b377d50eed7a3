"""Settings that only the launcher needs, and where all settings come from."""

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from dotenv import dotenv_values

from tessera.proto.env import (
    SettingsError,
    boolean,
    byte_size,
    environment_names,
    fields_of,
    integer,
    merged_environment,
    near_misses,
    parse_flags,
    read_settings,
    setting,
    settings_table,
)
from tessera.router.settings import RouterSettings
from tessera.shard.settings import ShardSettings

PROGRAM = "tessera-launcher"
DESCRIPTION = (
    "Serve a language or vision-language model over HTTP, split over one or more shards. With "
    "--plan [--memory SIZE] [--json]: only say what memory that takes, without loading weights. "
    "With --version: only say which version this is."
)
DEFAULT_HOSTNAME = "0.0.0.0"

# Other names of the environment files that this server is deployed with.
FOREIGN = frozenset({"MODEL_NAME", "TGI_VERSION"})

# What text-generation-inference has and this server can do without: taken, and said to be unused.
IGNORED = {
    "TRUST_REMOTE_CODE": "no code from a model's folder is ever run",
    "SPECULATE": "there is no speculative decoding, and answers are the same without",
    "DISABLE_CUSTOM_KERNELS": "set BACKEND=reference for plain operations",
    "PROMETHEUS_PORT": "metrics are at /metrics of the HTTP port",
    "USAGE_STATS": "no usage statistics are collected",
    "ENABLE_PREFILL_LOGPROBS": "they are always available",
    "WATERMARK_GAMMA": "answers are not watermarked",
    "WATERMARK_DELTA": "answers are not watermarked",
}

# What it has and whoever asks for it would miss: refused as a flag, warned about as a variable,
# which may be meant for somebody else.
ABSENT = {
    "LORA_ADAPTERS": "adapters are not supported; merge them into the model",
    "CUDA_GRAPHS": "there is nothing to set for graphs",
    "ROPE_SCALING": "it is read from the model's config.json",
    "ROPE_FACTOR": "it is read from the model's config.json",
    "NGROK": "there is no tunnel",
    "NGROK_AUTHTOKEN": "there is no tunnel",
    "NGROK_EDGE": "there is no tunnel",
}

PLAN_FLAGS = {
    "MEMORY": "it goes with --plan, which says what fits in so much memory",
    "JSON": "it goes with --plan; for the log as JSON there is --json-output",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherSettings:
    """Settings of the launcher itself. Read once in `main`, then passed down, never re-read."""

    env_file: str = setting("", "file of NAME=value lines, below flags and environment")
    revision: str = setting("", "branch, tag or commit of a hub model; empty: main")
    sharded: bool | None = setting(
        None, "true: one shard per visible device; false: one shard; empty: NUM_SHARD", boolean
    )
    huggingface_hub_cache: str = setting("", "folder of downloaded models; empty: the hub's own")
    weights_cache_override: str = setting(
        "", "local folder with the files of MODEL_ID; nothing is downloaded then"
    )
    shm_size: int | None = setting(
        None, "shared memory (/dev/shm) to insist on, such as 8g; empty: what is needed", byte_size
    )
    max_shard_restarts: int = setting(
        3,
        "times within ten minutes that lost shards are started anew, requests under way going on; "
        "0: the server ends",
        integer(0),
    )
    startup_timeout: int = setting(
        900, "seconds until the server must be ready, downloads not counted", integer(1)
    )


CLASSES: tuple[type[Any], ...] = (LauncherSettings, RouterSettings, ShardSettings)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that was said to this launcher."""

    launcher: LauncherSettings
    router: RouterSettings
    shard: ShardSettings
    environ: Mapping[str, str]  # all of it, the environment file and the flags included
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, arguments: Sequence[str], environ: Mapping[str, str]) -> "Settings":
        """Flags over the process's environment over the environment file over the defaults.

        Exits 0 after `--help` and 2 on a flag that does not exist.

        Raises:
            SettingsError: a value is unusable. The message says what to change.
        """
        flags = parse_flags(
            *(PROGRAM, DESCRIPTION, CLASSES, arguments),
            internal=False,
            ignored=IGNORED,
            absent=ABSENT | PLAN_FLAGS,
        )
        merged = dict(environ)
        if path := flags.get("ENV_FILE") or environ.get("ENV_FILE"):
            merged = merged_environment(read_env_file(Path(path)), _given(environ), *CLASSES)
        merged = merged_environment(merged, flags, *CLASSES)
        for name in _internal_names():
            merged.pop(name, None)  # of an outer launcher, torchrun or MPI: not meant for us
        unused = IGNORED | ABSENT
        warnings = near_misses(merged, environment_names(*CLASSES) | FOREIGN | unused.keys())
        warnings += [
            f"{name} is not used: {reason}." for name, reason in unused.items() if merged.get(name)
        ]
        warnings += _check_hostname(merged, is_flag="HOSTNAME" in flags)
        return cls(
            read_settings(LauncherSettings, merged),
            read_settings(RouterSettings, merged),
            read_settings(ShardSettings, merged),
            merged,
            tuple(warnings),
        )


def read_env_file(path: Path) -> dict[str, str]:
    """The NAME=value lines of a file, quoted as in docker's and dotenv's.

    Raises:
        SettingsError: there is no such file, or it is not text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise SettingsError(f"the environment file {str(path)!r}: {reason}.") from None
    values = dotenv_values(stream=StringIO(text), interpolate=False)
    return {name: value or "" for name, value in values.items()}


def _given(environ: Mapping[str, str]) -> dict[str, str]:
    """An empty variable counts as absent, so the environment file may still say something."""
    return {name: text for name, text in environ.items() if text}


def _internal_names() -> list[str]:
    return [
        name
        for cls in CLASSES
        for field, _, spec in fields_of(cls)
        if spec.internal
        for name in (field.upper(), *spec.aliases)
    ]


def _check_hostname(merged: dict[str, str], *, is_flag: bool) -> list[str]:
    """Replace a HOSTNAME that is no address: inside docker it is the container's id."""
    text = merged.get("HOSTNAME", "")
    if not text or text == "localhost" or _is_address(text):
        return []
    if is_flag:
        raise SettingsError(f"HOSTNAME={text!r} must be an IP address such as {DEFAULT_HOSTNAME}.")
    merged["HOSTNAME"] = DEFAULT_HOSTNAME
    if text == socket.gethostname():
        return []  # nobody has said it: containers and shells set this machine's own name
    return [f"HOSTNAME={text!r} is no IP address: listening on {DEFAULT_HOSTNAME} instead."]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    print(settings_table(*CLASSES), end="")  # for the README

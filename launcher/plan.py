"""Which processes to run: settings and devices in, argument lists and environments out. Pure."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tessera.launcher.devices import Devices
from tessera.launcher.errors import LaunchError
from tessera.launcher.model_folder import DEMO_NAME
from tessera.launcher.settings import CLASSES, Settings
from tessera.proto.env import environment_names, to_environment
from tessera.proto.lifeline import LAUNCHER_PID
from tessera.router.settings import RouterSettings
from tessera.shard.settings import ShardSettings

ROUTER = "router"
MAX_SOCKET_PATH = 107  # bytes of a unix socket's address, without the final zero
MAX_SHARDS = 64
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

# The cores are shared by router, shards and clients: a thread that spins while it waits takes time
# from the one that has work. OpenMP reads these when torch is imported, so they must be there then.
PASSIVE_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
# Everything is on disk when the children start; nothing may be asked of the hub then.
OFFLINE_HUB = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Only the download needs it; a child that does not hold a secret cannot leak it.
HUB_SECRETS = ("HF_TOKEN", "HF_API_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One child process."""

    name: str  # as it appears in the log: "router", "shard 0"
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    pass_fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """Where one launch of the server lives on this machine."""

    model_folder: Path
    run_folder: Path  # private, for sockets and the rendezvous
    http_socket_fd: int
    ready_fd: int
    launcher_pid: int
    incarnation: int = 0  # how often the shards were started before


def plan_processes(settings: Settings, devices: Devices, place: Place) -> list[ProcessSpec]:
    """The shards in the order of their ranks, then the router.

    Raises:
        LaunchError: the number of shards or the socket path does not work.
    """
    world_size = count_shards(settings, devices)
    prefix = socket_prefix(settings.router.shard_uds_path, place.run_folder, world_size)
    shards = [
        _plan_shard(settings, devices, place, prefix, rank, world_size)
        for rank in range(world_size)
    ]
    return [*shards, _plan_router(settings, place, prefix, world_size)]


def plan_download(settings: Settings, result: Path, launcher_pid: int) -> ProcessSpec:
    """The process that fetches the model and writes its folder's name into `result`."""
    told = settings.launcher
    environ = _inherited(settings) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    token = next((text for name in HUB_SECRETS if (text := settings.environ.get(name))), "")
    if token:
        environ["HF_TOKEN"] = token
    environ[LAUNCHER_PID] = str(launcher_pid)
    argv = [*_module("tessera.launcher.download")]
    argv += ["--result", str(result), "--log-level", settings.router.log_level]
    if told.revision:
        argv += ["--revision", told.revision]
    if told.huggingface_hub_cache:
        argv += ["--cache-dir", told.huggingface_hub_cache]
    argv += ["--", settings.router.model_id]
    return ProcessSpec("download", tuple(argv), environ)


def count_shards(settings: Settings, devices: Devices) -> int:
    """NUM_SHARD, or as SHARDED says, or one per device; text-generation-inference's rules."""
    num_shard, sharded = settings.router.num_shard, settings.launcher.sharded
    available = devices.count if ":" not in settings.shard.device else 1
    if num_shard is None:
        num_shard = 1 if sharded is False else min(available, MAX_SHARDS)
        if sharded and num_shard == 1:
            raise LaunchError(
                f"SHARDED=true but there is one {devices.kind} device; set NUM_SHARD to the number "
                "of shards, or SHARDED=false."
            )
    if sharded and num_shard == 1:
        raise LaunchError("SHARDED=true and NUM_SHARD=1 contradict; drop one of them.")
    if num_shard > 1 and ":" in settings.shard.device and devices.kind != "cpu":
        raise LaunchError(
            f"NUM_SHARD={num_shard} but DEVICE={settings.shard.device} is one device; lower it or "
            f"set DEVICE={devices.kind}."
        )
    if devices.kind != "cpu" and num_shard > available:
        raise LaunchError(
            f"NUM_SHARD={num_shard} but there are {available} {devices.kind} device(s); lower it "
            "or make more devices visible."
        )
    return num_shard


def socket_prefix(wanted: str, run_folder: Path, world_size: int) -> str:
    """The path to which `-<rank>` is added; every rank's socket fits into a unix address."""
    prefix = wanted or str(run_folder / "shard")
    length = len(f"{prefix}-{world_size - 1}".encode())
    if length > MAX_SOCKET_PATH:
        hint = "SHARD_UDS_PATH" if wanted else "TMPDIR"
        raise LaunchError(
            f"the unix socket {prefix}-{world_size - 1} has {length} bytes, over the limit of "
            f"{MAX_SOCKET_PATH}; set {hint} to a shorter path."
        )
    return prefix


def shard_name(rank: int) -> str:
    """How a shard is called in the log."""
    return f"shard {rank}"


def _plan_shard(
    settings: Settings, devices: Devices, place: Place, prefix: str, rank: int, world_size: int
) -> ProcessSpec:
    told = settings.shard
    threads = told.num_threads or max(1, devices.cores // world_size)
    rendezvous = place.run_folder / f"rendezvous-{place.incarnation}"
    shard = replace(
        told,
        model_id=str(place.model_folder),
        rank=rank,
        world_size=world_size,
        incarnation=place.incarnation,
        shard_uds_path=prefix,
        device=_device_of(told.device, devices, rank),
        num_threads=threads,
        rendezvous="" if told.master_addr or world_size == 1 else rendezvous.as_uri(),
        json_output=True,
    )
    environ = _child_environ(settings, place, shard)
    environ |= PASSIVE_OPENMP | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    if not told.master_addr or told.master_addr in LOCAL_HOSTS:
        environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name may not resolve to itself
    if devices.cuda_ids:
        environ["CUDA_VISIBLE_DEVICES"] = devices.cuda_ids[rank]
    return ProcessSpec(shard_name(rank), _module("tessera.shard.main"), environ)


def _device_of(wanted: str, devices: Devices, rank: int) -> str:
    """CUDA ranks see one device each, so theirs has no index; others count by their rank."""
    if ":" in wanted or devices.kind == "cpu" or devices.cuda_ids:
        return wanted if wanted != "auto" else devices.kind
    return f"{devices.kind}:{rank}"


def _plan_router(settings: Settings, place: Place, prefix: str, world_size: int) -> ProcessSpec:
    router = replace(
        settings.router,
        model_id=str(place.model_folder),
        served_model_name=settings.router.served_model_name
        or settings.router.model_id
        or DEMO_NAME,
        num_shard=world_size,
        shard_uds_path=prefix,
        http_socket_fd=place.http_socket_fd,
        ready_fd=place.ready_fd,
        json_output=True,
    )
    environ = _child_environ(settings, place, router)
    fds = (place.http_socket_fd, place.ready_fd)
    return ProcessSpec(ROUTER, _module("tessera.router.main"), environ, fds)


def _child_environ(
    settings: Settings, place: Place, child: RouterSettings | ShardSettings
) -> dict[str, str]:
    """What is inherited, without any setting, and then exactly the settings of this child.

    Leaving out first matters: a setting equal to its default is not written, and must not then be
    taken from the environment that a flag was meant to overrule.
    """
    told = {"PYTHONUNBUFFERED": "1", LAUNCHER_PID: str(place.launcher_pid)}
    return _inherited(settings) | OFFLINE_HUB | told | to_environment(child)


def _inherited(settings: Settings) -> dict[str, str]:
    dropped = environment_names(*CLASSES) | frozenset(HUB_SECRETS)
    return {name: text for name, text in settings.environ.items() if name not in dropped}


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", name)  # -P: import nothing from the current folder

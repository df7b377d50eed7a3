"""How many accelerators and cores this server may use, found without importing torch.

Everything is asked of a `Machine`, so that tests describe any machine as a few values.
"""

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import takewhile
from pathlib import Path

from tessera.launcher.errors import LaunchError
from tessera.proto.processors import usable_processors
from tessera.shard import settings as shard_settings

BACKENDS = Path(shard_settings.__file__).parent / "backends"
"""One file for each kind of device, named after it, beside those that several kinds may have."""

AUTO = "auto"
SHARED_BACKENDS = frozenset({"ipex", "reference"})  # they compute on several kinds of devices

INTEL_VENDOR = "0x8086"
LIST_GPUS = ("nvidia-smi", "-L")
COMMAND_TIMEOUT_S = 20  # nvidia-smi takes seconds when no persistence daemon runs
MIG = re.compile(r"UUID: (MIG-[^)]+)\)")
GPU = re.compile(r"^GPU \d+: .*UUID: (GPU-[^)]+)\)", re.MULTILINE)

XPU_SMI = re.compile(r"^\|?\s*(\d+)\s*\|\s*Device Name:", re.MULTILINE)

FUNCTION = re.compile(r"^def (\w+)\(", re.MULTILINE)  # of a module, in Python


def run_command(argv: Sequence[str]) -> str:
    """What a command prints; empty when it is absent, fails or hangs."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


@dataclass(frozen=True, slots=True)
class Machine:
    """What the counting functions may ask: files below `root`, commands, the environment."""

    environ: Mapping[str, str]
    root: Path = Path("/")
    run: Callable[[Sequence[str]], str] = run_command
    affinity: frozenset[int] = frozenset()  # logical cores this process may run on
    torch_version: str = ""  # of the installed package; empty: none

    @classmethod
    def here(cls, environ: Mapping[str, str]) -> "Machine":
        """The machine this process runs on."""
        return cls(
            environ=environ,
            affinity=usable_processors(),
            torch_version=installed_version("torch"),
        )


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices that shards may be put on."""

    kind: str  # "cuda", "xpu" or "cpu"
    count: int  # accelerators; 1 for the cpu, which any number of shards may share
    cores: int  # physical ones, for all shards together
    cuda_ids: tuple[str, ...] = ()  # entry of CUDA_VISIBLE_DEVICES of each, where it is known
    note: str = ""  # why an accelerator that is there is not used


def find_devices(wanted: str, machine: Machine) -> Devices:
    """The devices of the wanted kind; `auto` is the first of cuda, xpu, cpu that torch can use.

    Args:
        wanted: "auto", or a kind with an index ("cuda:1") or without.

    Raises:
        LaunchError: an accelerator was asked for by name and there is none, or nothing can
            compute on such a device.
    """
    cores = usable_cores(machine)
    check_device(wanted)
    kind, _, index = wanted.partition(":")
    if kind == AUTO:
        return _first_usable(machine, cores)
    if kind not in ACCELERATORS:
        return Devices(kind, 1, cores)
    ids = ACCELERATORS[kind](machine)
    if not ids:
        raise LaunchError(
            f"DEVICE={wanted} but this machine shows no {kind} device; check the driver and "
            "the container's device flags, or set DEVICE=cpu."
        )
    if index:
        return Devices(kind, 1, cores)
    return Devices(kind, len(ids), cores, tuple(ids) if kind == "cuda" else ())


def check_device(wanted: str) -> None:
    """Refuse what is no kind of device.

    Raises:
        LaunchError: with the kinds there are.
    """
    kinds = [name for name in backend_names() if name not in SHARED_BACKENDS]
    kind, colon, index = wanted.partition(":")
    if wanted != AUTO and (kind not in kinds or (colon and not index.isdecimal())):
        raise LaunchError(
            f"DEVICE={wanted} is not known; use auto or one of {', '.join(kinds)}, with an index "
            "(cuda:1) or without."
        )


def check_backend(wanted: str) -> None:
    """Refuse what is no file that computes.

    Raises:
        LaunchError: with the files there are.
    """
    names = backend_names()
    if wanted != AUTO and wanted not in names:
        raise LaunchError(f"BACKEND={wanted} is not known; use auto or one of {', '.join(names)}.")


def backend_names() -> list[str]:
    """The files that offer what a backend must, found without importing them: that needs torch."""
    return sorted(
        path.stem
        for path in BACKENDS.glob("*.py")
        if {"available", "create"} <= set(FUNCTION.findall(_read(path)))
    )


def _first_usable(machine: Machine, cores: int) -> Devices:
    notes = []
    for kind, find in ACCELERATORS.items():
        ids = find(machine)
        if ids and kind in torch_kinds(machine.torch_version):
            return Devices(kind, len(ids), cores, tuple(ids) if kind == "cuda" else ())
        if ids:
            notes.append(
                f"{len(ids)} {kind} device(s) are here, but torch {machine.torch_version} "
                "cannot use them: serving on the cpu. Install torch's build for them."
            )
    return Devices("cpu", 1, cores, note=" ".join(notes))


def torch_kinds(version: str) -> frozenset[str]:
    """Which devices a torch package was built for, from its version's local part."""
    build = version.partition("+")[2]
    if build.startswith("xpu"):
        return frozenset({"xpu", "cpu"})
    if build.startswith(("cu", "rocm")) or (version and not build):
        return frozenset({"cuda", "cpu"})  # the package index's plain wheel is built for CUDA
    return frozenset({"cpu"})


def installed_version(package: str) -> str:
    """Version of an installed package, empty when there is none. Imports nothing of it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cuda_devices(machine: Machine) -> list[str]:
    """The CUDA devices in reach, as entries of CUDA_VISIBLE_DEVICES.

    CUDA_VISIBLE_DEVICES decides where it is set, up to its first number of no GPU, then
    NVIDIA_VISIBLE_DEVICES (the container runtime's), then what `nvidia-smi` lists.
    """
    visible = machine.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return _existing(_entries(visible), machine.run(LIST_GPUS))
    allowed = machine.environ.get("NVIDIA_VISIBLE_DEVICES", "all")
    if allowed in ("void", "none"):
        return []
    listed = nvidia_smi_devices(machine.run(LIST_GPUS))
    if allowed in ("", "all") or not listed:
        return listed
    # The runtime renumbers what it lets in, so only the number of entries means something here.
    return listed[: len(_entries(allowed))]


def _existing(entries: list[str], listing: str) -> list[str]:
    """The entries before the first one that numbers a GPU which is not there, as CUDA reads them.

    Without a listing nobody can tell.
    """
    gpus = len(GPU.findall(listing))
    if not gpus:
        return entries
    return list(takewhile(lambda entry: not entry.isdecimal() or int(entry) < gpus, entries))


def nvidia_smi_devices(listing: str) -> list[str]:
    """Devices of an `nvidia-smi -L` listing: its MIG slices where it has any, else the GPUs."""
    slices = MIG.findall(listing)
    if slices:
        return slices
    return [str(index) for index in range(len(GPU.findall(listing)))]


def xpu_devices(machine: Machine) -> list[str]:
    """The Intel GPUs in reach: ZE_AFFINITY_MASK where it is set, then xpu-smi, then the kernel."""
    mask = machine.environ.get("ZE_AFFINITY_MASK")
    if mask is not None:
        return _entries(mask)
    found = XPU_SMI.findall(machine.run(["xpu-smi", "discovery"]))
    return found or [str(index) for index in range(_intel_render_nodes(machine.root))]


def _intel_render_nodes(root: Path) -> int:
    """Render nodes of Intel GPUs that a container was given, not only those the host has."""
    nodes = sorted((root / "dev/dri").glob("renderD*"))
    vendors = [root / "sys/class/drm" / node.name / "device/vendor" for node in nodes]
    return sum(_read(vendor).strip() == INTEL_VENDOR for vendor in vendors)


def usable_cores(machine: Machine) -> int:
    """Physical cores this process may run on, within the container's CPU quota; at least one."""
    siblings = set()
    for core in machine.affinity:
        topology = machine.root / f"sys/devices/system/cpu/cpu{core}/topology"
        # Hyperthreads of one core name the same siblings; without the file a core counts as one.
        siblings.add(_read(topology / "thread_siblings_list").strip() or str(core))
    cores = max(1, len(siblings))
    quota = _cpu_quota(machine.root)
    return max(1, min(cores, int(quota))) if quota else cores


def _cpu_quota(root: Path) -> float:
    """Cores' worth of time of the control group (v2, then v1); 0 when it is not limited."""
    words = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(words) != 2:
        group = root / "sys/fs/cgroup/cpu"
        words = [_read(group / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return 0.0  # "max", "-1" or no such file
    return int(words[0]) / int(words[1])


def _entries(visible: str) -> list[str]:
    """Entries of a visible-devices list; CUDA stops reading at the first negative one."""
    entries: list[str] = []
    for entry in visible.split(","):
        if entry.strip().startswith("-"):
            break
        if entry.strip():
            entries.append(entry.strip())
    return entries


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


ACCELERATORS: dict[str, Callable[[Machine], list[str]]] = {
    "cuda": cuda_devices,
    "xpu": xpu_devices,
}
"""The kinds in the order of preference, with the function that lists them."""

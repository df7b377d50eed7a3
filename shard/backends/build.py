"""Builds the CPU kernels: `python -m tessera.shard.backends.build`.

Needs GCC (11 or newer) and the headers in the torch package, nothing else. This file imports
neither torch nor tessera: setup.py runs it before there is an installed package.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "csrc"
COMPILERS = ("g++", "c++")
MAX_JOBS = 2

COMMON_FLAGS = ("-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi")
DRIVER_FLAGS = ("-O2",)
# No -ffast-math: NaN must stay NaN. Products and sums may be fused, errno and traps are unused.
KERNEL_FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
AVX512_FLAGS = (
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "-mprefer-vector-width=512",
)
X86_VARIANTS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": AVX512_FLAGS,
    "avx512_bf16": (*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"),
}


class CannotBuildError(Exception):
    """Something that building needs is not here; the message says what, as half a sentence."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One translation unit and how it is compiled."""

    source: Path
    name: str  # of the object file
    flags: Sequence[str] = field(default_factory=tuple)


def library_path(folder: Path = FOLDER) -> Path:
    """Where the library for these sources and the installed torch is, or would be.

    The name is a hash of both: a library that no longer fits is not found instead of loaded.

    Raises:
        CannotBuildError: torch is not installed.
    """
    digest = hashlib.sha256(f"{_torch_version()} {platform.machine()}".encode())
    for file in [Path(__file__), *sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("*.cpp"))]:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return folder / f"tessera_cpu-{digest.hexdigest()[:16]}.so"


def build(folder: Path = FOLDER, compiler: str | None = None) -> Path:
    """Build the library into `folder` unless it is there; returns its path.

    Raises:
        CannotBuildError: no compiler or no torch headers.
        subprocess.CalledProcessError: the compiler or the loader refused; stderr says why.
    """
    library = library_path(folder)
    if library.exists():
        return library
    torch = _torch_folder()
    compiler = _find_compiler(compiler)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = _compile(compiler, torch, Path(scratch))
        linked = Path(scratch) / library.name
        _run(_link_command(compiler, torch, objects, linked))
        _run([sys.executable, "-c", f"import torch; torch.ops.load_library({str(linked)!r})"])
        for outdated in folder.glob("tessera_cpu-*.so"):
            outdated.unlink(missing_ok=True)
        linked.replace(library)  # in one step: another process may be loading or building it
    return library


def can_build() -> bool:
    """Whether `build` has all it needs here."""
    try:
        _torch_folder()
        _find_compiler(None)
    except CannotBuildError:
        return False
    return True


def _compile(compiler: str, torch: Path, folder: Path) -> list[Path]:
    """Compile every unit; the slowest (the one with most of torch's headers) comes first."""

    def compile_unit(unit: Unit) -> Path:
        out = folder / f"{unit.name}.o"
        includes = ("-isystem", str(torch / "include"))
        flags = (*COMMON_FLAGS, *unit.flags, *includes)
        _run([compiler, *flags, "-c", str(unit.source), "-o", str(out)])
        return out

    with ThreadPoolExecutor(MAX_JOBS) as jobs:
        return list(jobs.map(compile_unit, _units()))


def _units() -> list[Unit]:
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    variants = {"portable": (), **(X86_VARIANTS if is_x86 else {})}
    driver_flags = (*DRIVER_FLAGS, *(["-DTESSERA_X86"] if is_x86 else []))
    names = ("ops", "cache", "linear", "attend", "crew", "variants")
    drivers = [Unit(SOURCES / f"{name}.cpp", name, driver_flags) for name in names]
    drivers.append(Unit(SOURCES / "shared.cpp", "shared", (*driver_flags, "-O3")))  # it sums
    kernels = [
        Unit(
            SOURCES / "kernels.cpp",
            f"kernels_{name}",
            (*KERNEL_FLAGS, *flags, f"-DTESSERA_ISA={name}"),
        )
        for name, flags in variants.items()
    ]
    return drivers + kernels


def _link_command(compiler: str, torch: Path, objects: list[Path], out: Path) -> list[str]:
    names = [str(file) for file in objects]
    libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    return [compiler, "-shared", "-Wl,-z,now", *names, *libraries, "-o", str(out)]


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _torch_version() -> str:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        raise CannotBuildError("torch is not installed") from None


def _torch_folder() -> Path:
    _torch_version()
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / "include" / "torch" / "library.h").exists():
        raise CannotBuildError("torch is installed without its C++ headers")
    return folder


def _find_compiler(compiler: str | None) -> str:
    wanted = [compiler] if compiler else COMPILERS
    for name in wanted:
        if found := shutil.which(name):
            return found
    raise CannotBuildError(f"no C++ compiler was found (looked for {', '.join(wanted)})")


def build_and_tell(folder: Path = FOLDER, compiler: str | None = None) -> bool:
    """`build`, with one line on what came of it; False if the compiler failed."""
    try:
        print(f"CPU kernels: {build(folder, compiler)}", flush=True)
    except CannotBuildError as reason:
        print(
            f"CPU kernels not built: {reason}; the slower reference operations will be used",
            flush=True,
        )
    except subprocess.CalledProcessError as failed:
        print(f"CPU kernels not built: {failed.cmd[0]} failed\n{failed.stderr}", flush=True)
        return False
    return True


def main() -> int:
    """Command line; 0 also where nothing can be built, because the server runs without."""
    parser = argparse.ArgumentParser(description="Build the CPU kernels.")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder for the library")
    parser.add_argument("--compiler", help=f"default: the first of {', '.join(COMPILERS)}")
    options = parser.parse_args()
    return 0 if build_and_tell(options.output, options.compiler) else 1


if __name__ == "__main__":
    raise SystemExit(main())

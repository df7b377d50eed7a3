"""IPEX and the torch it needs, beside the project's own packages.

`python -m tests.shard.backends.ipex_environment` (or `make ipex-env`) installs them into
`build/ipex-env`, 2 GB; what is there already is left alone. PyPI has that torch built for CUDA; it
comes without CUDA's own libraries, gigabytes that nothing here calls. So that it can be
loaded, a compiler makes libraries of the same names whose functions all report a failure.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "ipex-env"
REQUIREMENTS = ("torch==2.8.0", "intel-extension-for-pytorch==2.8.0")
INSTALL_TIMEOUT_S = 600
TOOL_TIMEOUT_S = 120
MISSING = "NO IPEX: its backend will not be tested (make ipex-env installs it)"

CUDA_LIBRARY = re.compile(r"Shared library: \[(lib(?:cu|nccl|nv)[^\]]+)\]")
CUDA_FUNCTION = re.compile(r"cu|nccl|nv")
NO_DEVICE = 100  # cudaErrorNoDevice, and no success in any other of these libraries


def install() -> None:
    """Install them, unless they are there.

    Raises:
        OSError: there is no compiler, or no room.
        subprocess.SubprocessError: pip or the compiler cannot, or took too long.
    """
    wanted, stamp = "\n".join(REQUIREMENTS) + "\n", FOLDER / "requirements.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"==> {FOLDER.relative_to(ROOT)}: {' '.join(REQUIREMENTS)}", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--target", str(FOLDER)]
    subprocess.run([*pip, *REQUIREMENTS], check=True, timeout=INSTALL_TIMEOUT_S)
    stand_in_for_cuda(FOLDER / "torch" / "lib")
    check = [sys.executable, "-c", "import intel_extension_for_pytorch"]
    variables = os.environ | {"PYTHONPATH": str(FOLDER)}
    subprocess.run(check, check=True, timeout=TOOL_TIMEOUT_S, env=variables, capture_output=True)
    stamp.write_text(wanted)


def stand_in_for_cuda(folder: Path) -> None:
    """Put libraries of CUDA's names beside torch's own, with all functions that those look for."""
    needed: set[str] = set()
    functions: dict[str, set[str]] = defaultdict(set)  # by library; "": of one that is not told
    for library in folder.glob("*.so"):
        needed |= set(CUDA_LIBRARY.findall(_output("readelf", "-dW", library)))
        for line in _output("nm", "-D", "--undefined-only", library).splitlines():
            name, _, of_library = line.split()[-1].partition("@")
            if of_library or CUDA_FUNCTION.match(name):
                functions[of_library].add(name)
    for name in needed:
        _compile(folder / name, functions.get(name, functions[""]), name in functions)


def _compile(library: Path, functions: set[str], is_versioned: bool) -> None:
    """A library of functions that fail, or return a text where one is expected."""
    source, versions = library.with_suffix(".c"), library.with_suffix(".map")
    source.write_text("".join(map(_function, sorted(functions))))
    versions.write_text(f"{library.name} {{ *; }};" if is_versioned else "{ global: *; };")
    flags = ["-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,--version-script={versions}"]
    _output("cc", *flags, f"-Wl,-soname,{library.name}", "-o", library, source)
    source.unlink()
    versions.unlink()


def _function(name: str) -> str:
    is_text = "String" in name or name.endswith("ErrorName")
    result = '"there is no CUDA"' if is_text else f"(void *){NO_DEVICE}"
    return f"void *{name}(void) {{ return {result}; }}\n"


def _output(*command: str | Path) -> str:
    return subprocess.run(
        command, check=True, timeout=TOOL_TIMEOUT_S, capture_output=True, text=True
    ).stdout


if __name__ == "__main__":
    try:
        install()
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"{MISSING}: {error}")

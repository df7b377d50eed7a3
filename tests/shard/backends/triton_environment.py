"""Triton beside the project's own packages, whose torch may be built without CUDA.

`python -m tests.shard.backends.triton_environment` (or `make triton-env`) installs it into
`build/triton-env`; what is there already is left alone. Triton is that of torch 2.11, the oldest
that GPUs are used with; its interpreter does not go together with the newest numpy.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "build" / "triton-env"
REQUIREMENTS = ("triton==3.6.0", "numpy==2.3.5")
INSTALL_TIMEOUT_S = 500
MISSING = "NO TRITON: kernels for GPUs will not be tested (make triton-env installs it)"


def installed() -> bool:
    """Whether the folder holds these versions."""
    stamp = FOLDER / "requirements.txt"
    return stamp.exists() and stamp.read_text() == _wanted()


def variables(**more: str) -> dict[str, str]:
    """The environment of a process that finds them before all others."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(FOLDER), str(ROOT))), **more}


def install() -> None:
    """Install them, unless they are there.

    Raises:
        subprocess.SubprocessError: pip cannot, or took too long.
    """
    if installed():
        return
    print(f"==> {FOLDER.relative_to(ROOT)}: {' '.join(REQUIREMENTS)}", flush=True)
    shutil.rmtree(FOLDER, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary=:all:", "--target", str(FOLDER), *REQUIREMENTS]
    subprocess.run(pip, check=True, timeout=INSTALL_TIMEOUT_S)
    (FOLDER / "requirements.txt").write_text(_wanted())


def _wanted() -> str:
    return "\n".join(REQUIREMENTS) + "\n"


if __name__ == "__main__":
    try:
        install()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{MISSING}: {error}", file=sys.stderr)

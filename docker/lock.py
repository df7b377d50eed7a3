"""Writes requirements.lock anew, with pip-compile (`pip install pip-tools`); `make lock` runs it.

torch is left out, for each image has its own build of it; what all builds need is there.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
OF_SOME_BUILDS = re.compile(
    r"^(nvidia|cuda|triton|pytorch-triton|intel|dpcpp|mkl|onemkl|umf|tcmlib)"
)


def wanted() -> list[str]:
    """Requirements of a server without torch, and torch's own."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    ours = [*project["dependencies"], *project["optional-dependencies"]["shard"]]
    torch = [each for each in metadata.requires("torch") or [] if "extra ==" not in each]
    return [
        requirement
        for requirement in (*ours, *torch)
        if not OF_SOME_BUILDS.match(requirement) and not requirement.startswith("torch")
    ]


def main() -> None:
    """Compile; versions that are locked stay unless a requirement rules them out."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("\n".join(wanted()))
        file.flush()
        command = [sys.executable, "-m", "piptools", "compile", "--generate-hashes", "--quiet"]
        command += ["--allow-unsafe", "--no-header", "--no-annotate", "--strip-extras"]
        command += ["--no-emit-index-url", "--no-emit-trusted-host", "--no-emit-find-links"]
        subprocess.run(
            [*command, "--output-file", HERE / "requirements.lock", file.name], check=True
        )


if __name__ == "__main__":
    main()

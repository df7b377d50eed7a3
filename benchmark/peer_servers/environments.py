"""Side environments for peers, below `build/peers/`: never a dependency of this project."""

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "peers"
TORCH = "torch==2.13.0"  # as in the Makefile: no other build is ever brought in


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment and what is installed into it."""

    name: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()  # removed again: they come built for other hardware
    borrows: bool = False  # sees this environment's packages too, for torch is large

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return FOLDER / self.name / "bin" / "python"

    def install(self) -> None:
        """Make the environment, if it is not there.

        Raises:
            OSError: the packages cannot be installed; the message is pip's last line.
        """
        folder = FOLDER / self.name
        stamp = folder / "installed"
        if stamp.exists() and stamp.read_text() == repr(self.packages):
            return
        print(f"installing {', '.join(self.packages)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        if self.borrows:
            site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
            (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = [self.python, "-m", "pip", "install", "-q", "--only-binary", ":all:"]
        told = subprocess.run([*command, *self.packages], capture_output=True, text=True)
        if told.returncode:
            raise OSError((told.stderr.strip() or "pip failed").splitlines()[-1])
        if self.without:
            command = [self.python, "-m", "pip", "uninstall", "-q", "-y", *self.without]
            subprocess.run(command, check=True)
        stamp.write_text(repr(self.packages))

    def library(self, name: str) -> Path:
        """A shared library that one of the packages brings."""
        return FOLDER / self.name / "lib" / name

    def version(self, package: str) -> str:
        """The version of an installed package."""
        source = f"import importlib.metadata as m; print(m.version({package!r}))"
        command = [self.python, "-c", source]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

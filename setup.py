"""Builds the CPU kernels where torch and a compiler are present; see shard/backends/build.py."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

BACKENDS = Path(__file__).parent / "shard" / "backends"


def build_file() -> ModuleType:
    """shard/backends/build.py, which imports nothing of the package that is being installed."""
    spec = importlib.util.spec_from_file_location("tessera_build", BACKENDS / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_py):
    """Copies the Python files, then builds the kernels next to them.

    Without torch (an isolated build, a router without shards) a line says so and nothing is built.
    """

    def run(self) -> None:
        """Run after the copy; an editable install builds in the source tree."""
        super().run()
        target = BACKENDS if self.editable_mode else self.installed_folder()
        build_file().build_and_tell(target)

    def installed_folder(self) -> Path:
        """Where the wheel is put together."""
        return Path(self.build_lib) / "tessera" / "shard" / "backends"


class WithKernels(Distribution):
    """Tags the wheel with this platform where the kernels can be built."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel holds machine code."""
        return bool(build_file().can_build())


setup(cmdclass={"build_py": BuildKernels}, distclass=WithKernels)

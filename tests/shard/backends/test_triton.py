"""The Triton kernels without a GPU: interpreted they are right, and they compile for Hopper.

Each in a process of its own, with Triton from `triton_environment` (`make triton-env`).
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.shard import backends
from tests.shard.backends import triton_environment

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not triton_environment.installed(), reason=triton_environment.MISSING),
]

SHARED_MEMORY = 227 * 1024  # bytes that a Hopper multiprocessor gives one program
WITH_MATRICES = {"decode", "chunks"}


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=triton_environment.ROOT,
        env=triton_environment.variables(**variables),
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def kernels() -> set[str]:
    """The functions that are launched; names of those that they call begin with a line."""
    files = Path(backends.__file__).parent.glob("triton_*_kernels.py")
    bodies = [statement for file in files for statement in ast.parse(file.read_text()).body]
    names = {body.name for body in bodies if isinstance(body, ast.FunctionDef)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("part", ["test_conformance.py", "triton_cases.py"])
def test_interpreted_kernels_are_right(part: str) -> None:
    path = f"tests/shard/backends/{part}"
    command = ["-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider", path]
    printed = run(*command, TRITON_INTERPRET="1")
    found = re.search(r"(\d+) passed", printed)
    assert found and int(found[1]) > 10
    assert "skipped" not in printed


def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    printed = run("-m", "tests.shard.backends.compile_kernels", TRITON_CACHE_DIR=str(tmp_path))
    compiled = [json.loads(line) for line in printed.splitlines()]
    assert {each["kernel"] for each in compiled} == kernels()
    for each in compiled:
        assert each["cubin"] > 1000
        assert each["shared"] <= SHARED_MEMORY
        assert each["spills"] == 0
        if each["kernel"] in WITH_MATRICES and each["dtype"] != "fp32":
            assert each["matrix_units"]
    # Nothing is compiled for a step because of its lengths: that would hold up those in it.
    usual, other = (
        {(each["kernel"], each["hash"]) for each in compiled if each["stage"] == stage}
        for stage in ("every_kernel", "steps_of_other_sizes")
    )
    assert {name for name, _ in other} == kernels()
    assert other <= usual


def test_a_processor_needs_no_triton() -> None:
    code = (
        "import sys, torch\n"
        "import tessera.shard.main, tessera.shard.warmup\n"
        "from tessera.shard.backends import load_backend\n"
        "load_backend('cpu'), load_backend('cpu', 'reference'), load_backend('auto')\n"
        "assert 'triton' not in sys.modules\n"
    )
    run("-c", code)

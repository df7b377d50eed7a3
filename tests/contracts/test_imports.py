"""Import rules that need a running interpreter. (The static ones are in .importlinter.)"""

import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return set(printed.stdout.split())


@pytest.mark.parametrize("process", ["router", "launcher"])
def test_router_and_launcher_never_load_torch_or_transformers(process: str) -> None:
    loaded = modules_after(f"import tessera.{process}.main")
    assert not loaded & {"torch", "transformers", "numpy"}


def test_a_shard_never_loads_http_or_transformers() -> None:
    loaded = modules_after("import tessera.shard.main, tessera.shard.models")
    assert not loaded & {"starlette", "uvicorn", "httpx", "transformers"}

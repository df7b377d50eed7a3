"""The client libraries the tests run, each set of versions in a virtual environment of its own.

`python -m tests.clients.environments` (or `make client-envs`) makes them all, from PyPI; a test
makes the one it needs. What is there already is left alone.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "client-envs"
MAIN = "main"  # the project's own environment: the newest huggingface_hub and openai
INSTALL_TIMEOUT_S = 500

REQUIREMENTS = {
    "hub-1": ("huggingface_hub==1.33.0", "openai==2.54.0"),
    "hub-0.36": ("huggingface_hub==0.36.2", "openai==1.109.1", "aiohttp==3.14.5"),
    "hub-0.23": ("huggingface_hub==0.23.5", "text-generation==0.7.0"),
    "langchain": ("langchain-huggingface==1.2.3", "langchain-openai==1.7.3"),
    "llama-index": (
        "llama-index-llms-openai-like==0.8.1",
        "llama-index-llms-huggingface-api==0.8.0",
    ),
    "llama-index-0.12": ("llama-index-llms-text-generation-inference==0.3.3",),
}


def interpreter(name: str) -> Path:
    """The Python of an environment, which is made if it is not there as it should be."""
    if name == MAIN:
        return Path(sys.executable)
    folder = FOLDER / name
    stamp = folder / "requirements.txt"
    wanted = "\n".join(REQUIREMENTS[name]) + "\n"
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        _make(folder, python, REQUIREMENTS[name])
        stamp.write_text(wanted)
    return python


def _make(folder: Path, python: Path, requirements: tuple[str, ...]) -> None:
    """Our own pip installs: a pip per environment costs more time than the smallest of them."""
    print(f"==> {folder.relative_to(ROOT)}: {' '.join(requirements)}", flush=True)
    venv = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "install"]
    for command in (venv, [*pip, "--disable-pip-version-check", *requirements]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(interpreter, REQUIREMENTS))

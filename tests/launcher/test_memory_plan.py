"""`tessera-launcher --plan`, and whether its verdict is the warm-up's."""

import json
import socket
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.launcher.capacity import OTHER_BYTES, Load, plan
from tessera.launcher.memory_plan import NOT_ENOUGH, describe, load_of
from tessera.launcher.model_folder import DEMO_FOLDER
from tessera.launcher.settings import Settings
from tessera.shard.backends.build import library_path
from tests.launcher.launched import plain_environ
from tests.launcher.stand_in_hub import TOKEN, Hub, serve

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
NO_HUB = "http://127.0.0.1:9"


def run(*flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tessera.launcher.main", "--plan", *flags]
    environ = plain_environ(DEVICE="cpu") | environ
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=100, check=False
    )


def test_the_demo_model_as_a_table() -> None:
    done = run("--memory", "2g")
    assert (done.returncode, done.stderr) == (0, "")
    assert "tessera-demo: llava_next, 5.1 million parameters in bfloat16, on cpu" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[4:6]] == ["1", "2"]


def test_as_json_with_settings_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "env").write_text("MAX_TOTAL_TOKENS=256\nSHM_SIZE=8g\nMODEL_NAME=any\n")
    flags = ("--json", "--num-shard", "2", "--quantize", "int4")
    done = run(*flags, ENV_FILE=str(tmp_path / "env"), DEVICE="cuda")
    found = json.loads(done.stdout)
    assert (found["total_tokens"], found["device"], found["quantize"]) == (256, "cuda", "int4")
    (only,) = found["shards"]
    assert only["shards"] == 2 and only["fits"] is None and only["needed"] > only["weights"]


def test_too_little_memory_is_an_exit_code() -> None:
    done = run("--memory", "300m")
    assert done.returncode == NOT_ENOUGH and "not enough" in done.stdout


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--memory", "much"], "Error: --memory='much' must be a size such as 64m or 8g.\n"),
        (
            ["--model-id", "/nowhere"],
            "Error: /nowhere has no config.json: it is no model's folder.",
        ),
        (["--num-shard", "5"], "5"),
        (["--dtype", "float16"], "Error: the cpu has no fast float16"),
        (["--port", "http"], "Error: PORT='http' must be a whole number.\n"),
        (["--device", "base"], "Error: DEVICE=base is not known; use auto or one of "),
        (["--backend", "build"], "Error: BACKEND=build is not known; use auto or one of "),
    ],
)
def test_errors_are_one_line(flags: list[str], error: str) -> None:
    done = run(*flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert error in done.stderr and done.stderr.count("\n") == 1


def test_of_a_model_of_the_hub_only_json_is_fetched(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    names = ("config.json", "preprocessor_config.json", "model.safetensors.index.json")
    files = {name: (checkpoint("next-mistral") / name).read_bytes() for name in names}
    hub = Hub(files | {"model.safetensors": b"weights"}, gated=True)
    with serve(hub):
        environ = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
        refused = run("--model-id", "owner/model", **environ)
        assert refused.returncode == 1 and "owner/model is gated: accept" in refused.stderr
        done = run("--model-id", "owner/model", "--json", **environ, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["model_type"] == "llava_next"
    assert not [line for line in hub.requests if "safetensors" in line]
    offline = run("--model-id", "owner/model", "--json", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    away = run("--model-id", "owner/model", "--json", HF_ENDPOINT=NO_HUB, HF_HOME=str(tmp_path))
    assert (offline.stdout, away.stdout) == (done.stdout, done.stdout)


@pytest.mark.parametrize(
    ("environ", "error"),
    [
        (
            {"HF_ENDPOINT": NO_HUB},
            f"Error: cannot reach {NO_HUB}, and owner/model is not completely in {{cache}}; check "
            "the network, or set MODEL_ID to a local folder.\n",
        ),
        (
            {"HF_HUB_OFFLINE": "1"},
            "Error: owner/model is not completely in {cache} and HF_HUB_OFFLINE forbids to fetch "
            "it; unset that, or set MODEL_ID to a local folder.\n",
        ),
    ],
    ids=["no network", "offline"],
)
def test_without_a_network_it_says_so_at_once(
    tmp_path: Path, environ: dict[str, str], error: str
) -> None:
    """The library's own client tries again for 23 s and prints a line each time."""
    done = run("--model-id", "owner/model", HF_HOME=str(tmp_path), **environ)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == error.format(cache=tmp_path / "hub")


def test_a_hub_that_is_silent_is_not_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = run("--model-id", "owner/model", HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
    assert done.stderr.startswith(f"Error: cannot reach {endpoint}, and owner/model is not")
    assert done.stderr.count("\n") == 1


def test_what_the_hub_has_must_be_a_model(tmp_path: Path) -> None:
    with serve(Hub({"README.md": b"words"})) as hub:
        environ = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
        done = run("--model-id", "owner/model", **environ)
        unknown = run("--model-id", "owner/modle", **environ)
    assert done.stderr == "Error: owner/model has no config.json: it is no model's folder.\n"
    assert unknown.stderr.startswith(f"Error: {hub.endpoint} has no model owner/modle")


@pytest.mark.skipif(
    not library_path().exists(), reason="the reference's attention takes more than the kernels'"
)
@pytest.mark.parametrize(
    "flags",
    [
        ["--max-total-tokens", "2048"],
        ["--max-batch-prefill-tokens", "100000"],
        ["--max-batch-prefill-tokens", "50000", "--cuda-memory-fraction", "0.5"],
    ],
    ids=" ".join,
)
def test_the_verdict_is_the_warm_ups(flags: list[str]) -> None:
    """A real warm-up refuses a third less memory than the plan asks for, and starts with a third
    more. Most of it is the largest step in all but the first case."""
    settings = Settings.read(["--device", "cpu", *flags], {})
    (found,) = describe(DEMO_FOLDER, "cpu", settings, [1])
    load = load_of(settings)
    enough = bisect_left(range(2 * GIB), True, key=lambda memory: fits(found, load, memory))
    assert 0 < enough < 2 * GIB
    of_shard = enough - OTHER_BYTES["cpu"]
    assert [warmed_up(of_shard * share // 3, *flags) for share in (4, 2)] == ["starts", "refuses"]


def fits(footprint: dict[str, Any], load: Load, memory: int) -> bool:
    return bool(plan(footprint, "cpu", load, memory).fits)


def warmed_up(memory: int, *flags: str) -> str:
    command = [sys.executable, "-m", "tests.launcher.limited_warmup", str(memory), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, check=True, cwd=ROOT
    )
    return done.stdout.strip()

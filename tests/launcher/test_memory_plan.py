"""`tessera-launcher --plan`, and whether its verdict is the warm-up's."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.launcher.capacity import plan
from tessera.launcher.memory_plan import NOT_ENOUGH, describe, load_of
from tessera.launcher.model_folder import DEMO_FOLDER
from tessera.launcher.settings import Settings
from tessera.proto.image_layout import layout_from_config
from tessera.router.limits import warmup_request
from tessera.router.model_files import ModelFiles
from tessera.router.shards import ShardsInfo
from tessera.shard.backends import load_backend
from tessera.shard.engine import Engine
from tessera.shard.errors import DeviceError
from tessera.shard.models import load_model
from tessera.shard.models.base import Placement
from tessera.shard.models.config_file import read_config
from tessera.shard.models.dtype import resolve_dtype
from tessera.shard.parallel import Group
from tessera.shard.warmup import warm_up
from tests.launcher.launched import plain_environ
from tests.launcher.stand_in_hub import TOKEN, Hub, serve

GIB = 1 << 30


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
        assert refused.returncode == 1 and "check MODEL_ID, HF_TOKEN and" in refused.stderr
        done = run("--model-id", "owner/model", "--json", **environ, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "llava_next"
    assert not [line for line in hub.requests if "safetensors" in line]
    offline = run("--model-id", "owner/model", "--json", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert offline.stdout == done.stdout


class LimitedBackend:
    """A host that has so much memory left."""

    def __init__(self) -> None:
        self._backend = load_backend("cpu", "auto")
        self.free = GIB

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def free_memory_bytes(self) -> int:
        return self.free


class DemoShard:
    """The demo model, loaded and warmed up once: what libraries keep for good is there."""

    def __init__(self, settings: Settings) -> None:
        self._config = read_config(DEMO_FOLDER)
        self._backend = LimitedBackend()
        dtype = resolve_dtype("auto", self._config, "cpu")
        placement = Placement(self._backend, Group(), dtype)  # type: ignore[arg-type]
        model = load_model(DEMO_FOLDER, placement)
        self._engine = Engine(model, placement, settings.shard.block_size)
        self._settings = settings
        assert self.starts(GIB)

    def starts(self, free: int) -> bool:
        """What the warm-up says to so much memory beside the loaded model."""
        self._backend.free = free
        settings = self._settings
        info = ShardsInfo("llava_next", "bfloat16", "cpu", "cpu", settings.shard.block_size, 832, 1)
        request = warmup_request(settings.router, info, ModelFiles.read(DEMO_FOLDER))
        fraction, layout = settings.shard.cuda_memory_fraction, layout_from_config(self._config)
        try:
            reply = warm_up(self._engine, request, fraction, layout)
        except DeviceError as e:
            print(free, e)
            return False
        print(free, reply)
        return True


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--max-total-tokens", "2048"],
        ["--max-batch-prefill-tokens", "16384", "--vision-cache-tokens", "1000"],
        ["--max-step-tiles", "40", "--vision-cache-tokens", "1000"],
        ["--cuda-memory-fraction", "0.5", "--max-total-tokens", "1024"],
    ],
    ids=" ".join,
)
def test_the_verdict_is_the_warm_ups(flags: list[str]) -> None:
    """With a fifth more than the plan needs to start it does, with a fifth less it does not."""
    settings = Settings.read(["--device", "cpu", *flags], {})
    (found,) = describe(DEMO_FOLDER, "cpu", settings, [1])
    load = load_of(settings)
    held = plan(found, "cpu", load, None)
    beside = held.weights + held.process

    def fits(free: int) -> bool | None:
        return plan(found, "cpu", load, beside + free).fits

    least, most = 0, GIB  # bytes free beside the loaded model, between which the verdict changes
    while most - least > 1024:
        middle = (least + most) // 2
        least, most = (least, middle) if fits(middle) else (middle, most)
    shard = DemoShard(settings)
    a,b= shard.starts(most * 6 // 5) , not shard.starts(most * 4 // 5)
    print(held.step)
    assert a and b

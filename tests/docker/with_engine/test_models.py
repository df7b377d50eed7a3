"""Models in containers: from a hub that fails half-way, from the cache alone, and as planned."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.launcher.model_folder import DEMO_FOLDER
from tests.clients.expectations import is_three
from tests.docker.container import HARDENED, started
from tests.docker.engine import ROOT, Engine
from tests.launcher.stand_in_hub import TOKEN, Hub, serve

pytestmark = pytest.mark.timeout(1200)  # the first one builds the image

MIB = 1 << 20
PICTURE = base64.b64encode((ROOT / "launcher/demo/picture.png").read_bytes()).decode()
QUESTION = f"<image>{PICTURE}</image>\nHow many shapes are there?"
MODEL = ("--env=MODEL_ID=owner/model", f"--env=HF_TOKEN={TOKEN}")


@pytest.fixture
def hub(engine: Engine) -> Iterator[Hub]:
    """The demo model behind a token; its weights break off once."""
    files = {path.name: path.read_bytes() for path in DEMO_FOLDER.iterdir()}
    (bridge,) = json.loads(engine.run("network", "inspect", "bridge"))
    served = Hub(files, gated=True, break_after=MIB)
    with serve(served, bridge["IPAM"]["Config"][0]["Gateway"]) as hub:
        yield hub


@pytest.fixture
def volume(engine: Engine) -> Iterator[str]:
    name = engine.run("volume", "create")
    yield f"--volume={name}:/data"
    engine.run("volume", "rm", "--force", name)


def test_a_download_that_breaks_then_the_cache_alone(
    engine: Engine, image: str, hub: Hub, volume: str
) -> None:
    there = f"--env=HF_ENDPOINT={hub.endpoint}"
    with started(engine, image, *HARDENED, volume, there, *MODEL) as container:
        container.wait_ready()
        assert "downloading owner/model: " in container.log
        assert "downloaded owner/model in " in container.log and TOKEN not in container.log
        assert hub.break_after is None  # it has broken off
        assert is_three(container.generate(QUESTION, max_new_tokens=20))
    hub.requests.clear()
    offline = ("--network=none", "--env=HF_HUB_OFFLINE=1", "--env=MODEL_ID=owner/model")
    with started(engine, image, *HARDENED, volume, *offline) as container:
        container.wait_ready()
        assert "downloading" not in container.log and not hub.requests


def test_a_refused_download_is_a_sentence(
    engine: Engine, image: str, hub: Hub, volume: str
) -> None:
    there = (f"--env=HF_ENDPOINT={hub.endpoint}", "--env=MODEL_ID=owner/model")
    with started(engine, image, *HARDENED, volume, *there) as container:
        assert container.wait_exit() == 1
        assert "owner/model is gated: accept its terms" in container.log
        assert "Traceback" not in container.log


def test_a_folder_that_cannot_be_written_to_is_a_sentence(
    engine: Engine, image: str, hub: Hub, tmp_path: Path
) -> None:
    there = (f"--env=HF_ENDPOINT={hub.endpoint}", *MODEL, f"--volume={tmp_path}:/data")
    tmp_path.chmod(0o755)
    with started(engine, image, *HARDENED, *there) as container:
        assert container.wait_exit() == 1
        assert "cannot write to /data" in container.log and "--user" in container.log
    tmp_path.chmod(0o700)
    with started(engine, image, *HARDENED, "--user=0:0", *there) as container:
        container.wait_ready()


@pytest.mark.parametrize(("share", "is_enough"), [(1.05, True), (0.6, False)])
def test_the_memory_that_the_plan_names_is_enough(
    engine: Engine, image: str, share: float, is_enough: bool
) -> None:
    flags = ("--max-total-tokens=2048", "--max-batch-prefill-tokens=60000", "--num-shard=1")
    told = engine.run("run", "--rm", image, "--plan", "--json", *flags)
    memory = int(share * json.loads(told)["shards"][0]["needed"])
    limits = (f"--memory={memory}", f"--memory-swap={memory}")
    with started(engine, image, *limits, flags=flags) as container:
        if is_enough:
            container.wait_ready()
            assert is_three(container.generate(QUESTION, max_new_tokens=20))
        else:
            # The warm-up says so, or whoever sees first that the largest step was killed for it.
            assert container.wait_exit() == 1
            assert "Error: " in container.log and "ready: " not in container.log

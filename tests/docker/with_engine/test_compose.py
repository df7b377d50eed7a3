"""docker/compose.yaml with the environment file of a text-generation-inference deployment."""

import base64
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient

from tessera.launcher.model_folder import DEMO_FOLDER
from tests.clients.expectations import is_three
from tests.docker.compose import TGI_ENV, Project, ensure_images, up
from tests.docker.container import streamed
from tests.docker.engine import ROOT, Engine
from tests.launcher.stand_in_hub import Hub, serve
from tests.operations.monitoring import Prometheus, free_port, wait_for

pytestmark = pytest.mark.timeout(1200)  # the first one builds images

MODEL_NAME = "llava-v1.6-mistral-7b-hf-tgi"
SERVICES = ["proxy", "prometheus", "alertmanager"]
KEY = "sesame"
PICTURE = base64.b64encode((ROOT / "launcher/demo/picture.png").read_bytes()).decode()
QUESTION = f"<image>{PICTURE}</image>\nHow many shapes are there?"


@pytest.fixture(scope="module")
def hub(engine: Engine) -> Iterator[Hub]:
    """Has the demo model under the name of the environment file's, with as many positions."""
    files = {path.name: path.read_bytes() for path in DEMO_FOLDER.iterdir()}
    config = json.loads(files["config.json"])
    config["text_config"]["max_position_embeddings"] = 4096
    files["config.json"] = json.dumps(config).encode()
    (bridge,) = json.loads(engine.run("network", "inspect", "bridge"))
    served = Hub(files, name="llava-hf/llava-v1.6-mistral-7b-hf")
    with serve(served, bridge["IPAM"]["Config"][0]["Gateway"]) as hub:
        yield hub


@pytest.fixture(scope="module")
def ports() -> dict[str, str]:
    names = ("HTTP_PORT", "PROMETHEUS_HTTP_PORT", "ALERTMANAGER_HTTP_PORT")
    return {name: str(free_port()) for name in names}


@pytest.fixture(scope="module")
def project(engine: Engine, image: str, hub: Hub, ports: dict[str, str]) -> Iterator[Project]:
    ensure_images(engine, SERVICES)
    more = {"IMAGE": image, "HF_ENDPOINT": hub.endpoint, "NETWORK": "tessera-test"}
    made = Project(engine, "tessera-test", TGI_ENV, ports | more)
    with up(made, "cpu", *SERVICES):
        yield made


@pytest.fixture(scope="module")
def url(project: Project) -> str:
    """Where the proxy answers, once the model does."""
    url = f"http://127.0.0.1:{project.variables['HTTP_PORT']}"
    wait_for("the server", lambda: status(f"{url}/health") == 200, 110)
    return url


def status(url: str) -> int:
    try:
        return httpx.get(url, timeout=10).status_code
    except httpx.TransportError:
        return 0


@pytest.mark.parametrize("profile", ["cpu", "cuda", "xpu"])
def test_the_file_is_one_with_every_profile(profile: str, engine: Engine) -> None:
    project = Project(engine, "tessera-test", TGI_ENV, {"IMAGE": ""})
    described = project.run("--profile", profile, "config")
    assert f"image: tessera:{profile}" in described


def test_the_environment_files_settings_arrive(url: str) -> None:
    told = httpx.get(f"{url}/info").json()
    assert told["model_id"] == "llava-hf/llava-v1.6-mistral-7b-hf"
    assert (told["max_total_tokens"], told["max_input_tokens"]) == (4096, 2048)
    assert told["max_batch_size"] == 4


def test_shared_memory_is_as_large_as_the_file_says(project: Project, url: str) -> None:
    server = project.container("cpu")
    assert project.engine.inspect(server)["HostConfig"]["ShmSize"] == 8 << 30
    log = project.engine.run("logs", server)
    assert "shared memory" not in log and "MODEL_NAME" not in log and "TGI_VERSION" not in log


@pytest.mark.parametrize("path", ["", f"/{MODEL_NAME}"], ids=["first", "by name"])
def test_a_question_about_a_picture(url: str, path: str) -> None:
    client = InferenceClient(f"{url}{path}")
    assert is_three(client.text_generation(QUESTION, max_new_tokens=20))
    pieces = streamed(f"{url}{path}", QUESTION)
    assert len(pieces) > 1 and is_three("".join(pieces))
    assert httpx.get(f"{url}{path}/v1/models").json()["data"]


def test_names_of_nobody(url: str) -> None:
    told = httpx.get(f"{url}/nobody/generate")
    assert (told.status_code, told.json()["error_type"]) == (503, "unavailable")
    assert told.headers["retry-after"] and "MODEL_NAME" in told.json()["error"]
    assert httpx.get(f"{url}/%2e%2e/x").status_code in (400, 404, 503)


def test_prometheus_scrapes_every_server(project: Project, url: str) -> None:
    prometheus = Prometheus(f"http://127.0.0.1:{project.variables['PROMETHEUS_HTTP_PORT']}")
    wait_for("prometheus", lambda: status(f"{prometheus.url}/-/ready") == 200, 60)
    wait_for("a scrape", lambda: prometheus.value("up") == 1, 60)
    assert prometheus.value("tgi_request_count") >= 0
    alertmanagers = httpx.get(f"{prometheus.url}/api/v1/alertmanagers").json()["data"]
    assert len(alertmanagers["activeAlertmanagers"]) == 1
    rules = httpx.get(f"{prometheus.url}/api/v1/rules").json()["data"]["groups"]
    assert rules and all(rule["health"] in ("ok", "unknown") for rule in rules[0]["rules"])


def test_an_address_that_asks_too_often_is_told_to_wait(url: str) -> None:
    def ask(number: int) -> list[httpx.Response]:
        with httpx.Client(
            timeout=10
        ) as client:  # threads that share one close each other's sockets
            return [client.get(f"{url}/health") for _ in range(number)]

    with ThreadPoolExecutor(8) as pool:
        told = list(chain.from_iterable(pool.map(ask, [20] * 8)))
    counts = Counter(reply.status_code for reply in told)
    assert counts[200] >= 40 and counts[429] > 0 and set(counts) == {200, 429}
    refused: Any = next(reply for reply in told if reply.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error_type"] == "overloaded"
    wait_for("forgiveness", lambda: status(f"{url}/health") == 200, 20)


def test_a_second_model_behind_the_same_port(project: Project, url: str) -> None:
    """With a key, under the name that text-generation-inference's proxies had for it."""
    more = {"VALID_TOKEN": KEY}
    demo = ROOT / "docker" / "models" / "demo.env"
    second = Project(project.engine, "tessera-second", demo, {**project.variables, **more})
    with up(second, "cpu", ending=("rm", "--stop", "--force", "-v")):
        wait_for("it", lambda: status(f"{url}/tessera-demo/health") == 200, 110)
        assert status(f"{url}/tessera-demo/info") == 401
        client = InferenceClient(f"{url}/tessera-demo", headers={"Authorization": f"Bearer {KEY}"})
        assert is_three(client.text_generation(QUESTION, max_new_tokens=20))
        assert httpx.get(f"{url}/info").json()["model_id"].startswith("llava-hf/")


def test_stopping_it_is_clean(project: Project, url: str) -> None:
    server = project.container("cpu")
    project.run("stop", "cpu")
    assert project.engine.inspect(server)["State"]["ExitCode"] == 0
    assert status(f"{url}/health") == 503

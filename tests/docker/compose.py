"""docker/compose.yaml on the tests' engine, with images that are here."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.docker.build import BASE, secrets
from tests.docker.engine import ROOT, Engine, ensure_image

FILE = ROOT / "docker" / "compose.yaml"
TGI_ENV = Path(__file__).with_name("tgi.env")  # of a deployment of text-generation-inference
STAND_INS = Path(__file__).with_name("stand_ins")
TIMEOUT_S = 120


@dataclass(frozen=True)
class Project:
    """One project of the file, with its environment file and variables."""

    engine: Engine
    name: str
    env_file: Path
    variables: Mapping[str, str]

    def run(self, *arguments: str) -> str:
        """What a compose command prints."""
        command = [*compose_command(), "-f", str(FILE), "-p", self.name]
        command += ["--env-file", str(self.env_file), "--profile", "cpu", *arguments]
        done = subprocess.run(
            command,
            env=self.engine.environ | self.variables,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def container(self, service: str) -> str:
        """The id of the container of a service."""
        return self.run("ps", "-q", service)


@contextlib.contextmanager
def up(
    project: Project, *services: str, ending: Sequence[str] = ("down", "--volumes")
) -> Iterator[Project]:
    """These services started, without others; gone after the command `ending`."""
    try:
        project.run("up", "-d", "--no-build", "--no-deps", *services)
        yield project
    finally:
        project.run(*ending)


def compose_command() -> list[str]:
    """Debian's docker-compose, else the client's plugin."""
    if found := shutil.which("docker-compose"):
        return [found]
    client = shutil.which("docker")
    if (
        client
        and subprocess.run([client, "compose", "version"], capture_output=True).returncode == 0
    ):
        return [client, "compose"]
    pytest.skip("NO COMPOSE: neither docker-compose nor docker's compose plugin is installed")


def ensure_images(engine: Engine, services: list[str]) -> None:
    """The images that services name: here, pulled, or Debian's packages instead."""
    described = yaml.safe_load(FILE.read_text())["services"]
    names = {"proxy": "nginx"}
    for service in services:
        image = described[service]["image"]
        if engine.has_image(image) or engine.try_run("pull", image, timeout=600).returncode == 0:
            continue
        ensure_image(engine, BASE)
        target = f"--target={names.get(service, service)}"
        build = ("build", "--network=host", f"--build-arg=BASE_IMAGE={BASE}", target)
        engine.run(*build, *secrets(), f"--tag={image}", str(STAND_INS), timeout=600)

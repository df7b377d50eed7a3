"""`make test-docker` runs what is in `with_engine/`: it needs root, a Docker engine and minutes."""

import os
from collections.abc import Iterator

import pytest

from tests.docker.build import IMAGE, build_image
from tests.docker.container import HARDENED, Container, started
from tests.docker.engine import Engine, NoEngine, running_engine

collect_ignore = [] if os.environ.get("TEST_DOCKER") else ["with_engine"]


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    try:
        running = running_engine()
        found = running.__enter__()
    except NoEngine as reason:
        pytest.skip(f"NO DOCKER: {reason}")
    try:
        yield found
    finally:
        running.__exit__(None, None, None)


@pytest.fixture(scope="session")
def image(engine: Engine) -> str:
    """The CPU image, built as README says; or IMAGE, which is there."""
    if there := os.environ.get("IMAGE"):
        return there
    try:
        build_image(engine, "Dockerfile.cpu", IMAGE)
    except NoEngine as reason:
        pytest.skip(f"NO DOCKER: {reason}")
    return IMAGE


@pytest.fixture(scope="module")
def server(engine: Engine, image: str) -> Iterator[Container]:
    """The demo model in a container that may do next to nothing."""
    with started(engine, image, *HARDENED) as container:
        container.wait_ready()
        yield container

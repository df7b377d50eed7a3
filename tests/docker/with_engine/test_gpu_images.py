"""The images for GPUs, which take many minutes: `make test-docker IMAGES=all`."""

import os

import pytest

from tests.docker.build import BASE, IMAGE, build_image
from tests.docker.engine import Engine

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("IMAGES") != "all", reason="NOT BUILT: `make test-docker IMAGES=all`"
    ),
]


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_images_for_gpus_are_built_like_this_one(engine: Engine, image: str, kind: str) -> None:
    """On the same base, with the same torch: what is the project's in them, nothing of a vendor."""
    base = f"--build-arg=BASE_IMAGE={BASE}"
    build_image(engine, f"Dockerfile.{kind}", f"{IMAGE}-{kind}", base)
    asked = engine.try_run("run", "--rm", f"{IMAGE}-{kind}")
    assert asked.returncode == 1 and f"DEVICE={kind} but this machine shows no" in asked.stderr
    compiler = engine.run("run", "--rm", "--entrypoint=gcc", f"{IMAGE}-{kind}", "--version")
    assert "gcc" in compiler  # for Triton

"""The numbers that README states can be measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docker.engine import ROOT, Engine

pytestmark = pytest.mark.timeout(1200)  # the first one builds the image


def test_size_and_start_are_measured(engine: Engine, image: str, tmp_path: Path) -> None:
    out = tmp_path / "docker.json"
    command = [sys.executable, "-m", "benchmark.docker_image", image, "--runs", "1"]
    subprocess.run([*command, "--out", out], env=engine.environ, cwd=ROOT, check=True, timeout=200)
    found = json.loads(out.read_text())
    committed = json.loads((ROOT / "benchmark" / "results" / "docker.json").read_text())
    assert found.keys() == committed.keys()
    assert 0 < found["above_base_mb"] < found["image_mb"]
    assert found["start_s"]["median"] > 0 and found["flags"] == committed["flags"]

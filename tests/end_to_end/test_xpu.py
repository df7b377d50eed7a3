"""DEVICE=xpu where there is no usable Intel GPU: one sentence, and never the processor instead."""

import os
import subprocess
import sys

import pytest
import torch

TIMEOUT_S = 60
LAUNCHER = (sys.executable, "-m", "tessera.launcher.main", "--hostname", "127.0.0.1", "--port", "0")
NO_GPU = (
    "Error: DEVICE=xpu but this machine shows no xpu device; check the driver and the container's "
    "device flags, or set DEVICE=cpu."
)
NO_USE = (
    "Error: shard 0 ended with exit code 1: device 'xpu:0' is not available: torch "
    f"{torch.__version__} finds none here; check the driver and the torch build, or set the device "
    "to cpu"
)


@pytest.mark.parametrize(("visible", "sentence"), [("", NO_GPU), ("0", NO_USE)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_it_is_one_sentence(visible: str, sentence: str, backend: str) -> None:
    told = {"DEVICE": "xpu", "BACKEND": backend, "ZE_AFFINITY_MASK": visible}
    done = subprocess.run(
        LAUNCHER, env={**os.environ, **told}, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [sentence]
    assert "Traceback" not in done.stdout
    assert " on cpu" not in done.stdout and "ready:" not in done.stdout

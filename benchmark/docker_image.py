"""How large an image of the server is and how fast a container of it starts, with the demo model.

    python -m benchmark.docker_image tessera --out benchmark/results/docker.json

Asks the Docker engine that `docker` on this machine talks to.
"""

import argparse
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmark.results_file import provenance, write_json

LIMITS = (
    *("--read-only", "--tmpfs=/tmp", "--user=10001", "--cap-drop=ALL"),
    *("--shm-size=64m", "--memory=2g"),
)
START_TIMEOUT_S = 120.0
PAUSE_S = 0.02  # between looks: the resolution of what is measured


def docker(*arguments: str) -> str:
    """What a docker command prints."""
    client = shutil.which("docker")
    if client is None:
        raise SystemExit("docker is not installed")
    command = [client, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def sizes(image: str) -> dict[str, float]:
    """MB of the image and of what lies above its base, as they are on disk."""
    total = int(docker("image", "inspect", "--format={{.Size}}", image))
    layers = docker("history", "--no-trunc", "--human=false", "--format={{json .}}", image)
    # From the newest on; the last stage begins with an ARG.
    ours = 0
    for line in layers.splitlines():
        layer = json.loads(line)
        if "ARG VERSION=" in layer["CreatedBy"]:
            break
        ours += int(layer["Size"])
    return {"image_mb": round(total / 1e6, 1), "above_base_mb": round(ours / 1e6, 1)}


def start(image: str, limits: Sequence[str]) -> dict[str, float]:
    """Seconds from `docker run` until /health answers 200, and those of `docker stop`."""
    begun = time.monotonic()
    name = docker("run", "--detach", "--publish=127.0.0.1::80", *limits, image)
    try:
        url = f"http://{docker('port', name, '80').splitlines()[0]}/health"
        while not healthy(url):
            if time.monotonic() - begun > START_TIMEOUT_S:
                raise SystemExit(docker("logs", name))
            time.sleep(PAUSE_S)
        seconds = time.monotonic() - begun
        stopped = time.monotonic()
        docker("stop", "--time=30", name)
        return {"start_s": seconds, "stop_s": time.monotonic() - stopped}
    finally:
        docker("rm", "--force", "--volumes", name)


def healthy(url: str) -> bool:
    """Whether the server answers, ready."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    runs = [start(given.image, LIMITS) for _ in range(given.runs)]
    report: dict[str, Any] = provenance() | {
        "engine": docker("version", "--format={{.Server.Version}}"),
        "flags": " ".join(LIMITS),
        **sizes(given.image),
    }
    for name in ("start_s", "stop_s"):
        found = [run[name] for run in runs]
        report[name] = {"median": round(median(found), 2), "runs": [round(x, 2) for x in found]}
    if given.out:
        write_json(given.out, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

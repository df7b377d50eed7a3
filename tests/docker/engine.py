"""A Docker engine for tests: the one that runs here, else a private one in build/docker.

The private one touches nothing of the machine's: its own socket, folder, bridge and no firewall
rules. Containers reach each other and the ports they publish, and nothing outside; builds share
the host's network. Its images are in memory, where they are written and removed in no time; with
an engine of one's own they stay, and a second run builds from its cache.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "docker"
BRIDGE = "172.31.249.1/24"
POOL = "base=172.31.128.0/18,size=24"
START_TIMEOUT_S = 30
BASE_PACKAGES = "ca-certificates,python3,python3-pip,python3-venv"
STORE, STORE_GIB = FOLDER / "data", 10  # three are used
SUITE = "bookworm"
WASTE = (
    *("var/cache/apt/archives", "var/lib/apt/lists"),
    *("usr/share/doc", "usr/share/man", "usr/share/locale"),
)
LABEL = "tessera.test"  # of every container that a test starts


class NoEngine(Exception):
    """Why there is none, as a sentence."""


@dataclass(frozen=True)
class Engine:
    """A client of a running engine."""

    client: str
    environ: dict[str, str] = field(repr=False)

    def run(self, *arguments: str, timeout: float = 120) -> str:
        """What a docker command prints to stdout; its stderr is in the failure."""
        done = self.try_run(*arguments, timeout=timeout)
        assert done.returncode == 0, f"docker {arguments}: {done.stderr[-4000:]}"
        return done.stdout.strip()

    def try_run(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """A docker command that may fail."""
        command = [self.client, *arguments]
        return subprocess.run(
            command, env=self.environ, capture_output=True, text=True, timeout=timeout, check=False
        )

    def inspect(self, name: str) -> dict[str, Any]:
        """The engine's description of a container or an image."""
        described: list[dict[str, Any]] = json.loads(self.run("inspect", name))
        return described[0]

    def has_image(self, name: str) -> bool:
        """Whether an image is there."""
        return self.try_run("image", "inspect", name).returncode == 0


@contextlib.contextmanager
def running_engine() -> Iterator[Engine]:
    """An engine; a private one ends with the block, and so do the tests' containers.

    Raises:
        NoEngine: this machine has none and can start none.
    """
    engine = Engine(_client(), _environ())
    with contextlib.ExitStack() as stack:
        if not _answers(engine):
            private = {"DOCKER_HOST": f"unix://{FOLDER}/docker.sock"}
            engine = Engine(engine.client, engine.environ | private)
            stack.enter_context(_private_engine(engine))
        stack.callback(_tidy, engine)
        yield engine


def ensure_image(engine: Engine, name: str) -> None:
    """The base image: there already, pulled, or made of Debian's packages."""
    if engine.has_image(name) or engine.try_run("pull", name, timeout=600).returncode == 0:
        return
    rootfs = FOLDER / "rootfs"
    if not (rootfs / "usr/bin/pip3").exists():
        if shutil.which("debootstrap") is None:
            raise NoEngine(f"{name} cannot be pulled, and debootstrap is not installed")
        shutil.rmtree(rootfs, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, rootfs]
        subprocess.run([*command, *_mirror()], check=True, capture_output=True, timeout=500)
        for waste in WASTE:
            shutil.rmtree(rootfs / waste, ignore_errors=True)
            (rootfs / waste).mkdir()
    packed = subprocess.Popen(["tar", "-C", rootfs, "-c", "."], stdout=subprocess.PIPE)
    command = [engine.client, "import", "-", name]
    subprocess.run(
        command, stdin=packed.stdout, env=engine.environ, check=True, capture_output=True
    )
    assert packed.wait() == 0


def _mirror() -> list[str]:
    """The address that this machine's apt has the packages from; empty: debootstrap's own."""
    wanted = ("Created-By: Packages", "Component: main", f"Codename: {SUITE}")
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return told.stdout.splitlines()[:1]


def _client() -> str:
    """Debian's client has BuildKit inside; others need a plugin for it."""
    debian = Path("/usr/bin/docker")
    found = str(debian) if debian.exists() else shutil.which("docker")
    if found is None:
        raise NoEngine("docker is not installed (Debian's package is docker.io)")
    return found


def _environ() -> dict[str, str]:
    config = FOLDER / "config"  # not the user's, which may name helpers and contexts
    config.mkdir(parents=True, exist_ok=True)
    return os.environ | {"DOCKER_BUILDKIT": "1", "DOCKER_CONFIG": str(config)}


def _answers(engine: Engine) -> bool:
    return engine.try_run("info").returncode == 0


@contextlib.contextmanager
def _private_engine(engine: Engine) -> Iterator[None]:
    daemon = shutil.which("dockerd")
    if daemon is None or os.getuid() != 0:
        raise NoEngine("no Docker engine answers, and starting one takes root and dockerd")
    with (FOLDER / "lock").open("w") as lock, (FOLDER / "dockerd.log").open("w") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two would fight for the bridge and the images
        _mount_store()
        folders = ("--data-root", str(STORE), "--exec-root", str(FOLDER / "run"))
        network = ("--bip", BRIDGE, "--default-address-pool", POOL, "--iptables=false")
        closed = ("--ip6tables=false", "--ip-forward=false", "--ip-masq=false")
        place = ("--host", engine.environ["DOCKER_HOST"], "--pidfile", str(FOLDER / "docker.pid"))
        process = subprocess.Popen(
            [daemon, *place, *folders, *network, *closed], stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _answers(engine):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise NoEngine(f"dockerd does not start; see {log.name}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            process.wait(60)
            _unmount_store()
            subprocess.run(["ip", "link", "delete", "docker0"], capture_output=True, check=False)


def _mount_store() -> None:
    _unmount_store()
    STORE.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={STORE_GIB}g", "tmpfs", STORE]
    if subprocess.run(command, check=False).returncode != 0:
        raise NoEngine("root may not mount a file system here, so no engine can run")


def _unmount_store() -> None:
    """The store, and what a killed engine has left mounted in it."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in reversed(mounts):
        if Path(place).is_relative_to(FOLDER):
            subprocess.run(["umount", "--lazy", place], capture_output=True, check=False)


def _tidy(engine: Engine) -> None:
    """Remove the tests' containers, and earlier builds of their images."""
    names = engine.run("ps", "-aq", "--filter", f"label={LABEL}").split()
    if names:
        engine.run("rm", "-f", "-v", *names)
    engine.run("image", "prune", "-f", "--filter", "label=org.opencontainers.image.title=tessera")

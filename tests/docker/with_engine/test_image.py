"""The image as people run it: locked down, stopped, with and without --init, by any user."""

import base64
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from huggingface_hub import InferenceClient

from tests.clients.expectations import is_three
from tests.docker.build import SECRET_MARK
from tests.docker.container import HARDENED, Container, started, streamed
from tests.docker.engine import ROOT, Engine

pytestmark = pytest.mark.timeout(1200)  # the first one builds the image

PICTURE = base64.b64encode((ROOT / "launcher/demo/picture.png").read_bytes()).decode()
NUM_STREAMS, LENGTH = 6, 400
QUESTION = f"<image>{PICTURE}</image>\nHow many shapes are there?"


def test_a_question_about_a_picture(server: Container) -> None:
    client = InferenceClient(server.url)
    assert is_three(client.text_generation(QUESTION, max_new_tokens=20))


def test_a_stream(server: Container) -> None:
    pieces = streamed(server.url, QUESTION)
    assert len(pieces) > 1 and is_three("".join(pieces))


def test_the_healthcheck_sees_it(server: Container) -> None:
    server.wait_healthy()
    asked = server.engine.try_run("exec", server.name, "tessera-health")
    assert (asked.returncode, asked.stderr) == (0, "")


def test_nothing_of_the_container_is_warned_about(server: Container) -> None:
    assert "WARN" not in server.log and "listening on" not in server.log


def test_the_kernels_are_in_the_image(engine: Engine, image: str) -> None:
    program = "from tessera.shard.backends import cpu; print(*cpu.kernel_variants())"
    assert "portable" in engine.run("run", "--rm", "--entrypoint=python", image, "-c", program)


def test_what_the_image_says_of_itself(engine: Engine, image: str) -> None:
    config = engine.inspect(image)["Config"]
    assert config["User"] == "10001:10001" and config["ExposedPorts"] == {"80/tcp": {}}
    assert {"PORT=80", "HF_HOME=/data"} <= set(config["Env"])
    assert config["Healthcheck"]["Test"] == ["CMD", "tessera-health"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "tessera"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_no_tools_and_no_secrets_stay_behind(engine: Engine, image: str) -> None:
    absent = "! command -v g++ && ! test -s /etc/pip.conf && ! test -e /run/secrets"
    script = f"{absent} && ls /opt/tessera/bin"
    tools = engine.run("run", "--rm", "--entrypoint=sh", image, "-c", script).split()
    assert "tessera-launcher" in tools and "pip" not in tools
    assert SECRET_MARK not in json.dumps(engine.inspect(image))
    assert SECRET_MARK not in engine.run("history", "--no-trunc", image)
    found = f"grep -rls {SECRET_MARK} /etc /opt/tessera/pyvenv.cfg /run /tmp /data /root; true"
    assert engine.run("run", "--rm", "--user=0", "--entrypoint=sh", image, "-c", found) == ""


@pytest.mark.parametrize("init", [(), ("--init",)], ids=["as process 1", "under --init"])
def test_a_stop_loses_no_request(engine: Engine, image: str, init: tuple[str, ...]) -> None:
    with started(engine, image, *HARDENED, *init) as container:
        container.wait_ready()
        begun = threading.Barrier(NUM_STREAMS + 1)
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            streams = [pool.submit(long_stream, container.url, begun) for _ in range(NUM_STREAMS)]
            begun.wait(60)
            engine.run("stop", "-t", "60", container.name)
            assert [stream.result() for stream in streams] == ["red " * LENGTH] * NUM_STREAMS
        assert container.exit_code == 0, container.log


def long_stream(url: str, begun: threading.Barrier) -> str:
    """The whole answer of a stream that has begun when all have."""
    grammar = {"type": "regex", "value": f"(red ){{{LENGTH}}}"}
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 2000, "grammar": grammar}}
    with httpx.stream("POST", f"{url}/generate_stream", json=body, timeout=60) as reply:
        events = (line for line in reply.iter_lines() if line.startswith("data:"))
        next(events)
        begun.wait(60)
        return str(json.loads(list(events)[-1].removeprefix("data:"))["generated_text"])


def test_orphans_are_buried(server: Container) -> None:
    engine = server.engine
    engine.run("exec", server.name, "sh", "-c", "(sleep 0.3; :) & true")
    engine.run("exec", server.name, "sleep", "1")
    states = engine.run("top", server.name, "-eo", "pid,stat,args").splitlines()
    assert not [line for line in states if " Z" in line], states


def test_too_little_shared_memory_is_told_with_the_flag(engine: Engine, image: str) -> None:
    options = ("--shm-size=64m", "--env=SHM_SIZE=8g")
    with started(engine, image, *options) as container:
        container.wait_ready()
        told = [line for line in container.log.splitlines() if "shared memory" in line]
        assert len(told) == 1 and told[0].endswith("start the container with --shm-size 8g.")


def test_ranks_need_nothing_of_dev_shm(engine: Engine, image: str) -> None:
    with started(engine, image, "--shm-size=4k", "--env=NUM_SHARD=2") as container:
        container.wait_ready()
        assert "shared memory" not in container.log
        assert is_three(container.generate(QUESTION, max_new_tokens=20))


def test_any_user_will_do(engine: Engine, image: str) -> None:
    with started(engine, image, *HARDENED, "--user=54321:0") as container:
        container.wait_ready()
        assert is_three(container.generate(QUESTION, max_new_tokens=20))


def test_nowhere_to_write_is_a_sentence(engine: Engine, image: str) -> None:
    with started(engine, image, "--read-only") as container:
        assert container.wait_exit() == 1
        assert "cannot make a folder in /tmp" in container.log
        assert "--tmpfs /tmp" in container.log and "Traceback" not in container.log


def test_too_little_memory_is_a_sentence(engine: Engine, image: str) -> None:
    flags = ("--max-batch-total-tokens=100000000",)
    with started(engine, image, "--memory=700m", flags=flags) as container:
        container.wait_ready()
        assert "MAX_BATCH_TOTAL_TOKENS" in container.log

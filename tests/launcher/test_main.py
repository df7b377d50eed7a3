"""The launcher's command line, from outside."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.launcher.launched import Launch, plain_environ


def run(*flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tessera.launcher.main", *flags],
        env=plain_environ(**environ),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_help() -> None:
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--version" in done.stdout
    assert "--model-id VALUE" in done.stdout and "[default: 3000] [env: PORT]" in done.stdout


def test_the_version() -> None:
    for flags in (["--version"], ["--port", "http", "--version"]):
        done = run(*flags)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"tessera {metadata.version('tessera')}\n"


@pytest.mark.parametrize("flags", [["--memory", "24g"], ["--memory=24g"], ["--json"]])
def test_flags_of_the_plan_without_it(flags: list[str]) -> None:
    done = run(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no {flags[0].split('=')[0]} here: it goes with --plan" in done.stderr


def test_a_flag_that_does_not_exist() -> None:
    done = run("--num-shards", "2")
    assert done.returncode == 2
    assert "there is no --num-shards. Did you mean --num-shard?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "environ", "error"),
    [
        (["--port", "http"], {}, "Error: PORT='http' must be a whole number.\n"),
        ([], {"NUM_SHARD": "0"}, "Error: NUM_SHARD='0' must be from 1 to 64.\n"),
        ([], {"MODEL_ID": "/no/model"}, "Error: MODEL_ID: there is no folder /no/model.\n"),
        (["--env-file", "/no/env"], {},
         "Error: the environment file '/no/env': No such file or directory.\n"),
        (["--sharded"], {"DEVICE": "cpu"},
         "Error: SHARDED=true but there is one cpu device; set NUM_SHARD to the number of shards, "
         "or SHARDED=false.\n"),
        (["--device", "base"], {},
         "Error: DEVICE=base is not known; use auto or one of cpu, cuda, xpu, with an index "
         "(cuda:1) or without.\n"),
        (["--backend", "../engine"], {"DEVICE": "cpu"},
         "Error: BACKEND=../engine is not known; use auto or one of cpu, cuda, ipex, reference, "
         "xpu.\n"),
        (["--num-shard", "2"], {"DEVICE": "xpu", "ZE_AFFINITY_MASK": "0"},
         "Error: NUM_SHARD=2 but there are 1 xpu device(s); lower it or make more devices "
         "visible.\n"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line(flags: list[str], environ: dict[str, str], error: str) -> None:
    done = run(*flags, **({"PORT": "0"} | environ))
    assert (done.returncode, done.stderr) == (1, error)


def test_nothing_heavy_is_imported() -> None:
    program = "import sys, tessera.launcher.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    modules = set(done.stdout.split())
    assert not modules & {"torch", "transformers", "numpy", "huggingface_hub", "grpc", "starlette"}


def test_the_log_says_what_was_set_but_no_secret(launch: Launch) -> None:
    launched = launch("--api-key", "sesame", HF_TOKEN="hf_secret")
    launched.await_log("ready: ")
    assert "API_KEY=..." in launched.log and "NUM_SHARD=2" in launched.log
    assert "sesame" not in launched.log and "hf_secret" not in launched.log
    commands = [" ".join(child.cmdline()) for child in launched.children()]
    assert len(commands) == 3 and not any("sesame" in command for command in commands)


def test_the_log_as_json(launch: Launch) -> None:
    launched = launch("--json-output", stub={"shard 1": ["log", "crash"]}, MAX_BATCH_SIZES="1")
    assert launched.await_end() == 1
    lines = launched.log.splitlines()
    events = [json.loads(line) for line in lines if not line.startswith("Error: ")]
    assert len(events) == len(lines) - 1
    relayed = [event for event in events if event.get("child") == "shard 1"]
    (warm,) = [event for event in relayed if event["message"] == "it is warm"]
    assert (warm["level"], warm["degrees"]) == ("ERROR", 40)
    assert any("Did you mean MAX_BATCH_SIZE?" in event["message"] for event in events)


def test_every_line_of_a_child_is_told_under_its_name(launch: Launch) -> None:
    launched = launch(stub={"shard 1": ["log", "crash"]})
    assert launched.await_end() == 1
    for said in ("it is warm degrees=40", "first line", "  second line", "{not json"):
        assert [line for line in launched.log.splitlines() if line.endswith(f"[shard 1] {said}")]


def test_the_log_as_json_shows_no_secret(launch: Launch) -> None:
    launched = launch("--json-output", "--api-key", "sesame", HF_TOKEN="hf_secret")
    launched.await_log("ready: ")
    assert "API_KEY=..." in launched.log
    assert "sesame" not in launched.log and "hf_secret" not in launched.log


def test_a_warning_that_shared_memory_is_small_names_the_flag(launch: Launch) -> None:
    launched = launch("--shm-size", "1000000g")
    launched.await_log("ready: ")
    assert "start the container with --shm-size 1000000g." in launched.log


def test_a_model_of_the_hub_is_downloaded_first(launch: Launch, tmp_path: Path) -> None:
    from tests.launcher.stand_in_hub import Hub, serve

    files = {"config.json": b"{}", "model.safetensors": os.urandom(1000)}
    with serve(Hub(files)) as hub:
        launched = launch(MODEL_ID="owner/model", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path))
        launched.await_log("ready: ")
    assert "[download] downloaded owner/model" in launched.log


def test_a_download_that_fails_is_one_line(launch: Launch, tmp_path: Path) -> None:
    from tests.launcher.stand_in_hub import Hub, serve

    with serve(Hub({})) as hub:
        launched = launch(MODEL_ID="owner/modle", HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path))
        assert launched.await_end() == 1
    assert f"Error: download ended with exit code 1: {hub.endpoint} has no model" in launched.log
    assert launched.pids == []


def test_a_signal_ends_a_download(launch: Launch, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # a hub that never answers
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        launched = launch(MODEL_ID="owner/model", HF_ENDPOINT=endpoint, HF_HOME=str(tmp_path))
        silent.settimeout(60)
        connection, _ = silent.accept()
        pids = [child.pid for child in launched.children()]
        launched.process.terminate()
        assert launched.await_end() == 0
        connection.close()
    launched.assert_nothing_left(pids)

"""`make run`: a server, one question, an answer, and nothing left when it stops."""

import base64
import json
import os
import re
import signal
from pathlib import Path

import pytest
from PIL import Image

from tessera.launcher.ask import PICTURE, demo_environment
from tessera.launcher.terminal_picture import half_blocks
from tests.launcher.launched import Launch, eventually, plain_environ

STUB_ASK = Path(__file__).with_name("stub_ask.py")


def test_one_question_about_the_demo_picture(launch: Launch, tmp_path: Path) -> None:
    body = tmp_path / "body"
    launched = launch("--once", program=STUB_ASK, MODEL_ID="", BODIES=str(body))
    assert launched.await_end() == 0
    log = launched.log
    assert "ready: http://127.0.0.1:" in log
    assert f"picture: {PICTURE} (640 x 480)" in log
    assert "answer: A red circle.\n2 tokens in " in log
    assert "\x1b[" not in log  # no terminal, no colours
    prompt = json.loads(body.read_bytes())["inputs"]
    image = base64.b64encode(PICTURE.read_bytes()).decode()
    assert prompt == f"<image>{image}</image>\nDescribe what you see in this image in detail."
    launched.assert_nothing_left(launched.pids)


def test_it_serves_on_until_ctrl_c(launch: Launch) -> None:
    launched = launch("--question", "Why?", program=STUB_ASK, MODEL_ID="")
    launched.await_log("Ctrl-C stops it")
    assert "question: Why?" in launched.log
    assert re.search(r"^chat about pictures at http://\S+/ui$", launched.log, re.MULTILINE)
    launched.process.send_signal(signal.SIGINT)
    assert launched.await_end() == 0
    launched.assert_nothing_left(launched.pids)


def test_another_vision_model_is_asked_by_chat(launch: Launch, tmp_path: Path) -> None:
    body = tmp_path / "body"
    launched = launch("--once", program=STUB_ASK, stub={"router": ["sees"]}, BODIES=str(body))
    assert launched.await_end() == 0, launched.log
    assert "answer: A cat\n" in launched.log
    content = json.loads(body.read_bytes())["messages"][0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_text_model_is_asked_without_a_picture(launch: Launch, tmp_path: Path) -> None:
    body = tmp_path / "body"
    launched = launch("--once", program=STUB_ASK, BODIES=str(body))
    assert launched.await_end() == 0, launched.log
    assert "picture" not in launched.log
    assert json.loads(body.read_bytes())["inputs"] == "What is the capital of France?"


def test_a_refused_question_ends_all_with_one_line(launch: Launch) -> None:
    launched = launch("--once", program=STUB_ASK, stub={"router": ["refuse"]}, MODEL_ID="")
    assert launched.await_end() == 1
    errors = [line for line in launched.log.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and errors[0].startswith("Error: the question failed: ")
    assert "too long" in errors[0]
    launched.assert_nothing_left(launched.pids)


def test_a_server_that_cannot_start_has_said_why(launch: Launch) -> None:
    launched = launch("--once", program=STUB_ASK, stub={"shard 0": ["crash"]}, MODEL_ID="")
    assert launched.await_end() == 1
    assert launched.log.count("\nError: ") == 1
    assert "Error: shard 0 ended with exit code 3: the weights are damaged" in launched.log
    launched.assert_nothing_left(launched.pids)


def test_the_server_goes_with_a_killed_question(launch: Launch) -> None:
    launched = launch(program=STUB_ASK, MODEL_ID="")
    launched.await_log("Ctrl-C stops it")
    pids = launched.pids
    launched.process.kill()
    launched.process.wait()
    eventually(lambda: list(launched.temporary.iterdir()) == [], "an orderly end")
    launched.assert_nothing_left(pids)


def test_a_picture_that_is_not_there(launch: Launch) -> None:
    launched = launch("--picture", "/no/picture.png", program=STUB_ASK, MODEL_ID="")
    assert launched.await_end() == 1
    assert launched.log == "Error: there is no picture /no/picture.png.\n"


@pytest.mark.parametrize(
    ("flags", "environ", "port", "shards"),
    [
        ([], {}, "8000", "2"),
        (["--port", "1"], {}, None, "2"),
        ([], {"PORT": "2", "NUM_SHARD": "1"}, "2", "1"),
        (["--model-id", "o/m"], {}, "8000", None),
        (["--sharded", "false"], {}, "8000", None),
    ],
)
def test_what_is_said_without_being_asked(
    flags: list[str], environ: dict[str, str], port: str | None, shards: str | None
) -> None:
    said = demo_environment(flags, plain_environ(CUDA_VISIBLE_DEVICES="", **environ))
    assert (said.get("PORT"), said.get("NUM_SHARD")) == (port, shards)
    assert said["LAUNCHER_PID"] == str(os.getpid())


def test_half_blocks_hold_two_pixels_each(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 2, 4, 4))
    picture.save(tmp_path / "p.png")
    (line,) = half_blocks(tmp_path / "p.png", columns=2).splitlines()
    assert line == "\x1b[38;2;255;0;0;48;2;0;0;255m\u2580\u2580\x1b[0m"

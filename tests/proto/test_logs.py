import json
import logging
import os
import subprocess
import sys

import pytest

from tessera.proto.logs import CHILD, JsonFormatter, TextFormatter, escaped


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("tessera.test", logging.INFO, __file__, 1, message, args, None)
    made.created = 1_700_000_000.5
    for name, value in extra.items():
        setattr(made, name, value)
    return made


def failed() -> logging.LogRecord:
    made = record("it broke")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        made.exc_info = sys.exc_info()
    return made


def test_text_is_one_line_with_time_level_and_source() -> None:
    line = TextFormatter().format(record("%d requests", 3))
    assert line == "2023-11-14T22:13:20.500Z INFO    tessera.test: 3 requests"


def test_a_childs_line_carries_its_name() -> None:
    assert "INFO    [shard 0] hello" in TextFormatter().format(
        record("hello", **{CHILD: "shard 0"})
    )
    assert (
        json.loads(JsonFormatter().format(record("hello", **{CHILD: "shard 0"})))[CHILD]
        == "shard 0"
    )


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\x1b[31mb", "a\x00b", "a\u2028b", "a\x85b"])
def test_what_a_client_sent_cannot_forge_a_line(text: str) -> None:
    line = TextFormatter().format(record("prompt %s", text))
    assert len(line.splitlines()) == 1 and line.isprintable()
    assert len(JsonFormatter().format(record("prompt %s", text)).splitlines()) == 1
    assert escaped("häß 図 ok") == "häß 図 ok"


def test_a_traceback_stays_in_its_event() -> None:
    assert len(TextFormatter().format(failed()).splitlines()) == 1
    event = json.loads(JsonFormatter().format(failed()))
    assert event["message"] == "it broke"
    assert event["exception"].endswith("ValueError: first\nsecond")


def test_json_has_the_fields_that_collectors_expect() -> None:
    assert json.loads(JsonFormatter().format(record("hi"))) == {
        "timestamp": "2023-11-14T22:13:20.500Z",
        "level": "INFO",
        "message": "hi",
        "target": "tessera.test",
    }


def test_a_wrong_log_call_still_logs() -> None:
    assert TextFormatter().format(record("%d", "many")).endswith("tessera.test: %d")


PROGRAM = """
import logging, sys
from tessera.proto.logs import configure_logging
configure_logging("info", background={background})
logging.getLogger("x").debug("quiet")
for i in range(5000):
    logging.getLogger("x").info("line %d " + "." * 100, i)
sys.stderr.write("got through")
"""


@pytest.mark.parametrize("background", [True, False])
def test_all_lines_arrive_in_order(background: bool) -> None:
    program = PROGRAM.format(background=background)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    lines = done.stdout.splitlines()
    assert [int(line.split("line ")[1].split()[0]) for line in lines] == list(range(5000))
    assert (done.returncode, done.stderr) == (0, "got through")


@pytest.mark.parametrize("background", [True, False])
def test_a_closed_pipe_costs_the_lines_only(background: bool) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(background=background)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "got through")


def test_a_stuck_reader_does_not_stop_a_background_writer() -> None:
    reader, writer = os.pipe()  # nobody reads the half megabyte
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(background=True)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writer)
    os.close(reader)
    assert (done.returncode, done.stderr) == (0, "got through")


def test_a_process_without_a_stdout_still_runs() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, PROGRAM.format(background=True)],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "got through")

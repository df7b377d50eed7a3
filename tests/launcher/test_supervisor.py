"""The launcher around stub processes: whatever happens to them, it ends well and leaves nothing."""

import os
import signal
import stat
import time
import urllib.request

import psutil
import pytest

from tests.launcher.launched import Launch, Launched, alive, eventually


def url(launched: Launched) -> str:
    return launched.log.split("ready: ")[1].split()[0]


def get(launched: Launched, path: str = "/") -> str:
    with urllib.request.urlopen(url(launched) + path, timeout=30) as reply:
        text: str = reply.read().decode()
        return text


def test_ready_when_the_router_says_so_and_the_port_answers(launch: Launch) -> None:
    launched = launch()
    launched.await_log("ready: http://127.0.0.1:")
    assert get(launched) == "served"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_zero_and_nothing_left(launch: Launch, number: int) -> None:
    launched = launch()
    launched.await_log("ready: ")
    pids = launched.pids
    assert len(pids) == 3
    launched.process.send_signal(number)
    assert launched.await_end() == 0
    launched.assert_nothing_left(pids)
    with pytest.raises(OSError):
        get(launched)


def test_a_hang_up_that_is_ignored_ends_nothing(launch: Launch) -> None:
    launched = launch(NOHUP="1")
    launched.await_log("ready: ")
    launched.process.send_signal(signal.SIGHUP)
    time.sleep(1)  # enough to begin to stop
    assert "stopping" not in launched.log and get(launched) == "served"
    launched.process.send_signal(signal.SIGTERM)
    assert launched.await_end() == 0 and "stopping" in launched.log


def test_a_signal_ends_it_while_loading(launch: Launch) -> None:
    launched = launch(stub={"shard 1": ["late"]})
    eventually(lambda: len(launched.pids) == 3, "three stubs")
    launched.process.terminate()
    assert launched.await_end() == 0
    launched.assert_nothing_left(launched.pids)


def test_the_router_is_stopped_before_the_shards(launch: Launch) -> None:
    launched = launch(GRACEFUL_TERMINATION_TIMEOUT="0", stub={"router": ["stubborn", "deaf"]})
    launched.await_log("ready: ")
    launched.process.terminate()
    assert launched.await_end() == 0
    asked = [line[0] for line in launched.diary if line[-1] == "stop"]
    assert asked == ["router", "shard", "shard"]
    assert launched.log.count("did not stop within") == 1
    launched.assert_nothing_left(launched.pids)


def test_a_second_interrupt_kills_at_once(launch: Launch) -> None:
    launched = launch(stub={"router": ["stubborn", "deaf"], "shard 0": ["stubborn"]})
    launched.await_log("ready: ")
    launched.process.send_signal(signal.SIGINT)
    launched.await_log("stopping")
    launched.process.send_signal(signal.SIGINT)
    assert launched.await_end() == 0
    assert "did not stop within" not in launched.log
    launched.assert_nothing_left(launched.pids)


@pytest.mark.parametrize("name", ["shard 0", "shard 1", "router"])
def test_a_process_that_refuses_to_start_ends_all_with_its_words(launch: Launch, name: str) -> None:
    launched = launch(stub={name: ["crash"]})
    assert launched.await_end() == 1
    assert f"Error: {name} ended with exit code 3: the weights are damaged\n" in launched.log
    assert launched.log.count("\nError: ") == 1
    launched.assert_nothing_left(launched.pids)


def kill_shard(launched: Launched, rank: str) -> None:
    """The newest one of that rank."""
    started = [int(line[2]) for line in launched.diary if line[:2] == ["shard", rank]]
    os.kill(started[-1], signal.SIGKILL)


@pytest.mark.parametrize(
    "words", [(), ("lost+0+shard+1+is+gone",), ("lost+0+shard+1+is+gone", "ready")]
)
def test_a_killed_shard_is_named_with_its_signal(launch: Launch, words: tuple[str, ...]) -> None:
    """Whatever the router says of it first."""
    launched = launch("--max-shard-restarts", "0")
    launched.await_log("ready: ")
    for word in words:
        get(launched, f"/report/{word}")
    kill_shard(launched, "1")
    assert launched.await_end() == 1
    assert "Error: shard 1 was killed by SIGKILL (signal 9)" in launched.log
    launched.assert_nothing_left(launched.pids)


def test_all_shards_are_started_anew_when_one_is_lost(launch: Launch) -> None:
    launched = launch("--max-shard-restarts", "2")
    launched.await_log("ready: ")
    kill_shard(launched, "1")
    launched.await_log("shard 1 was killed by SIGKILL (signal 9)")
    launched.await_log("All shards are started anew (1 of 2)")
    eventually(lambda: len(launched.pids) == 5, "two new shards")
    assert len([pid for pid in launched.pids if alive(pid)]) == 3
    get(launched, "/report/lost+0+shard+1+is+gone")  # known already: it is of the first ones
    get(launched, "/report/ready")
    eventually(lambda: launched.log.count("ready: ") == 2, "the second time")
    assert len(launched.pids) == 5
    get(launched, "/report/lost+1+shard+0+has+not+answered")
    launched.await_log("shard 0 has not answered. All shards are started anew (2 of 2)")
    eventually(lambda: len(launched.pids) == 7, "two more")
    get(launched, "/report/ready")
    eventually(lambda: launched.log.count("ready: ") == 3, "the third time")
    kill_shard(launched, "0")
    assert launched.await_end() == 1
    assert "(signal 9)" in launched.log and "2 times within 10 minutes" in launched.log
    assert "MAX_SHARD_RESTARTS" in launched.log.splitlines()[-1]
    launched.assert_nothing_left(launched.pids)


def test_new_shards_that_do_not_come_end_all(launch: Launch) -> None:
    launched = launch("--startup-timeout", "5")
    launched.await_log("ready: ")
    kill_shard(launched, "0")
    launched.await_log("started anew")
    eventually(lambda: len(launched.pids) == 5, "two new shards")
    assert launched.await_end() == 1  # the stub says ready only once
    assert "Error: not ready after 5 s: waiting for the router's warm-up" in launched.log
    launched.assert_nothing_left(launched.pids)


def test_a_signal_ends_it_while_shards_come_back(launch: Launch) -> None:
    launched = launch()
    launched.await_log("ready: ")
    kill_shard(launched, "0")
    launched.await_log("started anew")
    launched.process.terminate()
    assert launched.await_end() == 0
    launched.assert_nothing_left(launched.pids)


def test_a_router_that_dies_while_serving_ends_all(launch: Launch) -> None:
    launched = launch()
    launched.await_log("ready: ")
    with pytest.raises(OSError):
        get(launched, "/crash")
    assert launched.await_end() == 1
    assert "Error: router ended with exit code 7: the router has had enough" in launched.log
    launched.assert_nothing_left(launched.pids)


def test_a_shard_that_is_gone_is_named_though_the_router_ended_first(launch: Launch) -> None:
    launched = launch()
    launched.await_log("ready: ")
    with pytest.raises(OSError):
        get(launched, "/crash")
    (router,) = (int(line[1]) for line in launched.diary if line[0] == "router")
    eventually(lambda: not alive(router), "the end of the router")
    kill_shard(launched, "1")
    assert launched.await_end() == 1
    assert "exit code 7: the router has had enough; shard 1 was killed by SIGKILL" in launched.log
    launched.assert_nothing_left(launched.pids)


def test_a_shard_that_hangs_is_named_in_the_routers_words(launch: Launch) -> None:
    launched = launch("--max-shard-restarts", "0")
    launched.await_log("ready: ")
    get(launched, "/report/lost+0+shard+1+has+not+answered")
    get(launched, "/report/ready")
    assert launched.await_end() == 1
    assert "Error: shard 1 has not answered.\n" in launched.log
    launched.assert_nothing_left(launched.pids)


def test_a_start_that_takes_too_long_names_who_is_missing(launch: Launch) -> None:
    launched = launch("--startup-timeout", "1", stub={"shard 1": ["late"]})
    assert launched.await_end() == 1
    assert "Error: not ready after 1 s: waiting for shard 1;" in launched.log
    launched.assert_nothing_left(launched.pids)


def test_a_warm_up_that_takes_too_long_is_named(launch: Launch) -> None:
    launched = launch("--startup-timeout", "2", stub={"router": ["unready"]})
    assert launched.await_end() == 1
    assert "waiting for the router's warm-up" in launched.log


def test_what_a_child_started_ends_with_it(launch: Launch) -> None:
    launched = launch(stub={"shard 0": ["grandchild"], "router": ["grandchild"]})
    launched.await_log("ready: ")
    pids = [child.pid for child in launched.children()]
    assert len(pids) == 5
    launched.process.terminate()
    assert launched.await_end() == 0
    launched.assert_nothing_left(pids)


def test_children_die_with_a_killed_launcher_and_the_next_start_cleans_up(
    launch: Launch,
) -> None:
    first = launch()
    first.await_log("ready: ")
    pids = first.pids
    first.process.kill()
    first.process.wait()
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the children's end")
    assert len(list(first.temporary.glob("tessera-*"))) == 1

    second = launch(TMPDIR=str(first.temporary), PORT=url(first).rsplit(":", 1)[1])
    second.await_log("ready: ")
    (folder,) = first.temporary.glob("tessera-*")  # its own; the other one is gone
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    second.process.terminate()
    assert second.await_end() == 0
    assert list(first.temporary.iterdir()) == []


def test_two_servers_share_a_machine_but_not_a_port(launch: Launch) -> None:
    first = launch()
    first.await_log("ready: ")
    port = url(first).rsplit(":", 1)[1]
    beside = launch(TMPDIR=str(first.temporary))
    beside.await_log("ready: ")
    refused = launch(TMPDIR=str(first.temporary), PORT=port)
    assert refused.await_end() == 1
    assert f"Error: port {port} on 127.0.0.1 is taken by another process" in refused.log
    assert refused.pids == []
    assert get(first) == get(beside) == "served"


def test_output_of_any_size_is_relayed_under_its_name(launch: Launch) -> None:
    launched = launch(stub={"shard 1": ["spam", "log"]})
    launched.await_log("ready: ")
    assert "ERROR   [shard 1] it is warm" in launched.log
    assert launched.log.count("[shard 1] xxxx") == 200
    assert launched.log.count("[shard 1] yyyy") == 200


def test_serving_goes_on_when_the_log_pipe_is_closed(launch: Launch) -> None:
    launched = launch(stub={"shard 0": ["chatty"]}, piped=True)
    launched.await_log("ready: ")
    launched.close_pipe()
    for _ in range(3):
        assert get(launched) == "served"
    launched.process.terminate()
    assert launched.await_end() == 0
    launched.assert_nothing_left(launched.pids)


def test_serving_goes_on_when_the_log_reader_is_stuck(launch: Launch) -> None:
    launched = launch(stub={"shard 0": ["spam"], "shard 1": ["spam"]}, piped=True)
    # Nobody reads the megabytes of output, and yet the shards get through and the server is ready.
    eventually(lambda: len(list(launched.temporary.glob("*/shard-*"))) == 2, "both shards")
    launched.process.terminate()
    assert launched.await_end() == 0
    launched.assert_nothing_left(launched.pids)

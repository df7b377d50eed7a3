"""A dashboard shows numbers, and an operator hears of a lost shard, with the real Prometheus."""

import base64
import json
import math
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.end_to_end.stack import Stack, running
from tests.operations.monitoring import (
    ALERTMANAGER,
    DOCKER,
    PROMETHEUS,
    Prometheus,
    Webhook,
    free_port,
    monitoring,
    needs_tools,
    wait_for,
    webhook,
)
from tests.operations.tgi_dashboard import queries

pytestmark = [needs_tools, pytest.mark.timeout(300)]

PICTURE = Path(__file__).parents[2] / "launcher" / "demo" / "picture.png"


@pytest.mark.parametrize(
    "command",
    [
        ["promtool", "check", "config", PROMETHEUS / "prometheus.yml"],
        ["promtool", "check", "rules", PROMETHEUS / "alerts.yml"],
        ["promtool", "test", "rules", PROMETHEUS / "alerts_test.yml"],
        ["amtool", "check-config", ALERTMANAGER],
    ],
    ids=lambda command: " ".join(map(str, command[:3])).rpartition("/")[2],
)
def test_the_tools_accept_the_files(command: list[Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_test() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", (PROMETHEUS / "alerts.yml").read_text()))
    tested = (PROMETHEUS / "alerts_test.yml").read_text()
    assert alerts and {alert for alert in alerts if alert not in tested} == set()


def serving(hook: Webhook, port: int) -> Any:
    """The demo model at that port, which may fetch pictures from the webhook."""
    flags = ["--num-shard", "2", "--port", str(port), "--allow-private-image-hosts", "true"]
    return running(None, *flags, "--allowed-image-domains", f"127.0.0.1:{hook.port}")


@pytest.fixture(scope="module")
def hook() -> Iterator[Webhook]:
    with webhook(PICTURE.read_bytes()) as hook:
        yield hook


def work(stack: Stack, hook: Webhook) -> None:
    """Something of everything: pictures, streams, newcomers, repetitions, refusals, failures."""
    url = f"http://127.0.0.1:{hook.port}/picture.png"
    part = {"type": "image_url", "image_url": {"url": url}}
    text = {"type": "text", "text": "How many shapes are there?"}
    chat = {"messages": [{"role": "user", "content": [part, text]}], "max_tokens": 12}
    inline = base64.b64encode(PICTURE.read_bytes()).decode()
    long = {
        "inputs": f"<image>{inline}</image>[INST] What is shown? [/INST]",
        "parameters": {"max_new_tokens": 150},
        "stream": True,
    }
    with ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(stack.post, "/", long) for _ in range(2)]
        replies += [pool.submit(stack.post, "/v1/chat/completions", chat) for _ in range(6)]
        assert {reply.result().status_code for reply in replies} == {200}
    assert stack.post("/generate", {"inputs": ""}).status_code == 422
    assert stack.post("/nowhere", {}).status_code == 404


@pytest.fixture(scope="module")
def observed(
    hook: Webhook, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Stack, Prometheus]]:
    """A server that is scraped, with work done between scrapes."""
    port, folder = free_port(), tmp_path_factory.mktemp("monitoring")
    with monitoring(folder, port, hook.port) as prometheus, serving(hook, port) as stack:
        wait_for("a first scrape", lambda: prometheus.value("tgi_request_success") == 0, 30)
        work(stack, hook)
        done = stack.metric("tgi_request_success")
        steps = "sum(tessera_step_duration_seconds_count)"
        wait_for("a scrape", lambda: prometheus.value("tgi_request_success") == done, 30)
        before = prometheus.value(steps)
        work(stack, hook)  # so that what had no series before has two samples
        wait_for("another", lambda: prometheus.value("tgi_request_success") == 2 * done, 30)
        assert prometheus.value(steps) > before
        yield stack, prometheus


def test_our_dashboard_shows_something_everywhere(observed: tuple[Stack, Prometheus]) -> None:
    found = json.loads((DOCKER / "grafana" / "dashboards" / "tessera.json").read_text())
    asked = [target["expr"] for panel in found["panels"] for target in panel.get("targets", [])]
    assert len(asked) > 50
    for text in asked:
        text = text.replace("$__rate_interval", "1m").replace("$instance", ".*")
        assert "$" not in text
        assert_shows(observed[1], text)


def test_text_generation_inferences_dashboard_shows_something_everywhere(
    observed: tuple[Stack, Prometheus],
) -> None:
    for text in queries():
        assert_shows(observed[1], text)


def assert_shows(prometheus: Prometheus, text: str) -> None:
    values = [value for _, value in prometheus.query(text)]
    assert any(map(math.isfinite, values)), f"nothing to see: {text} is {values}"


def test_what_is_scraped_is_clean(observed: tuple[Stack, Prometheus]) -> None:
    """promtool's own opinion; its objections to text-generation-inference's names are theirs."""
    text = httpx.get(f"{observed[0].url}/metrics").text
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert [line for line in said if not line.startswith("tgi_")] == []


def processes_of(stack: Stack, module: str) -> list[psutil.Process]:
    children = psutil.Process(stack.process.pid).children(recursive=True)
    return [child for child in children if module in " ".join(child.cmdline())]


def test_a_lost_shard_is_told_and_its_return_too(
    observed: tuple[Stack, Prometheus], hook: Webhook
) -> None:
    stack, prometheus = observed
    assert hook.told == []
    shards = processes_of(stack, "tessera.shard.main")
    assert len(shards) == 2
    shards[1].kill()
    alert = "TesseraShardsRestarted"
    wait_for("the alert", lambda: bool(hook.heard("firing", alert)), 40)
    assert hook.heard("firing", alert)[0]["severity"] == "ticket"
    wait_for("its end", lambda: bool(hook.heard("resolved", alert)), 60)
    assert prometheus.value('tessera_shard_up{rank="1"}') == 1
    assert stack.process.poll() is None
    # TesseraShardSilent was right as well if a scrape came at that moment.
    assert {told["alertname"] for _, told in hook.told} <= {alert, "TesseraShardSilent"}


def test_a_lost_server_is_told_and_its_return_too(
    observed: tuple[Stack, Prometheus], hook: Webhook
) -> None:
    stack, prometheus = observed
    hook.told.clear()
    port = int(stack.url.rpartition(":")[2])
    processes_of(stack, "tessera.router.main")[0].kill()
    assert stack.process.wait(30) == 1
    wait_for("the alert", lambda: bool(hook.heard("firing", "TesseraDown")), 40)
    labels = hook.heard("firing", "TesseraDown")[0]
    assert (labels["instance"], labels["severity"]) == (f"127.0.0.1:{port}", "page")
    with serving(hook, port):
        wait_for("its end", lambda: bool(hook.heard("resolved", "TesseraDown")), 60)
        assert prometheus.value("changes(process_start_time_seconds[5m])") == 1
    assert {told["alertname"] for _, told in hook.told} == {"TesseraDown"}

"""A server with weights or cache in few bits answers questions about pictures, on one and on two
shards, and says what it keeps them in."""

from collections import Counter
from pathlib import Path

import httpx
import pytest

from tessera.launcher.demo.evaluate import FORMATS, Server, evaluate
from tessera.launcher.model_folder import DEMO_FOLDER
from tests.end_to_end.stack import Stack, running
from tests.shard.packed_checkpoints import Packing, convert

pytestmark = pytest.mark.timeout(300)


def right(stack: Stack, kind: str) -> float:
    """The share of questions of one kind that are answered rightly."""
    counts: Counter[bool] = Counter()
    for result in evaluate(Server(stack.url), 7, 8, FORMATS[:1]):
        if result.kind == kind:
            counts[result.right] += 1
    return counts[True] / counts.total()


def info(stack: Stack) -> tuple[str | None, str]:
    """What weights and cache are kept in."""
    told = httpx.get(f"{stack.url}/info").json()
    return told["quantize"], told["kv_cache_dtype"]


@pytest.mark.parametrize(("flag", "shards"), [("--quantize=int4", "2"), ("--isq=Q8_0", "1")])
def test_pictures_are_still_described(flag: str, shards: str) -> None:
    with running(None, "--num-shard", shards, flag) as stack:
        bits = 4 if "int4" in flag else 8
        assert stack.log.count(f"linear layers are quantised to {bits} bits") == 1
        assert "reference operations" not in stack.log
        assert info(stack) == (f"int{bits}", "bfloat16")
        assert right(stack, "color") > 0.8


@pytest.mark.parametrize(("name", "shards"), [("fp8_e4m3fn", "2"), ("fp8_e5m2", "1")])
def test_a_cache_in_8_bits(name: str, shards: str) -> None:
    with running(None, "--num-shard", shards, "--kv-cache-dtype", name) as stack:
        assert "reference operations" not in stack.log
        assert info(stack) == (None, name.replace("fp8", "float8"))
        assert right(stack, "color") > 0.8


PACKINGS = {
    "awq, 2 shards": (Packing("awq", group_size=64), "2"),
    "gptq, symmetric": (Packing("gptq", group_size=64, symmetric=True), "1"),
    "gptq, desc_act, 2 shards": (Packing("gptq", group_size=32, act_order=True), "2"),
}


@pytest.mark.parametrize("name", PACKINGS)
def test_checkpoints_in_few_bits(name: str, tmp_path: Path) -> None:
    packing, shards = PACKINGS[name]
    convert(DEMO_FOLDER, tmp_path / "packed", tmp_path / "plain", packing)
    with running(tmp_path / "packed", "--num-shard", shards) as stack:
        assert f"linear layers are in 4 bits ({packing.method} checkpoint)" in stack.log
        assert info(stack)[0] == packing.method
        assert right(stack, "color") > 0.8


def test_a_cache_of_another_kind_is_refused_at_once() -> None:
    with (
        pytest.raises(AssertionError, match=r"KV_CACHE_DTYPE='int8' must be one of auto, fp8"),
        running(None, "--kv-cache-dtype", "int8"),
    ):
        pass


def test_a_kind_that_is_not_there_is_refused_at_once() -> None:
    with (
        pytest.raises(AssertionError, match=r"QUANTIZE='eetq' must be int8 or int4"),
        running(None, "--quantize", "eetq"),
    ):
        pass

"""A server with weights in few bits answers questions about pictures, on one and on two shards."""

from collections import Counter

import pytest

from tessera.launcher.demo.evaluate import FORMATS, Server, evaluate
from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)


def right(stack: Stack, kind: str) -> float:
    """The share of questions of one kind that are answered rightly."""
    counts: Counter[bool] = Counter()
    for result in evaluate(Server(stack.url), 7, 8, FORMATS[:1]):
        if result.kind == kind:
            counts[result.right] += 1
    return counts[True] / counts.total()


@pytest.mark.parametrize(("flag", "shards"), [("--quantize=int4", "2"), ("--isq=Q8_0", "1")])
def test_pictures_are_still_described(flag: str, shards: str) -> None:
    with running(None, "--num-shard", shards, flag) as stack:
        bits = 4 if "int4" in flag else 8
        assert stack.log.count(f"linear layers are quantised to {bits} bits") == 1
        assert "reference operations" not in stack.log
        assert right(stack, "color") > 0.8


def test_a_kind_that_is_not_there_is_refused_at_once() -> None:
    with (
        pytest.raises(AssertionError, match=r"QUANTIZE='eetq' must be int8 or int4"),
        running(None, "--quantize", "eetq"),
    ):
        pass

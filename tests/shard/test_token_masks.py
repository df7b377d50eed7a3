"""Masks of guided sequences: waited for, applied, and never waited for in vain."""

import threading
import time

import pytest

from tessera.shard.token_masks import TokenMaskBox


@pytest.fixture
def box() -> TokenMaskBox:
    return TokenMaskBox(timeout_s=20)


def test_masks_come_in_parts_and_before_or_after_they_are_asked_for(box: TokenMaskBox) -> None:
    box.put(3, {1: b"a"})
    threading.Timer(0.05, box.put, (3, {2: b"b"})).start()
    assert box.take(3, [1, 2]) == {1: b"a", 2: b"b"}


def test_masks_of_later_steps_are_kept_and_those_of_steps_that_are_over_are_not(
    box: TokenMaskBox,
) -> None:
    box.put(4, {1: b"later"})
    box.put(3, {1: b"now"})
    assert box.take(3, [1]) == {1: b"now"}
    box.put(2, {1: b"too late"})
    assert box.take(4, [1]) == {1: b"later"}
    assert box._masks == {}


def test_whoever_waits_is_told_when_no_more_will_come(box: TokenMaskBox) -> None:
    box.put(0, {1: b"a"})
    threading.Timer(0.05, box.close).start()
    started = time.monotonic()
    assert box.take(0, [1, 2]) == {1: b"a"}
    assert time.monotonic() - started < 15
    assert box.take(1, [1]) == {}
    box.reset()
    box.put(0, {1: b"again"})
    assert box.take(0, [1]) == {1: b"again"}


def test_a_mask_that_does_not_come_is_not_waited_for_for_ever() -> None:
    assert TokenMaskBox(timeout_s=0.05).take(0, [1]) == {}

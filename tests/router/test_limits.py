"""What the server takes, from settings, model and warm-up."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tessera.proto.env import SettingsError
from tessera.router.limits import (
    batch_size,
    cache_shortfall,
    scheduler_limits,
    serving_limits,
    warmup_request,
)
from tessera.router.model_files import ModelFiles
from tessera.router.settings import RouterSettings
from tessera.router.shards import ShardsInfo

INFO = ShardsInfo("llama", "float32", "cpu", "cpu", 16, 640, 2)


@pytest.fixture(scope="module")
def files(checkpoint: Callable[[str], Path]) -> ModelFiles:
    return ModelFiles.read(checkpoint("next-mistral"))


def test_without_settings_the_model_and_the_cache_decide(files: ModelFiles) -> None:
    limits = serving_limits(RouterSettings(), INFO, files, num_blocks=10)
    assert (limits.max_input_tokens, limits.max_total_tokens) == (159, 160)
    limits = serving_limits(RouterSettings(), INFO, files, num_blocks=10_000)
    assert limits.max_total_tokens == files.max_positions
    assert limits.max_batch_total_tokens == 160_000
    assert limits.num_shard == 2


def test_settings_are_kept(files: ModelFiles) -> None:
    settings = RouterSettings(max_input_tokens=20, max_total_tokens=30, max_batch_size=4)
    limits = serving_limits(settings, INFO, files, num_blocks=100)
    assert (limits.max_input_tokens, limits.max_total_tokens) == (20, 30)
    assert limits.max_batch_size == 4


def test_a_window_longer_than_the_models_is_refused_before_the_warm_up(files: ModelFiles) -> None:
    settings = RouterSettings(max_total_tokens=files.max_positions + 1)
    with pytest.raises(SettingsError, match=f"over the {files.max_positions} positions"):
        warmup_request(settings, INFO, files)


def test_an_input_that_leaves_no_room_is_refused(files: ModelFiles) -> None:
    with pytest.raises(SettingsError, match="MAX_INPUT_TOKENS=160 must be below"):
        serving_limits(RouterSettings(max_input_tokens=160), INFO, files, num_blocks=10)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (RouterSettings(), 128),
        (RouterSettings(max_concurrent_requests=7), 7),
        (RouterSettings(max_batch_size=3), 3),
        (RouterSettings(max_batch_prefill_tokens=5), 5),
    ],
)
def test_batch_size(settings: RouterSettings, expected: int) -> None:
    assert batch_size(settings) == expected


def test_the_cache_is_never_larger_than_can_be_used(files: ModelFiles) -> None:
    settings = RouterSettings(max_batch_size=2, max_total_tokens=100)
    assert warmup_request(settings, INFO, files).max_blocks == 2 * 7
    settings = RouterSettings(max_batch_total_tokens=100, max_total_tokens=50)
    assert warmup_request(settings, INFO, files).max_blocks == 6


def test_a_sequence_may_become_longer_than_there_must_be_room_for(files: ModelFiles) -> None:
    asked = warmup_request(RouterSettings(), INFO, files)
    assert (asked.max_context_len, asked.longest_context_len) == (32, files.max_positions)
    asked = warmup_request(RouterSettings(max_total_tokens=50), INFO, files)
    assert (asked.max_context_len, asked.longest_context_len) == (50, 50)


def test_a_cache_of_less_than_a_block_is_refused(files: ModelFiles) -> None:
    assert warmup_request(RouterSettings(max_batch_total_tokens=16), INFO, files).max_blocks == 1
    with pytest.raises(SettingsError, match="MAX_BATCH_TOTAL_TOKENS=15 is less than one block"):
        warmup_request(RouterSettings(max_batch_total_tokens=15), INFO, files)


def test_a_text_model_is_asked_for_no_pictures(checkpoint: Callable[[str], Path]) -> None:
    request = warmup_request(RouterSettings(), INFO, ModelFiles.read(checkpoint("llama")))
    assert (request.max_step_tiles, request.max_feature_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("device", "asked", "expected"), [("cpu", None, 5), ("cuda:0", None, 8), ("cpu", 9, 9)]
)
def test_a_processor_encodes_fewer_pictures_at_once(
    files: ModelFiles, device: str, asked: int | None, expected: int
) -> None:
    info = replace(INFO, device=device)
    settings = RouterSettings(max_step_tiles=asked)
    assert warmup_request(settings, info, files).max_step_tiles == expected
    assert scheduler_limits(settings, info).max_step_tiles == expected


@pytest.mark.parametrize(
    ("asked", "short"), [(None, False), (160, False), (175, False), (176, True)]
)
def test_a_cache_smaller_than_asked_for_is_told(
    files: ModelFiles, asked: int | None, short: bool
) -> None:
    settings = RouterSettings(max_batch_total_tokens=asked)
    limits = serving_limits(settings, INFO, files, num_blocks=10)  # of 16 tokens
    said = cache_shortfall(settings, limits, INFO.block_size)
    assert bool(said) == short
    if short:
        assert said.startswith("MAX_BATCH_TOTAL_TOKENS=176 does not fit in memory: the cache holds")
        assert "160 tokens" in said

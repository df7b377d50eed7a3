"""Every budget of the table in ARCHITECTURE.md means what it says."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from tessera.proto import shard_pb2
from tessera.proto.env import SettingsError, fields_of, read_settings
from tessera.router.core import Core, RequestStream
from tessera.router.errors import OverloadedError, ValidationError
from tessera.router.limits import batch_size, scheduler_limits, serving_limits, warmup_request
from tessera.router.model_files import ModelFiles
from tessera.router.request import PlacedImage
from tessera.router.scheduler import Scheduler, StepPlan
from tessera.router.settings import RouterSettings
from tessera.router.shards import ShardsInfo
from tessera.router.tokenizer import Tokenizer
from tessera.router.validation import Validator
from tests.router.http_fakes import LIMITS, FakeGenerator, Script, post
from tests.router.test_core import ScriptedShards, read, request, with_core
from tests.router.test_scheduler import (
    BLOCK_SIZE,
    make_image,
    make_scheduler,
    make_sequence,
    run,
    started,
)
from tests.router.test_validation import build, native

App = Callable[..., Starlette]
ARCHITECTURE = Path(__file__).parents[2] / "ARCHITECTURE.md"
INFO = ShardsInfo("llava_next", "bfloat16", "cpu", "cpu", 16, 512, 1)


def settings_of(**environ: str) -> RouterSettings:
    return read_settings(RouterSettings, {"MODEL_ID": "model", **environ})


@pytest.fixture(scope="module")
def files(checkpoint: Callable[[str], Path]) -> ModelFiles:
    return ModelFiles.read(checkpoint("next-mistral"))  # 4096 positions


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Callable[[str], Path]) -> Tokenizer:
    return Tokenizer.from_folder(checkpoint("llama"))


def test_the_table_names_settings_with_their_defaults() -> None:
    section = ARCHITECTURE.read_text().split("## Budgets\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([A-Z_]+)`[^|]*\| ([^|]*?) \|", section, re.MULTILINE))
    assert len(rows) >= 14
    defaults = {
        name.upper(): "empty" if value is None else str(value).lower()
        for name, value, _ in fields_of(RouterSettings)
    }
    assert {name: defaults.get(name) for name in rows} == {
        name: text.strip("`").replace(",", "") for name, text in rows.items()
    }


# --- MAX_BATCH_PREFILL_TOKENS, MAX_BATCH_TOTAL_TOKENS, MAX_BATCH_SIZE ----------------------------


def loaded(**changes: float) -> Scheduler:
    """Prompts short and long, far more than fit at once."""
    scheduler = make_scheduler(num_blocks=40, waiting_served_ratio=0, **changes)
    for number in range(12):
        scheduler.add(make_sequence(number, 5 + 17 * (number % 4), 2 + number % 5))
    return scheduler


@pytest.mark.parametrize("budget", [1, 5, 13])
def test_no_step_computes_more_tokens_than_max_batch_prefill_tokens(budget: int) -> None:
    scheduler = loaded(max_step_tokens=budget)
    sizes = [plan.num_tokens for plan in run(scheduler, 600)]
    assert max(sizes) == budget
    assert not scheduler.running and not scheduler.waiting


def test_a_long_prompt_never_holds_up_a_stream_for_longer_than_one_chunk() -> None:
    scheduler = make_scheduler(num_blocks=200, max_step_tokens=16, waiting_served_ratio=0)
    scheduler.add(make_sequence(1, max_new_tokens=60))
    list(run(scheduler, 1))
    scheduler.add(make_sequence(2, prompt_tokens=400))
    for plan in run(scheduler, 27):
        assert [row.sequence.sequence_id for row in plan.decodes][:1] == [1]


@pytest.mark.parametrize("batch", [1, 3])
def test_no_step_holds_more_sequences_than_max_batch_size(batch: int) -> None:
    scheduler = loaded(max_step_tokens=8, max_batch_size=batch)
    widths = []
    for plan in run(scheduler, 600):
        widths.append(len({s.sequence_id for s in plan.sequences}))
        assert len(scheduler.running) <= batch
    assert max(widths) == batch
    assert not scheduler.waiting


def test_the_cache_never_holds_more_than_max_batch_total_tokens() -> None:
    scheduler = loaded(max_step_tokens=64)
    most = 0
    for _ in run(scheduler, 600):
        held = sum(len(s.block_ids) for s in scheduler.running) * BLOCK_SIZE
        most = max(most, held)
        assert held <= 40 * BLOCK_SIZE
    assert most > 30 * BLOCK_SIZE and not scheduler.waiting


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, 128),
        ({"MAX_CONCURRENT_REQUESTS": "9"}, 9),
        ({"MAX_BATCH_SIZE": "4"}, 4),
        ({"MAX_BATCH_SIZE": "400", "MAX_BATCH_PREFILL_TOKENS": "64"}, 64),
    ],
)
def test_batch_size_from_settings(
    files: ModelFiles, environ: dict[str, str], expected: int
) -> None:
    settings = settings_of(**environ)
    assert batch_size(settings) == expected
    assert scheduler_limits(settings, INFO).max_batch_size == expected
    assert warmup_request(settings, INFO, files).max_batch_size == expected
    assert serving_limits(settings, INFO, files, 1000).max_batch_size == expected


def test_max_batch_total_tokens_bounds_the_blocks(files: ModelFiles) -> None:
    settings = settings_of(MAX_BATCH_TOTAL_TOKENS="1000")
    assert warmup_request(settings, INFO, files).max_blocks == 62  # of 16 tokens
    assert serving_limits(settings, INFO, files, 62).max_batch_total_tokens == 992
    # Without it: as many as the largest batch of the longest sequences could use.
    most = warmup_request(settings_of(MAX_BATCH_SIZE="2"), INFO, files).max_blocks
    assert most == 2 * 4096 // 16


# --- MAX_INPUT_TOKENS, MAX_TOTAL_TOKENS ----------------------------------------------------------


def test_lengths_from_settings(files: ModelFiles) -> None:
    def lengths(num_blocks: int = 1000, **environ: str) -> tuple[int, int]:
        settings = settings_of(**environ)
        warmup_request(settings, INFO, files)
        limits = serving_limits(settings, INFO, files, num_blocks)
        return limits.max_input_tokens, limits.max_total_tokens

    assert lengths() == (4095, 4096)
    assert lengths(num_blocks=10) == (159, 160)
    assert lengths(MAX_TOTAL_TOKENS="300") == (299, 300)
    assert lengths(MAX_TOTAL_TOKENS="300", MAX_INPUT_TOKENS="200") == (200, 300)
    assert lengths(MAX_TOTAL_TOKENS="300", MAX_INPUT_LENGTH="200") == (200, 300)
    with pytest.raises(SettingsError, match="4096 positions"):
        lengths(MAX_TOTAL_TOKENS="5000")
    with pytest.raises(SettingsError, match="below the longest total of 160"):
        lengths(num_blocks=10, MAX_INPUT_TOKENS="160")
    with pytest.raises(SettingsError, match="must be below"):
        lengths(MAX_TOTAL_TOKENS="300", MAX_INPUT_TOKENS="300")


def limited(**changes: int) -> FakeGenerator:
    return FakeGenerator(limits=replace(LIMITS, **changes))


def test_input_and_total_are_inclusive(make_validator: Callable[..., Validator]) -> None:
    text = "one two three"
    count = len(build(make_validator("llama"), native(text)).prompt_ids)
    exact = make_validator("llama", limited(max_input_tokens=count, max_total_tokens=count + 5))
    assert len(build(exact, native(text, max_new_tokens=5)).prompt_ids) == count
    with pytest.raises(ValidationError, match=f"must be <= {count + 5}"):
        build(exact, native(text, max_new_tokens=6))
    short = make_validator("llama", limited(max_input_tokens=count - 1))
    with pytest.raises(ValidationError, match=f"less than {count - 1} tokens. Given: {count}"):
        build(short, native(text, max_new_tokens=5))


# --- MAX_CONCURRENT_REQUESTS, MAX_QUEUE_TIME: every 429 says when to come again ------------------

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "a"}),
    ("/generate_stream", {"inputs": "a"}),
    ("/", {"inputs": "a"}),
    ("/", {"inputs": "a", "stream": True}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "stream": True}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/completions", {"prompt": "a", "stream": True}),
]


def assert_come_again(app: Starlette, path: str, body: dict[str, Any], message: str) -> None:
    response = post(app, path, body)
    assert (response.status_code, response.json()["error_type"]) == (429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    assert message in response.text


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_no_place_is_left(vision_app: App, path: str, body: dict[str, Any]) -> None:
    app = vision_app(max_concurrent_requests=0)
    assert_come_again(app, path, body, "MAX_CONCURRENT_REQUESTS")


@pytest.mark.parametrize(
    ("path", "body", "several"),
    [
        ("/generate", {"inputs": "a"}, {"parameters": {"best_of": 2, "do_sample": True}}),
        ("/v1/chat/completions", CHAT, {"n": 2}),
        ("/v1/completions", {"prompt": "a"}, {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": "a", "stream": True}, {"n": 2}),
    ],
)
def test_every_answer_that_is_asked_for_takes_a_place(
    vision_app: App, path: str, body: dict[str, Any], several: dict[str, Any]
) -> None:
    app = vision_app(max_concurrent_requests=1)
    assert post(app, path, body).status_code == 200
    assert_come_again(app, path, body | several, "MAX_CONCURRENT_REQUESTS")
    assert post(app, path, body).status_code == 200  # the refusal took no place


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_a_loop_without_room(vision_app: App, path: str, body: dict[str, Any]) -> None:
    assert_come_again(vision_app(FakeGenerator(full=True)), path, body, "overloaded")


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_longer_than_max_queue_time(vision_app: App, path: str, body: dict[str, Any]) -> None:
    late = Script(error=OverloadedError("waited too long (MAX_QUEUE_TIME)"))
    assert_come_again(vision_app(FakeGenerator(late)), path, body, "MAX_QUEUE_TIME")


def test_tokenize_takes_a_place_too(vision_app: App) -> None:
    body = {"inputs": "a"}
    assert_come_again(
        vision_app(max_concurrent_requests=0), "/tokenize", body, "MAX_CONCURRENT_REQUESTS"
    )


def test_max_queue_time_as_a_setting() -> None:
    assert settings_of().max_queue_time is None
    assert settings_of(MAX_QUEUE_TIME="").max_queue_time is None
    assert settings_of(MAX_QUEUE_TIME="2.5").max_queue_time == 2.5
    for text in ("0", "-1", "inf", "nan", "soon"):
        with pytest.raises(SettingsError, match="MAX_QUEUE_TIME"):
            settings_of(MAX_QUEUE_TIME=text)


# --- WAITING_SERVED_RATIO, MAX_WAITING_TOKENS ----------------------------------------------------


@pytest.mark.parametrize(("ratio", "needed"), [(0.0, 1), (0.3, 2), (0.5, 3), (1.0, 5)])
def test_waiting_served_ratio_lets_in_at_once(ratio: float, needed: int) -> None:
    """Five are running: so many must wait for one to be let in before its time."""
    scheduler = make_scheduler(
        waiting_served_ratio=ratio, max_waiting_tokens=1000, max_batch_size=20
    )
    for number in range(5):
        scheduler.add(make_sequence(number, max_new_tokens=100))
    list(run(scheduler, 1))
    for waiting in range(1, 6):
        scheduler.add(make_sequence(10 + waiting, max_new_tokens=100))
        (plan,) = run(scheduler, 1)
        assert bool(started(plan)) == (waiting == needed)
        if started(plan):
            break


@pytest.mark.parametrize("max_waiting_tokens", [0, 1, 4])
def test_a_waiting_request_is_let_in_in_time_whatever_the_load(max_waiting_tokens: int) -> None:
    """Also while a long prompt could fill every step by itself."""
    scheduler = make_scheduler(
        num_blocks=400, max_step_tokens=8, max_waiting_tokens=max_waiting_tokens
    )
    scheduler.add(make_sequence(1, max_new_tokens=300))
    list(run(scheduler, 1))
    scheduler.add(make_sequence(2, prompt_tokens=500))
    list(run(scheduler, max_waiting_tokens + 1))
    assert len(scheduler.running) == 2
    for newcomer in (3, 4, 5):
        scheduler.add(make_sequence(newcomer, max_new_tokens=300))
        plans = list(run(scheduler, max_waiting_tokens + 1))
        assert [newcomer in started(plan) for plan in plans].index(True) <= max_waiting_tokens
        assert all(plan.decodes for plan in plans)


def test_a_waiting_request_is_let_in_in_time_also_under_two_long_prompts() -> None:
    scheduler = make_scheduler(num_blocks=900, max_step_tokens=8, max_waiting_tokens=3)
    for number, prompt_tokens in ((1, 4), (2, 500), (3, 500)):
        scheduler.add(make_sequence(number, prompt_tokens, max_new_tokens=300))
        list(run(scheduler, 6))
    assert len(scheduler.running) == 3
    scheduler.add(make_sequence(4, max_new_tokens=3))
    assert 4 in [number for plan in run(scheduler, 4) for number in started(plan)]


# --- MAX_STEP_TILES, VISION_CACHE_TOKENS, PREFIX_CACHING, LOOKAHEAD, IMAGE_OVERFLOW ---------------


@pytest.mark.parametrize(("budget", "expected"), [(2, 3), (3, 3), (8, 6), (9, 9)])
def test_a_step_encodes_max_step_tiles_but_always_one_picture(budget: int, expected: int) -> None:
    scheduler = make_scheduler(
        max_step_tiles=budget, waiting_served_ratio=0, vision_cache_tokens=1000
    )
    for number in range(4):
        picture = PlacedImage(make_image(number), 1)  # 3 tiles
        scheduler.add(make_sequence(number, 8, images=(picture,)))
    plans = list(run(scheduler, 12))
    tiles = [sum(image.num_tiles for image in plan.images) for plan in plans]
    assert max(tiles) == expected and sum(tiles) == 12


def test_settings_reach_the_scheduler(files: ModelFiles) -> None:
    limits = scheduler_limits(
        settings_of(
            MAX_BATCH_PREFILL_TOKENS="100",
            MAX_WAITING_TOKENS="7",
            WAITING_SERVED_RATIO="1.5",
            MAX_STEP_TILES="11",
            VISION_CACHE_TOKENS="33",
            PREFIX_CACHING="false",
        ),
        INFO,
    )
    assert (limits.max_step_tokens, limits.max_waiting_tokens) == (100, 7)
    assert (limits.waiting_served_ratio, limits.max_step_tiles) == (1.5, 11)
    assert (limits.vision_cache_tokens, limits.prefix_caching) == (33, False)
    worst = warmup_request(settings_of(MAX_STEP_TILES="11"), INFO, files)
    assert (worst.max_step_tokens, worst.max_step_tiles) == (4096, 11)


@pytest.mark.parametrize(("device", "tiles"), [("cpu", 5), ("cuda:0", 8), ("xpu:0", 8)])
def test_tiles_of_a_step_where_nothing_is_asked(files: ModelFiles, device: str, tiles: int) -> None:
    info = replace(INFO, device=device)
    assert scheduler_limits(settings_of(), info).max_step_tiles == tiles
    assert warmup_request(settings_of(), info, files).max_step_tiles == tiles


class CountingShards(ScriptedShards):
    """Notes the most steps that were under way at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way = self.most_under_way = 0

    async def send(self, plan: StepPlan) -> int:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return await super().send(plan)

    async def receive(self, step_id: int) -> shard_pb2.StepReply:
        reply = await super().receive(step_id)
        self.under_way -= 1
        return reply


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_lookahead_is_how_many_steps_run_ahead(tokenizer: Tokenizer, lookahead: int) -> None:
    shards = CountingShards()

    async def use(core: Core) -> list[int]:
        streams: list[RequestStream] = [core.submit(request(new=12)) for _ in range(3)]
        return [len(events) for events in await asyncio.gather(*map(read, streams))]

    assert with_core(tokenizer, shards, use, lookahead=lookahead) == [12, 12, 12]
    assert shards.most_under_way == lookahead + 1


def test_image_overflow_as_a_setting() -> None:
    assert settings_of().image_overflow == "fit"
    assert settings_of(IMAGE_OVERFLOW="reject").image_overflow == "reject"
    with pytest.raises(SettingsError, match="IMAGE_OVERFLOW"):
        settings_of(IMAGE_OVERFLOW="crop")

"""The arithmetic of what fits, with round numbers."""

from dataclasses import replace

from tessera.launcher.capacity import Load, as_text, plan, step_bytes

MIB = 1 << 20
FOOTPRINT = {
    "world_size": 1,
    "max_positions": 100,
    "weights": 1000 * MIB,
    "kv_token": MIB,
    "forward_token": 1000,
    "vision_tile": 7_000_000,
    "sampling_row": 60_000,
    "feature_token": 100,
    "picture_tokens": 50,
}
LOAD = Load(
    step_tokens=4000,
    batch_size=10,
    step_tiles=None,
    vision_cache_tokens=900,
    total_tokens=None,
    block_size=10,
)
PROCESS_MIB = 280 + 220  # of a shard on the host; of launcher and router


def fits(memory_mib: int, **changes: object) -> tuple[int | None, int | None, bool | None]:
    load = replace(LOAD, **changes)  # type: ignore[arg-type]
    found = plan(FOOTPRINT, "cpu", load, memory_mib * MIB)
    return found.cache_tokens, found.sequences, found.fits


def test_the_largest_stage_of_a_step_counts_and_the_pictures_features() -> None:
    features = (900 + 2 * 50) * 100
    assert step_bytes(FOOTPRINT, "cpu", LOAD) == 5 * 7_000_000 + features
    assert step_bytes(FOOTPRINT, "cuda", LOAD) == 8 * 7_000_000 + features
    few_tiles = replace(LOAD, step_tiles=1)
    assert step_bytes(FOOTPRINT, "cpu", replace(few_tiles, step_tokens=9000)) == 9_100_000
    assert step_bytes(FOOTPRINT, "cpu", replace(few_tiles, batch_size=200)) == 12_100_000
    text_only = FOOTPRINT | {"picture_tokens": 0, "feature_token": 0}
    assert step_bytes(text_only, "cpu", LOAD) == 4_000_000


def test_cache_is_what_weights_processes_and_the_step_leave() -> None:
    # 200 MiB: 160 without the least that is left alone, less a step of 34 MiB.
    assert fits(1000 + PROCESS_MIB + 200) == (120, 1, True)
    assert fits(1000 + PROCESS_MIB + 5000) == (1000, 10, True)  # the batch needs no more
    assert fits(1000 + PROCESS_MIB + 5000, batch_total_tokens=325) == (320, 3, True)
    assert fits(1000 + PROCESS_MIB + 400, memory_fraction=0.5) == (120, 1, True)


def test_the_server_starts_with_a_shorter_window_unless_one_is_asked_for() -> None:
    memory = 1000 + PROCESS_MIB + 140
    assert fits(memory) == (60, 0, True)
    assert fits(memory, total_tokens=60) == (60, 1, True)
    assert fits(memory, total_tokens=61) == (60, 0, False)
    assert fits(1000 + PROCESS_MIB + 86) == (10, 0, False)
    assert fits(10) == (0, 0, False)


def test_what_is_needed_is_just_enough() -> None:
    needed = plan(FOOTPRINT, "cpu", LOAD, None).needed
    told = [plan(FOOTPRINT, "cpu", LOAD, needed + more).sequences for more in (MIB, -MIB)]
    assert told == [1, 0]


def test_shards_share_the_host_and_have_accelerators_of_their_own() -> None:
    two = FOOTPRINT | {"world_size": 2}
    host = plan(two, "cpu", LOAD, 2 * (1000 + 280 + 110 + 200) * MIB)
    assert host.cache_tokens == 120
    assert plan(two, "cuda", LOAD, (1000 + 500 + 200) * MIB).cache_tokens == 100


def test_the_table() -> None:
    facts = {
        "model": "owner/model",
        "model_type": "llava_next",
        "parameters": 7_566_747_648,
        "dtype": "bfloat16",
        "quantize": "int4",
        "device": "cpu",
        "total_tokens": 4096,
        "picture_tokens": 2928,
    }
    enough, short = (plan(FOOTPRINT, "cpu", LOAD, size * MIB) for size in (6500, 600))
    text = as_text(facts, [enough, short, plan(FOOTPRINT, "cpu", LOAD, None)])
    assert "7,566.7 million parameters in bfloat16 (QUANTIZE=int4), on cpu" in text
    rows = [line.split() for line in text.splitlines()[4:7]]
    assert rows[0][-2:] == ["1000", "10"]
    assert rows[1][-2:] == ["not", "enough"]
    assert rows[2][-2:] == ["-", "-"]

"""The simulator counts rightly, and the scheduler keeps its promises in simulated time."""

import importlib.util
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest

from benchmark.simulate import main
from benchmark.simulation import mixes, trace
from benchmark.simulation.device import CPU, H200, Device, Work
from benchmark.simulation.encoder_cache import EncoderCache
from benchmark.simulation.report import Numbers, gaps_of, percentile
from benchmark.simulation.run import Record, Simulation
from benchmark.simulation.scenarios import (
    PEERS,
    POLICIES,
    ROUTER_COSTS,
    SCENARIOS,
    Options,
    Scenario,
    make_simulation,
    simulate,
)
from benchmark.simulation.table import README, with_ratios
from benchmark.simulation.trace import Arrival, Lengths

SCALE = 0.5  # of the durations, for time's sake
BARE = Scenario("bare", "a trace of the test's own", 1.0, lambda rng, duration_s: [])
RESULTS = README.parent / "results" / "simulation.json"
LATENCIES = ("ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "e2e_p50_s", "e2e_p99_s")


@cache
def replayed(name: str, policy: str) -> dict[str, Numbers]:
    scenario = SCENARIOS[name]
    return simulate(policy, scenario, scenario.make_trace(1, SCALE), scenario.options)


def run(
    arrivals: list[Arrival], options: Options, policy: str = "tessera"
) -> tuple[Simulation, list[Record]]:
    simulation = make_simulation(policy, BARE, options)
    return simulation, simulation.run(arrivals)


def streams(count: int, tokens: int = 600) -> list[Arrival]:
    """Short questions with long answers, all sent at once."""
    prompt = Lengths(median=50, sigma=0.0, most=50)
    answer = Lengths(median=tokens, sigma=0.0, most=tokens)
    return mixes.chat(Random(0), [0.0] * count, prompt=prompt, answer=answer)


def picture_of(tokens: int, at_s: float) -> Arrival:
    """A question about a square picture, which becomes 2,928 tokens."""
    rng = Random(0)
    image = next(i for i in iter(lambda: trace.picture(rng), None) if i.num_tokens == tokens)
    ids, placed = trace.with_pictures(rng, [image], 20)
    return Arrival("picture", at_s, trace.request_of(ids, 64, placed), trace.text_ids(rng, 20))


def worst_step_s(device: Device, options: Options, context_len: int, running: int) -> float:
    """A step with the whole budget spent on the end of a prompt, and on pictures besides."""
    work = Work(tiles=options.max_step_tiles)
    work.add_chunk(context_len - options.max_batch_prefill_tokens, context_len)
    for _ in range(running):
        work.add_decode(1024)
    router = ROUTER_COSTS["tessera"]
    return device.step_s(work) + router.per_step_s + running * router.per_token_s


# The cost model


def at_its_limits(device: Device) -> Device:
    return replace(device, memory_bytes_per_s=4.3e12, flop_per_s=790e12, step_overhead_s=0.0)


@pytest.mark.parametrize(
    ("rows", "context_len", "expected_ms"),
    [(1, 512, 3.32), (32, 1024, 4.31), (128, 3000, 15.0)],
)
def test_decode_steps_cost_what_memory_traffic_says(
    rows: int, context_len: int, expected_ms: float
) -> None:
    work = Work()
    for _ in range(rows):
        work.add_decode(context_len)
    assert at_its_limits(H200).step_s(work) * 1000 == pytest.approx(expected_ms, rel=0.02)


def test_a_picture_costs_what_arithmetic_says() -> None:
    work = Work(tiles=5)
    work.add_chunk(0, 2980)
    assert at_its_limits(H200).step_s(work) * 1000 == pytest.approx(58, rel=0.03)


@pytest.mark.parametrize(("rows", "measured_ms"), [(1, 9.1), (8, 16.7), (32, 44.0)])
def test_cpu_decode_has_the_measured_shape(rows: int, measured_ms: float) -> None:
    """One thread was measured; two are between one and two times as fast."""
    work = Work()
    for _ in range(rows):
        work.add_decode(256)
    assert measured_ms / 2 < CPU.step_s(work) * 1000 < measured_ms


def test_chunks_of_a_prompt_cost_no_less_than_the_whole() -> None:
    whole, parts = Work(), [Work(), Work()]
    whole.add_chunk(0, 4000)
    parts[0].add_chunk(0, 1000)
    parts[1].add_chunk(1000, 4000)
    assert sum(part.attention_pairs for part in parts) == whole.attention_pairs
    assert sum(map(H200.step_s, parts)) >= H200.step_s(whole)


def test_percentile_is_a_value_of_the_sample() -> None:
    assert [percentile([3, 1, 2], share) for share in (0.01, 0.5, 0.9, 1.0)] == [1, 2, 3, 3]
    assert percentile([], 0.5) == 0


# Conservation


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_request_ends_and_every_token_is_counted(name: str, policy: str) -> None:
    scenario = SCENARIOS[name]
    arrivals = scenario.make_trace(2, 0.15)
    simulation = make_simulation(policy, scenario, scenario.options)
    records = simulation.run(arrivals)
    assert {record.arrival for record in records} == set(arrivals)
    for record in records:
        assert record.ended_s is not None
        lost_patience = record.has_left and not record.token_times
        if not record.was_refused and not lost_patience:
            assert len(record.token_times) == record.arrival.num_output_tokens
        assert record.token_times == sorted(record.token_times)
    assert simulation.policy.num_running == 0
    assert simulation.policy.pool.num_free == simulation.policy.pool.num_blocks
    check_budgets(simulation, scenario.options, policy)


def check_budgets(simulation: Simulation, options: Options, policy: str) -> None:
    if policy != "tgi":  # which rounds its budget up to whole blocks
        assert simulation.totals.max_step_tokens <= options.max_batch_prefill_tokens
        assert simulation.totals.max_running <= options.max_batch_size
    assert simulation.totals.busy_s <= simulation.totals.end_s


def test_more_than_fit_inside_are_refused() -> None:
    simulation, records = run(streams(5, tokens=10), Options(max_concurrent_requests=3))
    assert [record.was_refused for record in records] == [False] * 3 + [True] * 2
    assert simulation.totals.end_s > 0


# Determinism and sanity


@pytest.mark.parametrize("policy", POLICIES)
def test_a_seed_gives_the_same_numbers_again(policy: str) -> None:
    scenario = SCENARIOS["bursts"]

    def numbers(seed: int) -> dict[str, Numbers]:
        return simulate(policy, scenario, scenario.make_trace(seed, 0.3), scenario.options)

    assert numbers(3) == numbers(3)
    assert numbers(3) != numbers(4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["chat", "pictures"])
def test_a_device_twice_as_fast_is_not_worse(name: str, policy: str) -> None:
    slow = SCENARIOS[name]
    device = replace(
        slow.device,
        step_overhead_s=slow.device.step_overhead_s / 2,
        memory_bytes_per_s=slow.device.memory_bytes_per_s * 2,
        flop_per_s=slow.device.flop_per_s * 2,
    )
    arrivals = slow.make_trace(1, SCALE)
    numbers = simulate(policy, replace(slow, device=device), arrivals, slow.options)["all"]
    before = replayed(name, policy)["all"]
    assert all(numbers[column] <= before[column] for column in LATENCIES)


def test_lookahead_hides_the_router() -> None:
    ahead, _ = run(streams(32), Options(lookahead=1))
    behind, _ = run(streams(32), Options(lookahead=0))
    assert ahead.totals.end_s < 0.9 * behind.totals.end_s
    assert ahead.totals.busy_s > 0.97 * ahead.totals.end_s


# Promises


@pytest.mark.parametrize(
    ("newcomer", "context_len"),
    [
        (mixes.long_prompts(Random(0), [1.0])[0], 30_000),
        (picture_of(2928, at_s=1.0), 4096),
    ],
    ids=["30k-token prompt", "2,928-token picture"],
)
def test_a_newcomer_stalls_streams_for_one_chunk_at_most(
    newcomer: Arrival, context_len: int
) -> None:
    options = Options()
    _, records = run([*streams(24), newcomer], options)
    late = next(record for record in records if record.arrival is newcomer)
    running = [record for record in records if record is not late]
    assert all(record.token_times[-1] > late.token_times[0] for record in running)
    stalls = [max(gaps_of(record)) for record in running]
    assert max(stalls) <= worst_step_s(H200, options, context_len, running=24)


def test_the_tenth_turn_computes_neither_the_picture_nor_old_turns() -> None:
    chat = mixes.conversations(Random(5), [0.0], turns=10, think_s=2.0)
    simulation, records = run(chat, Options())
    last, before = records[-1], records[-2]
    assert simulation.totals.images == 1
    known = len(before.arrival.request.prompt_ids) + len(before.arrival.output_ids)
    assert known - last.sequence.num_cached <= 16  # the block that was not full
    peer, _ = run(chat, Options(), "tgi")
    assert peer.totals.images == 10


@pytest.mark.parametrize("max_waiting_tokens", [0, 5, 20])
def test_waiting_ends_after_max_waiting_tokens(max_waiting_tokens: int) -> None:
    long = mixes.long_prompts(Random(0), [0.7])
    for company in (streams(40), [*streams(40), *long]):
        newcomer = mixes.chat(Random(1), [1.0])[0]
        options = Options(max_waiting_tokens=max_waiting_tokens, waiting_served_ratio=1e9)
        _, records = run([*company, newcomer], options)
        waited = next(r for r in records if r.arrival is newcomer)
        steps_ahead = options.lookahead + 1
        assert waited.started_step - waited.arrived_step <= max_waiting_tokens + steps_ahead


PAIRS = [(name, peer) for name in SCENARIOS for peer in PEERS]


@pytest.mark.parametrize(("name", "peer"), PAIRS)
def test_goodput_is_not_below_first_in_first_out(name: str, peer: str) -> None:
    ours, theirs = (replayed(name, policy)["all"] for policy in ("tessera", peer))
    assert ours["good_share"] >= theirs["good_share"] - 0.02  # a handful of requests


def test_few_tiles_a_step_let_text_pass_pictures() -> None:
    scenario = SCENARIOS["picture bursts"]
    options = replace(scenario.options, max_step_tiles=8)
    ours = simulate("tessera", scenario, scenario.make_trace(1, SCALE), options)["all"]
    peer = replayed("picture bursts", "vllm")["all"]
    assert ours["good_share"] >= peer["good_share"] - 0.02
    assert ours["longest_stall_s"] < peer["longest_stall_s"]


def test_a_greedy_key_delays_itself() -> None:
    ours, peer = (replayed("greedy key", policy)["others"] for policy in ("tessera", "tgi"))
    assert ours["ttft_p50_s"] < peer["ttft_p50_s"] / 5


# The model of vLLM v1


def test_vllm_shares_prefixes_and_pictures() -> None:
    chat = mixes.conversations(Random(5), [0.0], turns=10, think_s=2.0)
    simulation, records = run(chat, Options(), "vllm")
    assert simulation.totals.images == 1
    known = len(records[-2].arrival.request.prompt_ids) + len(records[-2].arrival.output_ids)
    assert known - records[-1].sequence.num_cached <= 16


def test_vllm_preempts_and_loses_nothing() -> None:
    simulation, records = run(streams(32, tokens=200), Options(kv_tokens=4096), "vllm")
    assert simulation.policy.num_preemptions > 0
    assert all(len(record.token_times) == 200 for record in records)
    assert simulation.policy.pool.num_free == simulation.policy.pool.num_blocks


def test_vllm_lets_nobody_overtake() -> None:
    long = mixes.long_prompts(Random(1), [0.1], tokens=7500)
    short = mixes.chat(Random(2), [0.2], prompt=Lengths(median=50, sigma=0.0, most=50))
    options = Options(kv_tokens=8192)  # no room for the long one beside the others
    started = {}
    for policy in ("vllm", "tessera"):
        _, records = run([*streams(12), *long, *short], options, policy)
        started[policy] = [record.started_step for record in records[-2:]]
    assert started["vllm"] == sorted(started["vllm"])
    assert started["tessera"][1] < started["tessera"][0]


@pytest.mark.parametrize("name", ["pictures", "picture bursts"])
def test_vllm_keeps_no_more_features_than_a_step_has_tokens(name: str) -> None:
    most = SCENARIOS[name].options.max_batch_prefill_tokens
    assert 0 < replayed(name, "vllm")["all"]["max_feature_tokens"] <= most


def test_vllm_plans_ahead_only_if_told() -> None:
    ahead, _ = run(streams(32), Options(lookahead=1), "vllm")
    behind, _ = run(streams(32), Options(lookahead=0), "vllm")
    assert ahead.totals.end_s < behind.totals.end_s


def test_encoder_cache_forgets_what_nobody_reads() -> None:
    rng = Random(0)
    first, second = (trace.picture(rng) for _ in range(2))
    cache = EncoderCache(first.num_tokens + second.num_tokens - 1)
    assert not cache.hold(first, 1) and cache.make_room(first.num_tokens)
    cache.store(first, 1)
    assert cache.hold(first, 2) and not cache.make_room(second.num_tokens)
    cache.release(first, 1)
    assert not cache.make_room(second.num_tokens)
    cache.release(first, 2)
    assert cache.make_room(second.num_tokens) and cache.used == 0
    assert not cache.hold(first, 3)


# The command and what it wrote


def test_the_command_writes_what_it_shows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--scenario", "cpu chats", "--scale", "0.2", "--set", "lookahead=0"]
    assert main([*arguments, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert set(report["scenarios"]["cpu chats"]["policies"]) == set(POLICIES)
    assert "cpu chats" in capsys.readouterr().out


def test_readme_shows_the_stored_results() -> None:
    report = json.loads(RESULTS.read_text())
    assert set(report["scenarios"]) == set(SCENARIOS)
    assert RESULTS.stat().st_size < 100_000
    text = README.read_text()
    assert with_ratios(text, report) == text, "run `python -m benchmark.simulate --readme`"
    assert all(set(result["policies"]) == set(POLICIES) for result in report["scenarios"].values())


def test_readme_shows_charts_that_are_there_and_small() -> None:
    charts = re.findall(r"!\[.*\]\((results/\w+\.svg)\)", README.read_text())
    assert {(README.parent / chart) for chart in charts} == set(RESULTS.parent.glob("*.svg"))
    assert all((README.parent / chart).stat().st_size < 60_000 for chart in charts)


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="charts need `pip install -e '.[bench]'`"
)
def test_stored_charts_show_the_stored_results(tmp_path: Path) -> None:
    from benchmark.simulation.plots import write_plots

    for path in write_plots(json.loads(RESULTS.read_text()), tmp_path):
        assert shape(path) == shape(RESULTS.parent / path.name), "run with --plots"


def shape(path: Path) -> list[str]:
    """What an SVG file draws, without what another version of matplotlib may write otherwise."""
    return re.findall(r"<use [^>]*x=\"[^>]*>", path.read_text())


def test_charts_are_asked_for_in_words_when_matplotlib_is_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--plots", str(tmp_path)])
    assert ".[bench]" in capsys.readouterr().err


def test_readme_is_written_from_all_results_only() -> None:
    with pytest.raises(SystemExit):
        main(["--readme", "--policy", "vllm"])

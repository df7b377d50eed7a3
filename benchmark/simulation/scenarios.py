"""The loads that policies are compared on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from benchmark.simulation import mixes
from benchmark.simulation.device import CPU, H200, Device
from benchmark.simulation.mixes import poisson_times
from benchmark.simulation.policy import Policy, TesseraPolicy
from benchmark.simulation.report import Numbers, Objective, summarise
from benchmark.simulation.run import RouterCost, Simulation
from benchmark.simulation.tgi import TgiPolicy
from benchmark.simulation.trace import LAYOUT, Arrival, Lengths
from benchmark.simulation.vllm import VllmPolicy
from tessera.router.blocks import BlockPool
from tessera.router.limits import STEP_TILES
from tessera.router.scheduler import SchedulerLimits
from tessera.router.settings import RouterSettings

BLOCK_SIZE = 16
PEERS = ("tgi", "vllm")
POLICIES = ("tessera", *PEERS)
_ROUTER = RouterSettings()

ROUTER_COSTS = {
    # A Python router whose steps run ahead, and a compiled one that waits for each reply. The
    # second is one call over a local socket and nothing for text, which favours it. The third is
    # a Python scheduler like the first, and nothing for text, as another process makes it: its
    # time until the client sees a token is left out, which favours it.
    "tessera": RouterCost(per_step_s=0.5e-3, per_token_s=40e-6),
    "tgi": RouterCost(per_step_s=0.35e-3, per_token_s=0.0),
    "vllm": RouterCost(per_step_s=0.5e-3, per_token_s=0.0),
}


@dataclass(frozen=True, slots=True)
class Options:
    """How the server is set; the same for every policy. Defaults are the router's own."""

    max_batch_prefill_tokens: int = _ROUTER.max_batch_prefill_tokens
    max_batch_size: int = 256
    max_waiting_tokens: int = _ROUTER.max_waiting_tokens
    waiting_served_ratio: float = _ROUTER.waiting_served_ratio
    max_step_tiles: int = STEP_TILES
    vision_cache_tokens: int = _ROUTER.vision_cache_tokens
    prefix_caching: bool = True
    lookahead: int = _ROUTER.lookahead
    max_concurrent_requests: int = 256
    kv_tokens: int = 600_000  # what an H200 has room for beside the weights

    def limits(self) -> SchedulerLimits:
        """As the scheduler is told."""
        return SchedulerLimits(
            max_step_tokens=self.max_batch_prefill_tokens,
            max_batch_size=self.max_batch_size,
            max_waiting_tokens=self.max_waiting_tokens,
            waiting_served_ratio=self.waiting_served_ratio,
            max_step_tiles=self.max_step_tiles,
            vision_cache_tokens=self.vision_cache_tokens,
            prefix_caching=self.prefix_caching,
        )


H200_OBJECTIVE = Objective(ttft_s=0.5, ttft_per_prompt_token_s=1e-4, per_token_s=0.04)
CPU_OBJECTIVE = Objective(ttft_s=1.0, ttft_per_prompt_token_s=2e-3, per_token_s=0.1)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load, a device and what its clients expect."""

    name: str
    about: str
    duration_s: float  # during which requests come
    trace: Callable[[Random, float], list[Arrival]]
    device: Device = H200
    sees: bool = True  # the model takes pictures
    options: Options = Options()
    objective: Objective = H200_OBJECTIVE

    def make_trace(self, seed: int, scale: float = 1.0) -> list[Arrival]:
        """The requests that come in `scale` times the scenario's duration."""
        return self.trace(Random(f"{seed}/{self.name}"), self.duration_s * scale)


def make_policy(name: str, scenario: Scenario, options: Options) -> Policy:
    """A policy over an empty cache."""
    pool = BlockPool(options.kv_tokens // BLOCK_SIZE, BLOCK_SIZE)
    if name == "tgi":
        # Its prefix cache is off for models that see.
        caches = options.prefix_caching and not scenario.sees
        return TgiPolicy(options.limits(), pool, prefix_caching=caches)
    if name == "vllm":
        return VllmPolicy(options.limits(), pool, largest_picture=LAYOUT.max_tokens)
    return TesseraPolicy(options.limits(), pool)


def make_simulation(name: str, scenario: Scenario, options: Options) -> Simulation:
    """A policy on the scenario's device."""
    return Simulation(
        make_policy(name, scenario, options),
        scenario.device,
        ROUTER_COSTS[name],
        lookahead=0 if name == "tgi" else options.lookahead,
        max_concurrent_requests=options.max_concurrent_requests,
    )


def simulate(
    name: str, scenario: Scenario, trace: list[Arrival], options: Options
) -> dict[str, Numbers]:
    """Replay a trace; see `report.summarise`."""
    simulation = make_simulation(name, scenario, options)
    records = simulation.run(trace)
    return summarise(simulation.policy, records, simulation.totals, scenario.objective)


def _chat(rng: Random, duration_s: float) -> list[Arrival]:
    return mixes.chat(rng, poisson_times(rng, 18, duration_s))


def _pictures(rng: Random, duration_s: float) -> list[Arrival]:
    return mixes.pictures(rng, poisson_times(rng, 7, duration_s))


def _picture_chats(rng: Random, duration_s: float) -> list[Arrival]:
    times = poisson_times(rng, 2.5, duration_s)
    return mixes.conversations(rng, times, turns=10, think_s=3.0)


def _long_among_short(rng: Random, duration_s: float) -> list[Arrival]:
    short = mixes.chat(rng, poisson_times(rng, 8, duration_s))
    short += mixes.pictures(rng, poisson_times(rng, 1, duration_s))
    return short + mixes.long_prompts(rng, [at + 0.5 for at in _every(4.0, duration_s)])


def _bursts(rng: Random, duration_s: float) -> list[Arrival]:
    base = mixes.chat(rng, poisson_times(rng, 4, duration_s))
    waves = [at for at in _every(5.0, duration_s) for _ in range(80)]
    load = base + mixes.chat(rng, waves, kind="burst")
    return mixes.impatient(rng, load, share=0.1)


def _picture_bursts(rng: Random, duration_s: float) -> list[Arrival]:
    base = mixes.chat(rng, poisson_times(rng, 4, duration_s))
    waves = [at + 1.0 for at in _every(10.0, duration_s) for _ in range(30)]
    return base + mixes.pictures(rng, waves)


def _greedy_key(rng: Random, duration_s: float) -> list[Arrival]:
    documents = Lengths(median=3000, sigma=0.3, most=8000)
    flood = mixes.chat(rng, [0.0] * 150, kind="greedy", key="greedy", prompt=documents)
    others = []
    for number in range(8):
        times = poisson_times(rng, 0.5, duration_s)
        others += mixes.chat(rng, times, kind="others", key=f"key {number}")
    return flood + others


def _little_memory(rng: Random, duration_s: float) -> list[Arrival]:
    return mixes.chat(rng, poisson_times(rng, 10, duration_s))


def _cpu_chats(rng: Random, duration_s: float) -> list[Arrival]:
    return mixes.conversations(
        rng,
        poisson_times(rng, 0.15, duration_s),
        turns=5,
        think_s=4.0,
        has_picture=False,
        question=Lengths(median=60, sigma=0.6, most=400),
        answer=Lengths(median=60, sigma=0.5, most=200),
        max_new_tokens=256,
    )


def _every(period_s: float, duration_s: float) -> list[float]:
    return [index * period_s for index in range(max(1, int(duration_s / period_s)))]


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("chat", "text chat, 18 requests/s", 30.0, _chat),
        Scenario("pictures", "1 to 3 pictures each, 7 requests/s", 30.0, _pictures),
        Scenario("picture chats", "10 turns about one picture, 2.5 chats/s", 16.0, _picture_chats),
        Scenario(
            "long among short",
            "a 30k-token prompt every 4 s among chat and pictures",
            32.0,
            _long_among_short,
        ),
        Scenario("bursts", "80 requests at once every 5 s, 10 % leave", 20.0, _bursts),
        Scenario("picture bursts", "30 picture requests at once every 10 s", 20.0, _picture_bursts),
        Scenario(
            "greedy key", "one key sends 150 documents at once, 8 others chat", 20.0, _greedy_key
        ),
        Scenario(
            "little memory",
            "text chat with room for 16k tokens",
            20.0,
            _little_memory,
            options=Options(kv_tokens=16_384),
        ),
        Scenario(
            "cpu chats",
            "text chats of 5 turns on 2 cores",
            60.0,
            _cpu_chats,
            device=CPU,
            sees=False,
            options=Options(max_batch_size=128, max_concurrent_requests=128, kv_tokens=65_536),
            objective=CPU_OBJECTIVE,
        ),
    )
}


def changed(options: Options, changes: dict[str, float]) -> Options:
    """Options with some set otherwise, by name."""
    kinds = {name: type(getattr(options, name)) for name in changes}
    return replace(options, **{name: kinds[name](value) for name, value in changes.items()})

"""A whole engine on the GPU, step for step beside the reference on the processor, in float32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tessera.proto import shard_pb2
from tessera.shard.backends import load_backend
from tessera.shard.engine import Engine
from tessera.shard.models import load_model
from tessera.shard.models.base import Placement
from tessera.shard.parallel import Group
from tessera.shard.warmup import warm_up
from tests.shard.backends.test_launching import SAMPLING, prompt, steps
from tests.step_columns import DecodeRow, columns

MAX_CONTEXT = 320
REQUEST = shard_pb2.WarmupRequest(
    max_step_tokens=256, max_context_len=MAX_CONTEXT, max_batch_size=40, max_blocks=900
)


def engine_of(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Engine:
    backend = load_backend(device, "reference" if device == "cpu" else "auto")
    placement = Placement(backend, Group(), dtype)
    engine = Engine(load_model(folder, placement), placement, block_size=16)
    warm_up(engine, REQUEST, 0.5, None)
    return engine


@pytest.fixture(scope="module")
def reference(checkpoint: Callable[[str], Path]) -> Engine:
    return engine_of(checkpoint("mistral"), "cpu")


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[[str], Path]) -> Engine:
    return engine_of(checkpoint("mistral"), "cuda")


def run(engine: Engine, steps: list[shard_pb2.Step]) -> list[list[int]]:
    """Tokens of each step, every one launched before the one before it was read."""
    under_way, tokens = None, []
    for step in steps:
        following = engine.launch(step)
        if under_way is not None:
            tokens.append(list(engine.finish(under_way).tokens.token_ids))
        under_way = following
    assert under_way is not None
    tokens.append(list(engine.finish(under_way).tokens.token_ids))
    engine.reset()
    return tokens


def test_the_own_kernels_are_used(engine: Engine) -> None:
    """A GPU on which they do not work is served with torch's operations; this must not be one."""
    from tessera.shard.backends.triton_cuda import TritonCudaBackend

    backend = engine.placement.backend
    assert isinstance(backend, TritonCudaBackend)
    assert backend.flash
    assert engine.runs_ahead and engine._graphs is not None and engine._graphs.num_bytes > 0


@pytest.mark.parametrize("name", SAMPLING)
def test_tokens_are_those_of_the_reference(engine: Engine, reference: Engine, name: str) -> None:
    sampling = shard_pb2.SamplingParams(**SAMPLING[name])  # type: ignore[arg-type]
    expected = [list(reference.run(step).tokens.token_ids) for step in steps(sampling)]
    reference.reset()
    assert run(engine, steps(sampling)) == expected


def many(count: int, answer: int) -> list[shard_pb2.Step]:
    """A batch of prompts that then decode together."""
    greedy = shard_pb2.SamplingParams()
    made = [shard_pb2.Step(chunks=[prompt(n, 5, greedy) for n in range(count)])]
    for number in range(1, answer):
        rows = [DecodeRow(sequence_id=n, context_len=5 + number) for n in range(count)]
        made.append(shard_pb2.Step(step_id=number, decodes=columns(*rows)))
    return made


@pytest.mark.parametrize("count", [1, 3, 4, 13, 40])
def test_recorded_steps_give_what_launched_ones_give(engine: Engine, count: int) -> None:
    replayed = run(engine, many(count, 30))
    graphs, engine._graphs = engine._graphs, None
    try:
        assert run(engine, many(count, 30)) == replayed
    finally:
        engine._graphs = graphs


@pytest.mark.parametrize("name", SAMPLING)
def test_launching_does_not_wait_for_the_gpu(engine: Engine, name: str) -> None:
    sampling = shard_pb2.SamplingParams(**SAMPLING[name])  # type: ignore[arg-type]
    run(engine, steps(sampling))  # compiles what is new
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in steps(sampling)[:3]:
            launched = engine.launch(step)
            torch.cuda.set_sync_debug_mode("default")
            # A wait in the model's part is an error that is taken for that of a sequence.
            assert not engine.finish(launched).failures
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.reset()


def test_steps_leave_no_memory_behind(engine: Engine) -> None:
    run(engine, many(40, 10))
    before = torch.cuda.memory_allocated()
    for count in (1, 7, 40, 23, 2):
        run(engine, many(count, 20))
    assert torch.cuda.memory_allocated() <= before


def test_a_long_prompt_takes_torchs_kernel(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the next token may differ; how likely each is must not."""
    from tessera.shard.backends import triton_backend

    monkeypatch.setattr(triton_backend, "FLASH_TOKENS", 200)
    calls = []
    plain = triton_backend.flash_attend
    monkeypatch.setattr(
        triton_backend, "flash_attend", lambda *given: (calls.append(1), plain(*given))
    )
    scored = prompt(0, 250, shard_pb2.SamplingParams(prompt_logprobs=True))
    step = shard_pb2.Step(chunks=[scored])
    exact = engine_of(checkpoint("mistral"), "cpu").run(step).prompt_logprobs[0].logprobs
    half = engine_of(checkpoint("mistral"), "cuda", torch.bfloat16)
    calls.clear()  # of the trial and the warm-up
    got = half.run(step).prompt_logprobs[0].logprobs
    assert calls
    errors = torch.tensor(list(got)) - torch.tensor(list(exact))
    assert float(errors.abs().mean()) < 0.1

"""The models give transformers' logits at every position, and its greedy tokens."""

from collections.abc import Callable

import pytest
import torch

from tests import checkpoints
from tests.shard.models.cases import (
    ASPECTS,
    ATOL,
    BACKENDS,
    image_case,
    mixed_cases,
    text_case,
    three_images,
)
from tests.shard.models.driver import Runner
from tests.shard.models.oracle import Oracle

Oracles = Callable[[str], Oracle]
Runners = Callable[..., Runner]

WITH_IMAGES = [kind for kind in checkpoints.KINDS if kind not in ("llama", "mistral")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_text(kind: str, backend: str, oracle: Oracles, runner: Runners) -> None:
    case = text_case(oracle(kind))
    ours = runner(kind, backend).logits(case.prompt)
    torch.testing.assert_close(ours, oracle(kind).logits(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_one_image(kind: str, aspect: str, oracle: Oracles, runner: Runners) -> None:
    case = image_case(oracle(kind), aspect)
    ours = runner(kind).logits(case.prompt)
    torch.testing.assert_close(ours, oracle(kind).logits(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_three_images(kind: str, backend: str, oracle: Oracles, runner: Runners) -> None:
    case = three_images(oracle(kind))
    ours = runner(kind, backend).logits(case.prompt)
    torch.testing.assert_close(ours, oracle(kind).logits(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_several_prompts_in_one_step(
    kind: str, backend: str, oracle: Oracles, runner: Runners
) -> None:
    cases = mixed_cases(oracle(kind))
    batch = runner(kind, backend).batch_logits([case.prompt for case in cases])
    for case, ours in zip(cases, batch, strict=True):
        torch.testing.assert_close(ours, oracle(kind).logits(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_greedy_ids(kind: str, backend: str, oracle: Oracles, runner: Runners) -> None:
    """32 tokens, with prompts joining while others decode."""
    cases = mixed_cases(oracle(kind))
    ours = runner(kind, backend).greedy([case.prompt for case in cases], 32)
    assert ours == [oracle(kind).greedy(case, 32) for case in cases]


def test_an_image_changes_the_logits(oracle: Oracles, runner: Runners) -> None:
    """The tests above would prove nothing if the features did not reach the text."""
    first, second = (image_case(oracle("next-mistral"), aspect) for aspect in ("square", "4:3"))
    same_ids = len(second.prompt.ids)
    a = runner("next-mistral").logits(first.prompt)[same_ids - 30]
    b = runner("next-mistral").logits(second.prompt)[same_ids - 30]
    assert (a - b).abs().max() > 0.1

"""A prompt computed in pieces gives the same logits as at once, wherever it is cut."""

from collections.abc import Callable

import pytest
import torch

from tests.shard.models.cases import ATOL, BACKENDS, image_case, text_case, three_images
from tests.shard.models.driver import Runner
from tests.shard.models.oracle import Oracle

Oracles = Callable[[str], Oracle]
Runners = Callable[..., Runner]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", ["next-mistral", "next-custom"])
def test_image_prompt_cut_anywhere(
    kind: str, chunk: int, backend: str, oracle: Oracles, runner: Runners
) -> None:
    """Each first chunk moves all later cuts by one: every offset of the image is a cut once."""
    case = image_case(oracle(kind), "square")
    expected = oracle(kind).logits(case)
    for first in range(1, chunk + 1):
        ours = runner(kind, backend).logits(case.prompt, chunk, first)
        torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


def test_three_images_cut_anywhere(oracle: Oracles, runner: Runners) -> None:
    case = three_images(oracle("next-yi"))
    expected = oracle("next-yi").logits(case)
    for first in range(1, 65, 7):
        ours = runner("next-yi").logits(case.prompt, 64, first)
        torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 7, 25, 64])
def test_sliding_window_in_chunks(
    chunk: int, backend: str, oracle: Oracles, runner: Runners
) -> None:
    """The window (24) is shorter than the prompt, and than some chunks."""
    case = text_case(oracle("mistral"))
    assert len(case.prompt.ids) > 48
    ours = runner("mistral", backend).logits(case.prompt, chunk)
    torch.testing.assert_close(ours, oracle("mistral").logits(case), atol=ATOL, rtol=0)


def test_the_sliding_window_hides_what_is_before_it(oracle: Oracles, runner: Runners) -> None:
    """Three layers pass on three windows at most; a change before that is not seen."""
    case = text_case(oracle("mistral"))
    ids = case.prompt.ids * 2
    changed = [ids[0], 100, *ids[2:]]
    last = [runner("mistral").logits(oracle("mistral").text_case(x).prompt) for x in (ids, changed)]
    assert torch.equal(last[0][80:], last[1][80:])
    assert not torch.equal(last[0][20], last[1][20])

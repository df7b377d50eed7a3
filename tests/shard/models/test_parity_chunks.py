"""A prompt computed in pieces gives the same logits as at once, wherever it is cut."""

from collections.abc import Callable

import pytest
import torch

from tests.shard.models.cases import ATOL, BACKENDS, image_case, text_case, three_images
from tests.shard.models.driver import Prompt, Runner
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["next-mistral", "mistral"])
def test_the_last_rows_alone_are_those_of_all(kind: str, backend: str, runner: Runners) -> None:
    """Two prompts, one cut into chunks, beside a sequence of which there is one new token."""
    ours = runner(kind, backend)
    prompts = [Prompt([5 + n % 90 for n in range(length)]) for length in (40, 33, 20)]
    hidden: list[list[torch.Tensor]] = []
    for last_only in (False, True):
        sequences = [ours.start(prompt) for prompt in prompts]
        steps = [[40, 7, 19], [0, 26, 1]]
        hidden.append([])
        for counts in steps:
            work = [pair for pair in zip(sequences, counts, strict=True) if pair[1]]
            with torch.inference_mode():
                hidden[-1] += [rows[-1].cpu() for rows in ours.step(work, last_only)]
        for sequence in sequences:
            ours.end(sequence)
    torch.testing.assert_close(hidden[1], hidden[0], atol=ATOL, rtol=0)
    assert all(row.abs().max() > 0 for row in hidden[0])


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

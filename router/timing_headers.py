"""The `x-` headers that tell where a request's time went."""

from collections.abc import Sequence

from tessera.router.generation import Generator
from tessera.router.notices import warnings_header
from tessera.router.server_info import ServerInfo
from tessera.router.ticket import Generation
from tessera.router.token_streams import Collected


def compute_headers(
    info: ServerInfo, generator: Generator, generations: Sequence[Generation]
) -> dict[str, str]:
    """What is known before the first token: the device, characters of all prompts, warnings."""
    characters = sum(len(generation.request.prompt_text) for generation in generations)
    return {
        "x-compute-type": info.compute_type(generator),
        "x-compute-characters": str(characters),
        **warnings_header(generations),
    }


def timing_headers(collected: Sequence[Collected], compute_s: float) -> dict[str, str]:
    """Sums over the given generations; whole milliseconds, but `x-compute-time` in seconds."""
    timings = [one.completion.timings for one in collected]
    inference_s = sum(timing.inference for timing in timings)
    generated = sum(one.completion.generated_tokens for one in collected)
    return {
        "x-compute-time": f"{compute_s:.6f}",
        "x-total-time": _ms(sum(timing.total for timing in timings)),
        "x-validation-time": _ms(sum(timing.validation for timing in timings)),
        "x-queue-time": _ms(sum(timing.queue for timing in timings)),
        "x-inference-time": _ms(inference_s),
        "x-time-per-token": _ms(inference_s / max(1, generated)),
        "x-prompt-tokens": str(sum(one.generation.stream.prompt_tokens for one in collected)),
        "x-generated-tokens": str(generated),
    }


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))

"""`usage` of the OpenAI replies: tokens, and how fast they came."""

from collections.abc import Sequence
from typing import Any

from tessera.router.request import Completion
from tessera.router.schemas import OpenAIBody
from tessera.router.ticket import Generation


def usage(
    generations: Sequence[Generation], completions: Sequence[Completion], body: OpenAIBody
) -> dict[str, Any]:
    """What a request used.

    Each prompt counts once, however many answers to it were asked for. The answers are computed at
    the same time, so the seconds are those of the slowest, and rates are tokens of all of them over
    these seconds. A prompt's time runs from its first step to its first token; the wait before that
    is part of `total_time_sec` only. The names of times and rates are mistral.rs's.

    Args:
        generations: of all prompts, for each as many as answers were asked for.
        completions: how they ended, in any order.
        body: the request.
    """
    streams = [generation.stream for generation in generations[:: body.copies]]
    prompt_tokens = sum(stream.prompt_tokens for stream in streams)
    generated = sum(completion.generated_tokens for completion in completions)
    if body.wants_no_answer:
        generated = 0
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(stream.cached_tokens for stream in streams),
            "image_tokens": sum(stream.image_tokens for stream in streams),
        },
        **_speed(prompt_tokens, generated, completions),
    }


def _speed(
    prompt_tokens: int, generated: int, completions: Sequence[Completion]
) -> dict[str, float]:
    timings = [completion.timings for completion in completions]
    prompt_s = max((one.prompt for one in timings), default=0.0)
    completion_s = max((one.inference - one.prompt for one in timings), default=0.0)
    total_s = max((one.total for one in timings), default=0.0)
    return {
        "avg_tok_per_sec": _rate(prompt_tokens + generated, prompt_s + completion_s),
        "avg_prompt_tok_per_sec": _rate(prompt_tokens, prompt_s),
        "avg_compl_tok_per_sec": _rate(generated, completion_s),
        "total_time_sec": round(total_s, 6),
        "total_prompt_time_sec": round(prompt_s, 6),
        "total_completion_time_sec": round(completion_s, 6),
    }


def _rate(tokens: int, seconds: float) -> float:
    """Tokens per second; 0 where nothing was timed."""
    return round(tokens / seconds, 3) if seconds > 0 else 0.0

"""The kinds of load the scenarios are made of."""

from random import Random

from benchmark.simulation.trace import (
    Arrival,
    Lengths,
    picture,
    poisson,
    request_of,
    text_ids,
    with_pictures,
)

CHAT_PROMPT = Lengths(median=300, sigma=1.0, most=4000)
CHAT_ANSWER = Lengths(median=200, sigma=0.7, most=1000)
QUESTION = Lengths(median=40, sigma=0.6, most=400)
PICTURE_ANSWER = Lengths(median=120, sigma=0.6, most=500)
MAX_NEW_TOKENS = 1024
"""What clients allow; most answers end long before."""


def chat(
    rng: Random,
    times: list[float],
    *,
    kind: str = "chat",
    key: str = "",
    prompt: Lengths = CHAT_PROMPT,
    answer: Lengths = CHAT_ANSWER,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Arrival]:
    """Single questions in text."""
    return [
        Arrival(
            kind,
            at,
            request_of(text_ids(rng, prompt.draw(rng)), max_new_tokens, key=key),
            text_ids(rng, min(max_new_tokens, answer.draw(rng))),
        )
        for at in times
    ]


def pictures(
    rng: Random, times: list[float], *, popular_share: float = 0.2, num_popular: int = 5
) -> list[Arrival]:
    """Questions about one to three pictures, some of which many clients send."""
    popular = [picture(rng) for _ in range(num_popular)]
    arrivals = []
    for at in times:
        count = rng.choices((1, 2, 3), (0.7, 0.2, 0.1))[0]
        images = [
            rng.choice(popular) if rng.random() < popular_share else picture(rng)
            for _ in range(count)
        ]
        ids, placed = with_pictures(rng, images, QUESTION.draw(rng))
        answer = text_ids(rng, PICTURE_ANSWER.draw(rng))
        arrivals.append(Arrival("picture", at, request_of(ids, MAX_NEW_TOKENS, placed), answer))
    return arrivals


def conversations(
    rng: Random,
    times: list[float],
    *,
    turns: int,
    think_s: float,
    has_picture: bool = True,
    question: Lengths = QUESTION,
    answer: Lengths = PICTURE_ANSWER,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[Arrival]:
    """Chats of several turns; each turn sends all that was said, the answers included.

    Args:
        think_s: mean time between an answer's end and the next question.
    """
    arrivals = []
    for at in times:
        images = [picture(rng)] if has_picture else []
        ids, placed = with_pictures(rng, images, question.draw(rng))
        last: Arrival | None = None
        for turn in range(turns):
            said = text_ids(rng, min(max_new_tokens, answer.draw(rng)))
            kind = "first turn" if turn == 0 else "later turn"
            when = at if last is None else rng.expovariate(1 / think_s)
            last = Arrival(kind, when, request_of(ids, max_new_tokens, placed), said, follows=last)
            arrivals.append(last)
            ids += said + text_ids(rng, question.draw(rng))
    return arrivals


def long_prompts(
    rng: Random, times: list[float], *, tokens: int = 30_000, max_new_tokens: int = 512
) -> list[Arrival]:
    """Questions about a whole document."""
    answer = Lengths(median=200, sigma=0.5, most=max_new_tokens)
    return chat(
        rng,
        times,
        kind="long",
        prompt=Lengths(median=tokens, sigma=0.0, most=tokens),
        answer=answer,
        max_new_tokens=max_new_tokens,
    )


def impatient(rng: Random, arrivals: list[Arrival], *, share: float) -> list[Arrival]:
    """The same load, but a share of its clients leave, before the first token or later."""
    result = []
    for arrival in arrivals:
        patience_s, leaves_after = None, None
        if rng.random() < share:
            if rng.random() < 0.5:
                patience_s = rng.uniform(0.1, 2.0)
            else:
                leaves_after = rng.randint(1, len(arrival.output_ids))
        result.append(
            Arrival(
                arrival.kind,
                arrival.at_s,
                arrival.request,
                arrival.output_ids,
                patience_s=patience_s,
                leaves_after=leaves_after,
            )
        )
    return result


def poisson_times(rng: Random, per_s: float, duration_s: float) -> list[float]:
    """Arrival times of independent clients; at least one."""
    return list(poisson(rng, per_s, duration_s)) or [0.0]

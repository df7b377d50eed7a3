"""What the scheduler promises, held to it through HTTP by the real processes."""

import asyncio
import base64
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tessera.launcher import demo as demo_package
from tests.end_to_end.asking import (
    Body,
    alone,
    ask,
    endless,
    question,
    streaming,
    together,
    token_ids,
    words,
)
from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

STEP_TOKENS, BATCH_SIZE, CACHE_TOKENS = 32, 8, 320  # the first two are bounds of buckets
ROUNDS = 50
BLOCK_SIZE = 16

DEMO = Path(demo_package.__file__).parent
PICTURE, SAMPLES = DEMO / "picture.png", DEMO / "samples"

SAMPLED = {"do_sample": True, "temperature": 1.3, "seed": 11}
SEEDED = ask(question(1, (56, 56)), 8, **SAMPLED)
COMPANY = [
    ask(question(20), 7),
    ask(question(21, (112, 112)), 4),
    ask(question(22, (56, 112), (30, 30)), 5),
    ask(question(23), 9, do_sample=True, seed=5, top_p=0.9),
    ask(question(24), 2, repetition_penalty=1.5),
    ask(question(21, (112, 112)), 6, cache_salt="another tenant"),
]


@pytest.fixture(scope="module")
def stack(checkpoint: Callable[[str], Path]) -> Iterator[Stack]:
    """Budgets so small that prompts are cut, sequences wait and blocks run short."""
    flags = ["--num-shard", "2", "--dtype", "float32", "--max-batch-size", str(BATCH_SIZE)]
    flags += ["--max-batch-prefill-tokens", str(STEP_TOKENS), "--max-total-tokens"]
    flags += [str(CACHE_TOKENS), "--max-batch-total-tokens", str(CACHE_TOKENS)]
    with running(checkpoint("next-mistral"), *flags) as stack:
        yield stack


@pytest.fixture(scope="module")
def plain_stack(checkpoint: Callable[[str], Path]) -> Iterator[Stack]:
    """Nothing is kept and nothing is sent ahead."""
    off = {"LOOKAHEAD": "0", "PREFIX_CACHING": "false", "VISION_CACHE_TOKENS": "0"}
    flags = ["--num-shard", "2", "--dtype", "float32"]
    with running(checkpoint("next-mistral"), *flags, **off) as stack:
        yield stack


@pytest.fixture(scope="module")
def single_stack(checkpoint: Callable[[str], Path]) -> Iterator[Stack]:
    """One request at a time, six inside the server."""
    flags = ["--num-shard", "1", "--dtype", "float32", "--max-batch-size", "1"]
    flags += ["--max-concurrent-requests", "6", "--max-input-tokens", "80"]
    with running(checkpoint("next-mistral"), *flags, IMAGE_OVERFLOW="reject") as stack:
        yield stack


# --- the same answer alone and in any company ----------------------------------------------------


def test_a_seeded_answer_is_the_same_in_50_shuffled_companies(stack: Stack) -> None:
    rng = random.Random(3)
    bodies = [SEEDED, *COMPANY]
    expected = alone(stack, bodies)

    async def one_round(client: httpx.AsyncClient) -> None:
        order = rng.sample(range(len(bodies)), rng.randrange(3, len(bodies) + 1))
        order += [] if 0 in order else [0]
        asked = (token_ids(client, varied(bodies[n], rng), rng.random() * 0.05) for n in order)
        assert await asyncio.gather(*asked) == [expected[n] for n in order]

    async def go() -> None:
        async with stack.client() as client:
            for _ in range(ROUNDS):
                await one_round(client)

    asyncio.run(go())


def varied(body: Body, rng: random.Random) -> Body:
    """With or without the cache, and with another rank in the queue: the same question."""
    changes = {"cache_prompt": rng.random() < 0.5, "priority": rng.randrange(-1, 2)}
    return body | {"parameters": body["parameters"] | changes}


def test_lookahead_and_caches_change_no_answer(stack: Stack, plain_stack: Stack) -> None:
    bodies = [SEEDED, *COMPANY]
    expected = alone(plain_stack, bodies)
    assert alone(stack, bodies) == expected
    assert asyncio.run(together(plain_stack, bodies)) == expected


def test_clients_do_not_notice_preemptions_nor_is_a_budget_exceeded(stack: Stack) -> None:
    bodies = [ask(question(40 + n), 40) for n in range(BATCH_SIZE + 3)]
    bodies[3:6] = [ask(question(60 + n), 40, **SAMPLED, cache_prompt=n > 0) for n in range(3)]
    bodies[7:9] = [ask(question(70 + n, (112, 56)), 40) for n in range(2)]
    expected = alone(stack, bodies)
    preemptions = stack.metric("tessera_num_preemptions_total")
    assert asyncio.run(together(stack, bodies)) == expected
    assert stack.metric("tessera_num_preemptions_total") > preemptions
    assert steps_up_to(stack, BATCH_SIZE, "decode") == steps(stack, "decode")
    assert steps_up_to(stack, STEP_TOKENS, "prefill") == steps(stack, "prefill")
    stack.wait_metric("tessera_kv_cache_used_tokens", 0)


def steps(stack: Stack, kind: str) -> float:
    return stack.metric(f'tessera_step_tokens_count{{method="{kind}"}}')


def steps_up_to(stack: Stack, tokens: int, kind: str) -> float:
    """Steps of at most so many tokens."""
    return stack.metric(f'tessera_step_tokens_bucket{{le="{tokens:.1f}",method="{kind}"}}')


def step_tokens(stack: Stack, kind: str) -> float:
    return stack.metric(f'tessera_step_tokens_sum{{method="{kind}"}}')


# --- prompts in chunks ---------------------------------------------------------------------------


def test_a_stream_gets_a_token_in_every_step_in_which_a_long_prompt_is_computed(
    stack: Stack,
) -> None:
    long = ask(question(80, (112, 112), (56, 112), (40, 260)), 2, cache_prompt=False)

    async def go() -> None:
        async with stack.client() as client, streaming(client, endless("go on", 250)) as events:
            await anext(events)
            steps_before, tokens_before = steps(stack, "prefill"), step_tokens(stack, "prefill")
            reply = await client.post("/generate", json=long)
            num_steps = steps(stack, "prefill") - steps_before
            num_tokens = step_tokens(stack, "prefill") - tokens_before
            prompt_tokens = int(reply.headers["x-prompt-tokens"])
            assert prompt_tokens > 5 * STEP_TOKENS
            assert num_steps >= -(-prompt_tokens // (STEP_TOKENS - 1))
            assert num_tokens == prompt_tokens + num_steps  # one of each step is the stream's
            for _ in range(int(num_steps)):
                assert (await anext(events))["choices"]

    asyncio.run(go())


# --- who is let in -------------------------------------------------------------------------------


def test_a_request_that_does_not_fit_now_is_overtaken_by_one_that_does(stack: Stack) -> None:
    large = {"prompt": words(1, 290), "max_tokens": 2}  # with the stream, more than the cache
    small = ask("[INST] small [/INST]", 3)

    async def go() -> None:
        async with stack.client() as client:
            async with streaming(client, endless(words(2, 60), 200)) as events:
                await anext(events)
                waiting = asyncio.create_task(client.post("/v1/completions", json=large))
                await asyncio.to_thread(stack.wait_metric, "tgi_queue_size", 1)
                await token_ids(client, small)
                assert not waiting.done()
                assert stack.metric("tgi_queue_size") == 1
                await anext(events)  # the stream still holds its blocks
            assert (await waiting).status_code == 200

    asyncio.run(go())


Queued = tuple[str, int, str]
"""A request's name, its priority and its client's token."""


def order_served(stack: Stack, queued: list[Queued]) -> list[str]:
    """The names in the order in which they are let in, one at a time."""
    served: list[str] = []

    async def go() -> None:
        async with stack.client() as client:

            async def wait_turn(name: str, priority: int, token: str) -> None:
                body = endless(name, 500, priority=priority)
                async with streaming(client, body, authorization=f"Bearer {token}") as events:
                    await anext(events)
                    served.append(name)  # the others are let in when this one has hung up

            async with streaming(client, endless("first"), authorization="Bearer other") as events:
                await anext(events)
                turns = []
                for place, request in enumerate(queued, start=1):
                    turns.append(asyncio.create_task(wait_turn(*request)))
                    await asyncio.to_thread(stack.wait_metric, "tgi_queue_size", place)
            await asyncio.gather(*turns)

    asyncio.run(go())
    return served


def test_a_higher_priority_overtakes_those_that_wait(single_stack: Stack) -> None:
    queued = [("a", 0, "x"), ("b", -1, "x"), ("c", 0, "x"), ("d", 50, "x")]
    assert order_served(single_stack, queued) == ["d", "a", "c", "b"]


def test_a_client_with_many_requests_delays_only_itself(single_stack: Stack) -> None:
    queued = [("a", 0, "many"), ("b", 0, "many"), ("c", 0, "many"), ("d", 0, "few")]
    assert order_served(single_stack, queued) == ["a", "d", "b", "c"]


def test_more_than_max_concurrent_requests_are_told_to_come_again(single_stack: Stack) -> None:
    async def go() -> None:
        async with single_stack.client() as client:
            async with streaming(client, endless("go on")) as events:
                await anext(events)
                waiting = [
                    asyncio.create_task(client.post("/generate", json=ask("me", 2)))
                    for _ in range(4)
                ]
                await asyncio.to_thread(single_stack.wait_metric, "tgi_queue_size", 4)
                two = {"prompt": "both of us", "n": 2, "temperature": 1, "max_tokens": 2}
                refused = await client.post("/v1/completions", json=two)  # one place is left
                assert refused.status_code == 429
                waiting.append(asyncio.create_task(client.post("/generate", json=ask("me", 2))))
                await asyncio.to_thread(single_stack.wait_metric, "tgi_queue_size", 5)
                refused = await client.post("/generate", json=ask("me too", 2))
                assert refused.status_code == 429
                assert refused.json()["error_type"] == "overloaded"
                assert "MAX_CONCURRENT_REQUESTS" in refused.json()["error"]
                assert int(refused.headers["retry-after"]) >= 1
                assert "choices" in await anext(events)
            assert [(await task).status_code for task in waiting] == [200] * 5
            assert (await client.post("/generate", json=ask("me too", 2))).status_code == 200

    asyncio.run(go())


def test_a_picture_that_is_too_large_is_rejected_with_the_numbers(single_stack: Stack) -> None:
    reply = single_stack.post("/generate", ask(question(90, (112, 112)), 2))
    assert reply.status_code == 422
    message = reply.json()["error"]
    assert "88" in message and "80" in message, message
    assert "IMAGE_OVERFLOW" in message and "MAX_INPUT_TOKENS" in message, message


# --- what is computed once -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Iterator[Stack]:
    """The demo model as it starts by default, but exact."""
    with running(None, "--num-shard", "1", "--dtype", "float32") as stack:
        yield stack


def chat(stack: Stack, messages: list[Body], **fields: object) -> tuple[str, int, int]:
    """The answer, the prompt's tokens and how many of them were in the cache."""
    body = {"messages": messages, "max_tokens": 40, "temperature": 0, **fields}
    reply = stack.post("/v1/chat/completions", body)
    assert reply.status_code == 200, reply.text
    usage = reply.json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return reply.json()["choices"][0]["message"]["content"], usage["prompt_tokens"], cached


def about(path: Path, text: str) -> Body:
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [picture, {"type": "text", "text": text}]}


def whole_blocks(tokens: int) -> int:
    return tokens // BLOCK_SIZE * BLOCK_SIZE


def encoded(stack: Stack) -> float:
    return stack.metric("tessera_vision_cache_misses_total")


def test_a_second_turn_about_a_picture_computes_neither_the_picture_nor_the_first(
    demo: Stack,
) -> None:
    messages = [about(PICTURE, "What is in the picture?")]
    answer, first, cached = chat(demo, messages)
    assert answer and cached == 0
    pictures, hits = encoded(demo), demo.metric("tessera_prefix_cache_hits_total")
    messages += [{"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": "How many objects are there?"}]
    again, second, cached = chat(demo, messages)
    assert whole_blocks(first) <= cached < second
    assert encoded(demo) == pictures
    assert demo.metric("tessera_prefix_cache_hits_total") == hits + cached
    assert chat(demo, messages, cache_prompt=False)[0] == again  # as if nothing had been kept


def test_generated_tokens_are_found_by_the_next_request(demo: Stack) -> None:
    text = "[INST] Tell me all you know. [/INST]"
    prompt = [span["id"] for span in demo.post("/tokenize", {"inputs": text}).json()]
    [generated] = alone(demo, [ask(text, 40)])
    body = {"prompt": [*prompt, *generated, *words(3, 5)], "max_tokens": 1}
    usage = demo.post("/v1/completions", body).json()["usage"]
    computed = len(prompt) + len(generated) - 1  # the last one was not needed
    assert whole_blocks(computed) > whole_blocks(len(prompt))
    assert usage["prompt_tokens_details"]["cached_tokens"] == whole_blocks(computed)


def test_salts_and_cache_prompt_keep_prompts_apart(demo: Stack) -> None:
    messages = [about(SAMPLES / "sign.png", "What does the sign say?")]
    answer, prompt_tokens, _ = chat(demo, messages, cache_prompt=False)
    pictures = encoded(demo)
    findable = whole_blocks(prompt_tokens - 1)  # the last one is always computed
    answers = [
        chat(demo, messages),  # the one before has left nothing
        chat(demo, messages),
        chat(demo, messages, cache_prompt=False),
        chat(demo, messages, cache_salt="a"),
        chat(demo, messages, cache_salt="b"),
        chat(demo, messages, cache_salt="a"),
        chat(demo, messages),
    ]
    expected = [0, findable, 0, 0, 0, findable, findable]
    assert answers == [(answer, prompt_tokens, cached) for cached in expected]
    assert encoded(demo) == pictures


def test_the_same_words_about_another_picture_find_nothing(demo: Stack) -> None:
    shown = SAMPLES / "sign.png", SAMPLES / "tall.png"
    sign, tall = ([about(path, "Which one is this?")] for path in shown)
    expected, _, _ = chat(demo, tall, cache_prompt=False)
    assert chat(demo, sign)[0] != expected
    answer, _, cached = chat(demo, tall)
    assert answer == expected
    assert cached < BLOCK_SIZE * 2  # what stands before the picture


def test_a_picture_that_many_ask_about_at_once_is_encoded_once(demo: Stack) -> None:
    pictures, hits = encoded(demo), demo.metric("tessera_vision_cache_hits_total")
    data = base64.b64encode((SAMPLES / "plate.png").read_bytes()).decode()
    bodies = [
        ask(f"[INST] {before}<image>{data}</image>\nWhat is it? [/INST]", 4, cache_prompt=False)
        for before in ("", "Look: ", "Well, ", "See here: ", "And now: ", "Please: ")
    ]
    answers = asyncio.run(together(demo, bodies))
    assert all(answers)
    assert encoded(demo) == pictures + 1
    assert demo.metric("tessera_vision_cache_hits_total") == hits + len(bodies) - 1
    assert alone(demo, bodies) == answers


def test_without_caches_everything_is_computed_each_time(plain_stack: Stack) -> None:
    pictures = encoded(plain_stack)
    messages = [about(PICTURE, "What is it?")]
    first, second = chat(plain_stack, messages), chat(plain_stack, messages)
    assert first == second
    assert first[2] == 0
    assert encoded(plain_stack) == pictures + 2
    assert plain_stack.metric("tessera_prefix_cache_hits_total") == 0
    plain_stack.wait_metric("tessera_vision_cache_tokens", 0)

"""OpenAI's own client against the demo model: what its types promise is what comes."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.end_to_end.stack import Stack, running

pytestmark = pytest.mark.timeout(300)

DEMO = Path(__file__).parents[2] / "launcher" / "demo"
PICTURE = base64.b64encode((DEMO / "picture.png").read_bytes()).decode()


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    flags = ("--num-shard", "1", "--dtype", "float32", "--served-model-name", "demo")
    with running(DEMO / "model", *flags) as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="-", max_retries=0)


def question(text: str, detail: str = "auto") -> Any:
    url = {"url": f"data:image/png;base64,{PICTURE}", "detail": detail}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def test_a_reply_holds_what_its_types_say(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="gpt-4o",
        messages=question("How many shapes are there?"),
        max_completion_tokens=30,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    choice = reply.choices[0]
    assert (reply.model, reply.object, choice.finish_reason) == ("demo", "chat.completion", "stop")
    assert choice.message.content and choice.logprobs and choice.logprobs.content
    spelt = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert spelt.decode().strip() == choice.message.content.strip()
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)
    usage: Any = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.prompt_tokens_details.image_tokens < usage.prompt_tokens
    assert usage.avg_compl_tok_per_sec > 0 and usage.avg_prompt_tok_per_sec > 0
    assert usage.total_time_sec >= usage.total_prompt_time_sec + usage.total_completion_time_sec


def test_a_written_marker_is_the_pictures_place(client: openai.OpenAI) -> None:
    """Before its text or in it, the same prompt; and never a second picture."""

    def prompt_tokens(messages: Any) -> int:
        reply = client.chat.completions.create(model="demo", messages=messages, max_tokens=1)
        assert reply.usage is not None
        return reply.usage.prompt_tokens

    plain = prompt_tokens(question("What is shown?"))
    assert prompt_tokens(question("<image>\nWhat is shown?")) == plain
    assert prompt_tokens(question("What is shown?", "low")) < plain


def test_stop_text_is_left_out(client: openai.OpenAI) -> None:
    def answer(**fields: Any) -> Any:
        return client.chat.completions.create(
            model="demo",
            messages=question("How many shapes are there?"),
            max_tokens=30,
            temperature=0,
            **fields,
        ).choices[0]

    whole = answer().message.content
    stop = whole[3:5]
    stopped = answer(stop=stop)
    assert stopped.message.content == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    forced = answer(max_completion_tokens=2)
    assert forced.finish_reason == "length"


def test_a_seed_repeats_and_copies_differ(client: openai.OpenAI) -> None:
    def answers(seed: int) -> list[str | None]:
        reply = client.chat.completions.create(
            model="demo",
            messages=question("What is shown?"),
            max_tokens=12,
            temperature=2,
            seed=seed,
            n=2,
            stream=False,
        )
        return [choice.message.content for choice in reply.choices]

    assert answers(5) == answers(5)
    assert len({*answers(5), *answers(6)}) > 2


def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI) -> None:
    """How harnesses rank given texts: an echo with logprobs and no tokens."""

    def scored(prompt: str, **fields: Any) -> Any:
        return client.completions.create(
            model="demo", prompt=prompt, echo=True, logprobs=0, temperature=0, **fields
        )

    text = "How many shapes are there? There are"
    alone = scored(text, max_tokens=0)
    logprobs = alone.choices[0].logprobs
    assert alone.choices[0].text == text and alone.usage.completion_tokens == 0
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == alone.usage.prompt_tokens
    continued = scored(text, max_tokens=3, logit_bias={"2": -100})  # no end of the answer
    scores = continued.choices[0].logprobs.token_logprobs
    assert scores[1 : len(logprobs.tokens)] == pytest.approx(logprobs.token_logprobs[1:], abs=1e-4)
    assert continued.choices[0].text.startswith(text)
    place = continued.choices[0].logprobs.text_offset[len(logprobs.tokens)]
    assert place == len(text)


def test_logit_bias_forbids_and_forces(client: openai.OpenAI) -> None:
    def first_token(**fields: Any) -> str:
        reply = client.completions.create(
            model="demo", prompt="How many", max_tokens=1, temperature=0, logprobs=1, **fields
        )
        assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.tokens
        return reply.choices[0].logprobs.tokens[0]

    favoured = next(str(token) for token in range(300, 400))
    usual = first_token()
    assert first_token(logit_bias={favoured: 100}) != usual


def test_an_answer_has_the_form_asked_for(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="demo",
        messages=question("How many shapes are there?"),
        max_tokens=40,
        temperature=0,
        extra_body={"structured_outputs": {"choice": ["many", "few"]}},
    )
    assert reply.choices[0].message.content in ("many", "few")
    with pytest.raises(openai.UnprocessableEntityError, match="response_format"):
        client.chat.completions.create(
            model="demo",
            messages=question("How many?"),
            response_format={"type": "yaml"},  # type: ignore[arg-type]
        )


def test_a_final_message_is_continued(client: openai.OpenAI) -> None:
    messages = [*question("How many shapes are there?"), {"role": "assistant", "content": "There"}]

    def answer(**extra: Any) -> str | None:
        return (
            client.chat.completions.create(
                model="demo", messages=messages, max_tokens=20, temperature=0, extra_body=extra
            )
            .choices[0]
            .message.content
        )

    assert answer() == answer(continue_final_message=True, add_generation_prompt=False)
    assert answer() != answer(continue_final_message=False)


def test_a_template_given_at_the_start_is_used() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    flags = ("--num-shard", "1", "--chat-template", template)
    with running(DEMO / "model", *flags) as stack:
        client = openai.OpenAI(base_url=f"{stack.url}/v1", api_key="-", max_retries=0)
        usage = client.chat.completions.create(
            model="demo", messages=[{"role": "developer", "content": "a"}], max_tokens=1
        ).usage
        by_hand = client.completions.create(model="demo", prompt="<system>a", max_tokens=1).usage
        assert usage is not None and by_hand is not None
        assert usage.prompt_tokens == by_hand.prompt_tokens
        with pytest.raises(openai.UnprocessableEntityError, match="CHAT_TEMPLATE"):
            client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "a"}],
                extra_body={"chat_template": "x"},
            )

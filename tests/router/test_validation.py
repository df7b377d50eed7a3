import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from tessera.router.chat_template import ChatTemplate
from tessera.router.errors import NotReadyError, TemplateError, ValidationError
from tessera.router.native_bodies import GenerateBody
from tessera.router.request import PreparedImage, Request
from tessera.router.schemas import ChatBody, CompletionBody
from tessera.router.validation import Plan, Validator

MakeValidator = Callable[..., Validator]


def native(text: str = "Hello there", **parameters: Any) -> GenerateBody:
    return GenerateBody.model_validate({"inputs": text, "parameters": parameters or None})


def chat(content: Any = "Hello", **fields: Any) -> ChatBody:
    return ChatBody.model_validate({"messages": [{"role": "user", "content": content}], **fields})


def completion(prompt: Any = "Hello", **fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"prompt": prompt, **fields})


def plan(validator: Validator, body: Any, *, streaming: bool = False) -> Plan:
    match body:
        case GenerateBody():
            return validator.plan_native(body, streaming=streaming)
        case ChatBody():
            return validator.plan_chat(body)
    return validator.plan_completion(body)


def build_all(validator: Validator, body: Any) -> list[Request]:
    return asyncio.run(validator.build(plan(validator, body), time.perf_counter()))


def build(validator: Validator, body: Any) -> Request:
    (request,) = build_all(validator, body)
    return request


def picture(width: int = 30, height: int = 20) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def image_part() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture()}"}}


# The beginnings of these sentences are what clients of text-generation-inference match on.
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
        ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
        (
            {"best_of": 2, "do_sample": True, "seed": 1},
            "`seed` must not be set when `best_of` > 1",
        ),
        ({"temperature": 0.0}, "`temperature` must be strictly positive"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty` must be strictly positive"),
        ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
        ({"presence_penalty": -2.5}, "`presence_penalty` must be >= -2.0 and <= 2.0"),
        ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0"),
        ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
        ({"min_p": 1.5}, "`min_p` must be >= 0.0 and <= 1.0"),
        ({"top_k": 0}, "`top_k` must be strictly positive"),
        ({"top_k": 2**40}, "`top_k` must be <= "),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"max_new_tokens": -5}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"stop": [""]}, "`stop` sequences must have from 1 to 1000 characters"),
        ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
        ({"truncate": 0}, "`truncate` must be strictly positive and less than 480. Given: 0"),
        ({"truncate": 481}, "`truncate` must be strictly positive and less than 480. Given: 481"),
        ({"grammar": {"type": "regex", "value": {}}}, "`value` must be a regular expression"),
        ({"adapter_id": "x"}, "no adapters are loaded"),
        ({"watermark": True}, "`watermark` is not supported"),
        (
            {"max_new_tokens": 512},
            "`inputs` tokens + `max_new_tokens` must be <= 512. Given: ",
        ),
    ],
)
def test_native_rules(
    make_validator: MakeValidator, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        build_all(make_validator("llama"), native(**parameters))
    assert message in str(refused.value)
    assert refused.value.status == 422


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"best_of": 2, "do_sample": True},
            "`best_of` != 1 is not supported when streaming tokens",
        ),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
def test_rules_of_streams(
    make_validator: MakeValidator, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        plan(make_validator("llama"), native(**parameters), streaming=True)


def test_best_of_can_be_switched_off(make_validator: MakeValidator) -> None:
    validator = make_validator("llama", max_best_of=1)
    with pytest.raises(ValidationError, match="`best_of` != 1 is not allowed"):
        plan(validator, native(best_of=2, do_sample=True))


def test_empty_prompts(make_validator: MakeValidator) -> None:
    validator = make_validator("llama")
    for body in (
        native(""),
        completion(""),
        completion([]),
        completion([[]]),
        completion(["a", ""]),
    ):
        with pytest.raises(ValidationError, match="cannot be empty"):
            plan(validator, body)


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"max_new_tokens": 5}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"temperature": 0.3}, 0.3),
        ({"top_k": 3}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"typical_p": 0.5}, 1.0),
        ({"temperature": 1e-30}, 0.0),
    ],
)
def test_native_api_is_greedy_unless_sampling_is_mentioned(
    make_validator: MakeValidator, parameters: dict[str, Any], temperature: float
) -> None:
    request = build(make_validator("llama"), native(**parameters))
    assert request.sampling.temperature == temperature


@pytest.mark.parametrize(("given", "temperature"), [(None, 1.0), (0, 0.0), (0.0, 0.0), (0.7, 0.7)])
def test_openai_api_samples_unless_temperature_is_zero(
    make_validator: MakeValidator, given: float | None, temperature: float
) -> None:
    for body in (chat(temperature=given), completion(temperature=given)):
        assert build(make_validator("next-vicuna"), body).sampling.temperature == temperature


def test_every_parameter_arrives(make_validator: MakeValidator) -> None:
    request = build(
        make_validator("llama"),
        native(
            temperature=0.5,
            top_k=7,
            top_p=0.9,
            typical_p=0.8,
            min_p=0.1,
            repetition_penalty=1.2,
            frequency_penalty=0.3,
            presence_penalty=0.4,
            seed=2**64 - 1,
            top_n_tokens=2,
            max_new_tokens=9,
            stop=["END"],
            decoder_input_details=True,
        ),
    )
    sampling, stopping = request.sampling, request.stopping
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 0.9)
    assert (sampling.typical_p, sampling.min_p, sampling.repetition_penalty) == (0.8, 0.1, 1.2)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.3, 0.4)
    assert (sampling.seed, sampling.top_n_tokens) == (2**64 - 1, 2)
    assert sampling.prompt_logprobs
    assert (stopping.max_new_tokens, stopping.stop_sequences) == (9, ("END",))
    assert stopping.include_stop_text
    assert request.prompt_text == "Hello there"
    assert request.validation_s > 0


def test_openai_parameters_arrive(make_validator: MakeValidator) -> None:
    request = build(
        make_validator("next-vicuna"),
        chat(
            max_tokens=5,
            max_completion_tokens=6,
            top_p=1.0,
            top_k=-1,
            stop="END",
            seed=-1,
            frequency_penalty=1.0,
            presence_penalty=-1.0,
            logit_bias={"3": -100, "4": 1.5},
            logprobs=True,
            top_logprobs=3,
        ),
    )
    sampling, stopping = request.sampling, request.stopping
    assert (stopping.max_new_tokens, stopping.stop_sequences) == (6, ("END",))
    assert not stopping.include_stop_text
    assert (sampling.top_p, sampling.top_k, sampling.seed) == (1.0, 0, 2**64 - 1)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (1.0, -1.0)
    assert sampling.logit_bias == ((3, -100.0), (4, 1.5))
    assert sampling.top_n_tokens == 3


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": 0}, "max_tokens", "`max_tokens` must be strictly positive"),
        ({"max_tokens": -5}, "max_tokens", "`max_tokens` must be strictly positive"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "must be strictly positive"),
        ({"max_completion_tokens": -5}, "max_completion_tokens", "must be strictly positive"),
        ({"top_p": 1.1}, "top_p", "`top_p` must be > 0.0 and <= 1.0"),
        ({"temperature": -0.1}, "temperature", "must be strictly positive"),
        ({"n": 17}, "n", "`n` must be > 0 and <= 16. Given: 17"),
        ({"n": 0}, "n", "`n` must be > 0"),
        ({"top_logprobs": 2}, "top_logprobs", "needs `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20. Given: 21"),
        ({"logit_bias": {"999999": 1}}, "logit_bias", "token ids below"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids below"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "values must be"),
        ({"tools": [{"function": {"name": "a b"}}]}, "tools", "must have 1 to 64 characters"),
        ({"tool_choice": "required"}, "tool_choice", "needs `tools`"),
        ({"response_format": {"type": "xml"}}, "response_format", "must be text, json_object"),
    ],
)
def test_openai_rules_name_the_parameter(
    make_validator: MakeValidator, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        build_all(make_validator("next-vicuna"), chat(**fields))
    assert (refused.value.param, message in str(refused.value)) == (param, True)


def test_harmless_wishes_are_granted(make_validator: MakeValidator) -> None:
    body = chat(tools=[], tool_choice="auto", response_format={"type": "text"}, n=None, stop=None)
    assert build(make_validator("next-vicuna"), body).sampling.temperature == 1.0
    body = chat(tools=[{"function": {"name": "f"}}], tool_choice="none")
    assert build(make_validator("next-vicuna"), body)


def test_completion_rules(make_validator: MakeValidator) -> None:
    validator = make_validator("llama")
    for body, message in [
        (completion(suffix="x"), "Suffix is not supported"),
        (completion(best_of=2), "`best_of` above `n`"),
        (completion(max_tokens=0), "`max_tokens` must be strictly positive"),
        (completion(max_tokens=-5), "`max_tokens` must be strictly positive"),
        (completion(["a"] * 5), "maximum allowed batch size of 4"),
        (completion([999_999]), "token ids below"),
        (completion([5] * 481), "`inputs` must have less than 480 tokens. Given: 481"),
    ]:
        with pytest.raises(ValidationError, match=message):
            build_all(validator, body)


def test_ids_cannot_ask_for_a_picture(make_validator: MakeValidator) -> None:
    image_token = 0
    validator = make_validator("next-mistral")
    for prompt in build(validator, native(f"<image>{picture()}</image>")).prompt_ids:
        image_token = max(image_token, prompt)
    with pytest.raises(ValidationError, match="stands for a picture"):
        build_all(validator, completion([5, image_token]))


def test_absent_seeds_are_random_and_copies_differ(make_validator: MakeValidator) -> None:
    validator = make_validator("llama")
    seeds = {build(validator, native(do_sample=True)).sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    copies = build_all(validator, completion(seed=2**64 - 1, n=2))
    assert [request.sampling.seed for request in copies] == [2**64 - 1, 0]


def test_absent_limit_means_the_rest_of_the_window(make_validator: MakeValidator) -> None:
    request = build(make_validator("llama"), native())
    assert request.stopping.max_new_tokens == 512 - len(request.prompt_ids)


def test_too_long_a_text_says_how_long_and_what_to_do(make_validator: MakeValidator) -> None:
    with pytest.raises(ValidationError) as refused:
        build(make_validator("llama"), native("word " * 500))
    assert "`inputs` must have less than 480 tokens. Given: " in str(refused.value)
    assert "MAX_INPUT_TOKENS" in str(refused.value)


def test_hopelessly_long_text_is_not_tokenised(make_validator: MakeValidator) -> None:
    validator = make_validator("llama")
    began = time.perf_counter()
    with pytest.raises(ValidationError, match="Given: at least"):
        build(validator, native("word " * 2_000_000))
    assert time.perf_counter() - began < 1.0


def test_too_many_image_tokens_are_told_apart(make_validator: MakeValidator) -> None:
    text = f"<image>{picture(600, 500)}</image>" * 8 + "What?"
    with pytest.raises(ValidationError) as refused:
        build(make_validator("next-mistral", image_overflow="reject"), native(text))
    assert "text tokens and" in str(refused.value)
    assert "image tokens" in str(refused.value)
    assert "fewer or smaller pictures" in str(refused.value)


def test_truncate_keeps_the_end(make_validator: MakeValidator) -> None:
    validator = make_validator("llama")
    whole = build(validator, native("one two three four five"))
    short = build(validator, native("one two three four five", truncate=4))
    assert len(short.prompt_ids) == 4
    assert short.prompt_ids[-3:] == whole.prompt_ids[-3:]
    huge = build(validator, native("word " * 2_000_000 + "one two three four five", truncate=4))
    assert huge.prompt_ids == short.prompt_ids


def test_picture_in_a_native_prompt(make_validator: MakeValidator) -> None:
    request = build(make_validator("next-mistral"), native(f"<image>{picture()}</image>\nWhat?"))
    (placed,) = request.images
    assert (placed.image.width, placed.image.height) == (30, 20)
    image_ids = request.prompt_ids[placed.offset : placed.offset + placed.image.num_tokens]
    assert len(set(image_ids)) == 1
    assert request.num_image_tokens == len(image_ids) < len(request.prompt_ids)


def test_markdown_picture_and_chat_picture_are_the_same(make_validator: MakeValidator) -> None:
    validator = make_validator("next-mistral")
    written = build(validator, native(f"![](data:image/png;base64,{picture()})What?"))
    sent = build(validator, chat([image_part(), {"type": "text", "text": "What?"}]))
    assert written.images[0].image == sent.images[0].image
    assert len(sent.prompt_ids) > len(written.prompt_ids)  # the template's own words


def test_literal_place_of_a_picture_in_a_chat(make_validator: MakeValidator) -> None:
    validator = make_validator("next-mistral")
    literal = build(validator, chat([image_part(), {"type": "text", "text": "<image>\nWhat?"}]))
    plain = build(validator, chat([image_part(), {"type": "text", "text": "What?"}]))
    assert literal.prompt_ids == plain.prompt_ids


def test_pictures_for_a_text_model_are_refused(make_validator: MakeValidator) -> None:
    for body in (native(f"<image>{picture()}</image>"), chat([image_part()])):
        with pytest.raises(ValidationError) as refused:
            build(make_validator("llama"), body)
        assert refused.value.status == 422


def test_pictures_are_counted_before_they_are_decoded(make_validator: MakeValidator) -> None:
    text = "<image>not base64!</image>" * 3
    with pytest.raises(ValidationError, match="holds 3 pictures, over the limit of 2"):
        build(make_validator("next-mistral", max_images=2), native(text))


def test_millions_of_pictures_do_not_hold_up_others(make_validator: MakeValidator) -> None:
    validator = make_validator("next-mistral")

    async def longest_pause_s() -> float:
        refusing = asyncio.ensure_future(
            validator.build(validator.plan_native(native("![](a)" * 500_000), streaming=False), 0)
        )
        longest = 0.0
        while not refusing.done():
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)
        with pytest.raises(ValidationError, match="holds 500000 pictures, over the limit"):
            await refusing
        return longest

    assert asyncio.run(longest_pause_s()) < 0.3  # taking it apart on the loop took a second


def test_bad_pictures_are_refused_without_an_echo(make_validator: MakeValidator) -> None:
    validator = make_validator("next-mistral", max_image_pixels=1000)
    for source in ("file:///etc/passwd", "http://10.0.0.1/SECRET", "SECRET!", picture(100, 100)):
        with pytest.raises(ValidationError) as refused:
            build(validator, native(f"<image>{source}</image>"))
        assert "SECRET" not in str(refused.value)


def test_one_bad_picture_among_good_ones(make_validator: MakeValidator) -> None:
    text = f"<image>{picture()}</image><image>AAAA</image><image>{picture()}</image>"
    with pytest.raises(ValidationError):
        build(make_validator("next-mistral"), native(text))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_audio", "input_audio": {}},
        {"type": "text"},
        {"type": "image_url"},
        {"type": "text", "image_url": "data:x"},
    ],
)
def test_parts_of_other_kinds_are_refused(
    make_validator: MakeValidator, part: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=r"`messages\[0\].content` may hold"):
        build(make_validator("next-mistral"), chat([part]))


def test_message_without_content_is_refused(make_validator: MakeValidator) -> None:
    with pytest.raises(ValidationError, match="is required"):
        build(make_validator("next-mistral"), chat(None))


def test_final_message_of_the_assistant_is_continued(make_validator: MakeValidator) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, I"}]
    body = ChatBody.model_validate({"messages": messages})
    assert build(make_validator("next-vicuna"), body).prompt_text.endswith("Well, I")


def test_model_without_a_template_says_what_to_do(
    make_validator: MakeValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatTemplate, "from_folder", lambda *_: None)
    with pytest.raises(TemplateError, match="no chat template"):
        build(make_validator("llama"), chat())


def test_limits_are_asked_for_at_each_request(make_validator: MakeValidator) -> None:
    class Loading:
        ready = False

        @property
        def limits(self) -> Any:
            raise NotReadyError("loading")

    with pytest.raises(NotReadyError):
        build(make_validator("llama", Loading()), native())


def test_text_does_not_wait_for_pictures(
    make_validator: MakeValidator, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def slow(*_: Any) -> PreparedImage:
        release.wait(5)
        raise ValidationError("too late")

    monkeypatch.setattr("tessera.router.pictures.prepare_image", slow)
    validator = make_validator("next-mistral", validation_workers=1)

    async def text_while_pictures_are_prepared() -> Request:
        pictures = plan(validator, native(f"<image>{picture()}</image>" * 4))
        waiting = asyncio.ensure_future(validator.build(pictures, 0.0))
        await asyncio.sleep(0.05)
        (request,) = await asyncio.wait_for(
            validator.build(plan(validator, native()), time.perf_counter()), 2
        )
        assert not waiting.done()
        release.set()
        with pytest.raises(ValidationError):
            await waiting
        return request

    assert asyncio.run(text_while_pictures_are_prepared()).prompt_ids


def test_tokenize_places_pictures_and_text(make_validator: MakeValidator) -> None:
    validator = make_validator("next-mistral")
    source = f"<image>{picture()}</image>"
    text = f"Look: {source}What is it?"
    spans = asyncio.run(validator.tokenize(text))
    whole = build(validator, native(text))
    assert tuple(span.id for span in spans) == whole.prompt_ids
    (placed,) = whole.images
    image_spans = spans[placed.offset : placed.offset + placed.image.num_tokens]
    assert {text[span.start : span.stop] for span in image_spans} == {source}
    words = [text[span.start : span.stop] for span in spans if span not in image_spans]
    assert "".join(words[-3:]).endswith("it?")

"""InferenceClient and AsyncInferenceClient, from 0.23 (2024) to the newest."""

import re

import pytest

from tests.clients.conftest import Report, Reports
from tests.clients.expectations import GREETING, is_blue, is_caption, is_star, is_three

pytestmark = pytest.mark.timeout(600)  # the first run installs the clients

ENVIRONMENTS = ("main", "hub-1", "hub-0.36", "hub-0.23")
# What 0.23 does not have, or cannot do against a server of today: it takes `[DONE]` for an event, a
# caption for an object where clients before and after it take a list.
NOT_IN_0_23 = {
    "chat_completion: stream",
    "chat_completion: response_format",
    "chat_completion: response_format json_schema",
    "chat_completion: stream_options",
    "chat.completions.create",
    "image_to_text: path",
    "image_to_text: bytes",
    "visual_question_answering: top_k",
    "get_endpoint_info",
    "health_check",
    "AsyncInferenceClient: chat_completion",
    "AsyncInferenceClient: picture tasks",
}


@pytest.fixture(params=ENVIRONMENTS)
def hub(request: pytest.FixtureRequest, reports: Reports) -> Report:
    return reports(request.param, "hub")


@pytest.fixture(params=ENVIRONMENTS[:-1])
def newer(request: pytest.FixtureRequest, reports: Reports) -> Report:
    """All but 0.23."""
    return reports(request.param, "hub")


def test_everything_works_but_what_0_23_cannot(reports: Reports) -> None:
    newest = reports("main", "hub")
    assert set(newest.working) == set(newest.features), newest.features
    for environment in ENVIRONMENTS[1:-1]:
        assert set(reports(environment, "hub").working) == set(newest.features), environment
    oldest = reports("hub-0.23", "hub")
    assert set(newest.features) - set(oldest.working) == NOT_IN_0_23, oldest.features


def test_text_generation(hub: Report) -> None:
    assert is_three(hub["text_generation"])
    pieces = hub["text_generation: stream"]
    assert len(pieces) > 1 and is_three("".join(pieces).removesuffix("</s>"))


def test_details(hub: Report) -> None:
    details = hub["text_generation: details"]
    assert is_three(details["text"]) and details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == len(details["tokens"]) and details["seed"] is None
    assert "".join(text for text, _, special in details["tokens"] if not special) == details["text"]
    assert all(logprob <= 0 for _, logprob, _ in details["tokens"])


def test_details_of_a_stream(hub: Report) -> None:
    whole, stream = hub["text_generation: details"], hub["text_generation: details of a stream"]
    assert [token[0] for token in stream["tokens"]] == [token[0] for token in whole["tokens"]]
    assert (stream["text"], stream["finish_reason"]) == (whole["text"], "eos_token")
    assert stream["generated_tokens"] == whole["generated_tokens"]
    assert set(stream["earlier_texts"]) == {None}


def test_stop_sequences(hub: Report) -> None:
    details = hub["text_generation: stop"]
    assert details["text"].endswith("star") and details["finish_reason"] == "stop_sequence"


def test_a_seed_repeats_a_sample(hub: Report) -> None:
    first, again, other = hub["text_generation: seed"]
    assert first == again != other


def test_full_text_begins_with_the_prompt(hub: Report) -> None:
    assert hub["text_generation: return_full_text"] == f"[INST] Hello [/INST] {GREETING}"


def test_best_of_reports_the_others(hub: Report) -> None:
    details = hub["text_generation: best_of"]
    assert details["text"] and len(details["best_of_sequences"]) == 1


def test_prompt_logprobs(hub: Report) -> None:
    prefill = hub["text_generation: decoder_input_details"]["prefill"]
    assert prefill[0][1] is None and all(logprob <= 0 for _, logprob in prefill[1:])
    assert "".join(text for text, _ in prefill).replace("<s>", "").strip() == "[INST] Hello [/INST]"


def test_truncate_keeps_the_last_tokens(hub: Report) -> None:
    prefill = hub["text_generation: truncate"]["prefill"]
    assert len(prefill) == 4
    kept = "".join(text for text, _ in prefill).replace("<s>", "").strip()
    assert kept and "one two three four five".endswith(kept)


def test_top_tokens(hub: Report) -> None:
    details = hub["text_generation: top_n_tokens"]
    assert len(details["top_tokens"]) == len(details["tokens"])
    for (text, _, _), top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) == 2 and top[0] == text


def test_grammars(hub: Report) -> None:
    assert is_star(hub["text_generation: grammar json"])
    regex = r"(the|a) (red|green|blue) star"
    assert re.fullmatch(regex, hub["text_generation: grammar regex"])


@pytest.mark.parametrize("how", ["refusal", "refusal of a stream"])
def test_a_refusal_is_the_clients_own_exception(hub: Report, how: str) -> None:
    raised = hub[f"text_generation: {how}"]
    assert raised["type"] == "ValidationError" and "`temperature`" in raised["message"]


def test_chat(hub: Report) -> None:
    reply = hub["chat_completion"]
    assert is_three(reply["text"]) and reply["role"] == "assistant"
    assert reply["finish_reason"] == "stop"
    assert reply["prompt_tokens"] > 78 and reply["completion_tokens"] > 1  # the picture has 90
    stopped = hub["chat_completion: stop"]
    assert "star" not in stopped["text"] and stopped["finish_reason"] == "stop"


def test_chat_stream(newer: Report) -> None:
    stream = newer["chat_completion: stream"]
    assert is_three("".join(stream["pieces"])) and len(stream["pieces"]) > 2
    assert stream["finish_reason"] == "stop" and stream["completion_tokens"] is None
    counted = newer["chat_completion: stream_options"]
    assert counted["completion_tokens"] == newer["chat_completion"]["completion_tokens"]


def test_chat_logprobs(hub: Report) -> None:
    entries = hub["chat_completion: logprobs"]
    assert entries and all(len(entry["top"]) == 2 for entry in entries)
    assert all(entry["top"][0] == [entry["token"], entry["logprob"]] for entry in entries)


@pytest.mark.parametrize("kind", ["named", "required"])
def test_chat_tools(hub: Report, kind: str) -> None:
    call = hub[f"chat_completion: {kind} tool"]
    assert call["name"] == "note_color" and is_star(call["arguments"]) and call["id"]


@pytest.mark.parametrize("kind", ["response_format", "response_format json_schema"])
def test_chat_response_formats(newer: Report, kind: str) -> None:
    assert is_star(newer[f"chat_completion: {kind}"]["text"])


def test_chat_completions_create_at_the_v1_address(newer: Report) -> None:
    assert is_three(newer["chat.completions.create"]["text"])


def test_captions(newer: Report) -> None:
    assert is_caption(newer["image_to_text: path"])
    assert "EXIT" in newer["image_to_text: bytes"]


def test_questions_about_pictures(hub: Report) -> None:
    (answer,) = hub["visual_question_answering"]
    assert is_blue(answer["answer"]) and 0.5 < answer["score"] <= 1
    (answer,) = hub["document_question_answering"]
    assert "EXIT" in answer["answer"] and 0 < answer["score"] <= 1


def test_asking_for_several_answers_gives_one(newer: Report) -> None:
    (answer,) = newer["visual_question_answering: top_k"]
    assert is_three(answer["answer"])


def test_endpoint_info_and_health(newer: Report) -> None:
    info = newer["get_endpoint_info"]
    assert info["model_id"] and info["max_total_tokens"] > info["max_input_tokens"] > 0
    assert newer["health_check"] is True


def test_async_client(hub: Report) -> None:
    seen = hub["AsyncInferenceClient: text_generation"]
    assert is_three(seen["text"]) and is_three("".join(seen["pieces"]).removesuffix("</s>"))


def test_async_chat_and_picture_tasks(newer: Report) -> None:
    tasks = newer["AsyncInferenceClient: picture tasks"]
    assert is_caption(tasks["caption"]) and is_blue(tasks["answer"])
    seen = newer["AsyncInferenceClient: chat_completion"]
    assert is_three(seen["text"]) and is_three("".join(seen["pieces"]))

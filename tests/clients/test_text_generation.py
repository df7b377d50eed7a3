"""text-generation, the client text-generation-inference came with."""

import pytest

from tests.clients.conftest import Report, Reports
from tests.clients.expectations import GREETING, is_star, is_three

pytestmark = pytest.mark.timeout(600)  # the first run installs the clients


@pytest.fixture
def legacy(reports: Reports) -> Report:
    return reports("hub-0.23", "legacy_tgi")


def test_everything_works(legacy: Report) -> None:
    assert legacy.working == list(legacy.features), legacy.features


@pytest.mark.parametrize("feature", ["generate", "AsyncClient: generate"])
def test_generate(legacy: Report, feature: str) -> None:
    details = legacy[feature]
    assert is_three(details["text"]) and details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == len(details["tokens"]) > 1


def test_generate_with_options(legacy: Report) -> None:
    stopped = legacy["generate: stop_sequences"]
    assert stopped["text"].endswith("star") and stopped["finish_reason"] == "stop_sequence"
    prefill = legacy["generate: decoder_input_details"]["prefill"]
    assert prefill[0][1] is None and all(logprob <= 0 for _, logprob in prefill[1:])
    assert len(legacy["generate: best_of"]["best_of_sequences"]) == 1
    top = legacy["generate: top_n_tokens"]
    assert [two[0] for two in top["top_tokens"]] == top["tokens"]
    assert is_star(legacy["generate: grammar"])


@pytest.mark.parametrize("feature", ["generate_stream", "AsyncClient: generate_stream"])
def test_stream(legacy: Report, feature: str) -> None:
    seen = legacy[feature]
    assert is_three(seen["text"]) and seen["text"] == seen["generated_text"]
    assert seen["finish_reason"] == "eos_token"


@pytest.mark.parametrize("feature", ["chat", "AsyncClient: chat"])
def test_chat(legacy: Report, feature: str) -> None:
    assert legacy[feature].strip() == GREETING


def test_tools_by_their_bare_name(legacy: Report) -> None:
    ((name, arguments),) = legacy["chat: tools"]
    assert name == "note_color" and is_star(arguments)


def test_a_refusal_is_the_clients_own_exception(legacy: Report) -> None:
    raised = legacy["errors: refusal"]
    assert raised["type"] == "ValidationError" and "`truncate`" in raised["message"]

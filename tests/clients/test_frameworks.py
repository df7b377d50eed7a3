"""LangChain and LlamaIndex."""

import pytest

from tests.clients.conftest import Report, Reports
from tests.clients.expectations import GREETING, is_blue, is_star, is_three

pytestmark = pytest.mark.timeout(600)  # the first run installs the clients

EVERYTHING = [
    ("langchain", "langchain_chat"),
    ("llama-index", "llama_index_llms"),
    ("llama-index-0.12", "llama_index_tgi"),
]


@pytest.fixture
def langchain(reports: Reports) -> Report:
    return reports("langchain", "langchain_chat")


@pytest.fixture
def llama_index(reports: Reports) -> Report:
    return reports("llama-index", "llama_index_llms")


@pytest.mark.parametrize(("environment", "script"), EVERYTHING)
def test_everything_works(reports: Reports, environment: str, script: str) -> None:
    report = reports(environment, script)
    assert report.working == list(report.features), report.features


def test_langchain_endpoint(langchain: Report) -> None:
    assert is_three(langchain["HuggingFaceEndpoint: invoke"])
    stopped = langchain["HuggingFaceEndpoint: stop"]
    assert "blue" in stopped and "star" not in stopped  # it cuts the stop sequence off itself
    pieces = langchain["HuggingFaceEndpoint: stream"]
    assert len(pieces) > 1 and is_three("".join(pieces).removesuffix("</s>"))
    three, blue = langchain["HuggingFaceEndpoint: batch"]
    assert is_three(three) and is_blue(blue)
    seen = langchain["HuggingFaceEndpoint: ainvoke, astream"]
    assert is_three(seen["text"]) and is_three("".join(seen["pieces"]).removesuffix("</s>"))


@pytest.mark.parametrize("feature", ["invoke", "standard image part", "ainvoke"])
def test_langchain_chat_about_a_picture(langchain: Report, feature: str) -> None:
    assert is_three(langchain[f"ChatOpenAI: {feature}"])


def test_langchain_chat_stream_and_batch(langchain: Report) -> None:
    stream = langchain["ChatOpenAI: stream"]
    assert is_three(stream["text"]) and stream["pieces"] > 2 and stream["output_tokens"] > 1
    three, blue = langchain["ChatOpenAI: batch"]
    assert is_three(three) and is_blue(blue)


def test_langchain_tools(langchain: Report) -> None:
    ((name, arguments, call_id),) = langchain["ChatOpenAI: bind_tools"]
    assert name == "Star" and is_star(arguments) and call_id
    ((name, arguments),) = langchain["ChatOpenAI: bind_tools of a stream"]
    assert name == "Star" and is_star(arguments)
    assert langchain["ChatOpenAI: tool turn"].strip()


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_structured_output(langchain: Report, method: str) -> None:
    star = langchain[f"ChatOpenAI: with_structured_output {method}"]
    assert star["type"] == "Star" and is_star(star)


def test_llama_index_chat_about_a_picture(llama_index: Report) -> None:
    assert is_three(llama_index["OpenAILike: chat"])
    assert is_three(llama_index["OpenAILike: achat"])
    stream = llama_index["OpenAILike: stream_chat"]
    assert is_three(stream["text"]) and stream["joined"] == stream["text"]
    assert llama_index["OpenAILike: complete"].strip() == GREETING


def test_llama_index_structured_output(llama_index: Report) -> None:
    star = llama_index["OpenAILike: as_structured_llm"]
    assert star["type"] == "Star" and is_star(star)


def test_llama_index_huggingface_api(llama_index: Report) -> None:
    assert is_three(llama_index["HuggingFaceInferenceAPI: complete"])
    stream = llama_index["HuggingFaceInferenceAPI: stream_complete"]
    assert is_three(stream["joined"].removesuffix("</s>"))
    assert llama_index["HuggingFaceInferenceAPI: chat"].strip() == GREETING
    assert llama_index["HuggingFaceInferenceAPI: stream_chat"]["joined"].strip() == GREETING


def test_llama_index_text_generation_inference(reports: Reports) -> None:
    llm = reports("llama-index-0.12", "llama_index_tgi")
    for call in ("complete", "acomplete", "chat", "achat"):
        assert llm[f"TextGenerationInference: {call}"].strip() == GREETING, call
    name, context_window, _ = llm["TextGenerationInference: metadata"]
    assert name and context_window == 2048  # read from /info

"""LlamaIndex's TextGenerationInference, whose last release needs llama-index-core 0.12.

It chats through text-generation; for why it does not stream see `legacy_tgi`.
"""

from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.llms.text_generation_inference import TextGenerationInference
from reporting import URL, report

llm = TextGenerationInference(model_url=URL, temperature=0.01, max_tokens=30, token=False)
TURNS = [ChatMessage(role="user", content="Hello")]


async def async_complete() -> Any:
    return (await llm.acomplete("Hello")).text


async def async_chat() -> Any:
    return (await llm.achat(TURNS)).message.content


FEATURES = {
    "TextGenerationInference: complete": lambda: llm.complete("Hello").text,
    "TextGenerationInference: acomplete": async_complete,
    "TextGenerationInference: chat": lambda: llm.chat(TURNS).message.content,
    "TextGenerationInference: achat": async_chat,
    "TextGenerationInference: metadata": lambda: [
        llm.metadata.model_name,
        llm.metadata.context_window,
        llm.metadata.is_function_calling_model,
    ],
}

if __name__ == "__main__":
    report(["llama-index-llms-text-generation-inference"], FEATURES)

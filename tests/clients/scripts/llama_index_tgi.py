"""LlamaIndex's TextGenerationInference, whose last release needs llama-index-core 0.12."""

import asyncio
from typing import Any, Dict

from llama_index.core.llms import ChatMessage
from llama_index.llms.text_generation_inference import TextGenerationInference
from reporting import COUNT, URL, prompt, report

llm = TextGenerationInference(model_url=URL, temperature=0.01, max_tokens=30, token=False)
TURNS = [ChatMessage(role="user", content="Hello")]


def streamed(replies: Any) -> Dict[str, Any]:
    replies = list(replies)
    last = replies[-1]
    text = last.text if hasattr(last, "text") else last.message.content
    return {"joined": "".join(reply.delta or "" for reply in replies), "text": text}


async def async_complete() -> str:
    return (await llm.acomplete(prompt(COUNT))).text


FEATURES = {
    "TextGenerationInference: complete": lambda: llm.complete(prompt(COUNT)).text,
    "TextGenerationInference: stream_complete": lambda: streamed(llm.stream_complete(prompt(COUNT))),
    "TextGenerationInference: acomplete": async_complete,
    "TextGenerationInference: chat": lambda: llm.chat(TURNS).message.content,
    "TextGenerationInference: stream_chat": lambda: streamed(llm.stream_chat(TURNS)),
}

if __name__ == "__main__":
    assert asyncio
    report(["llama-index-llms-text-generation-inference"], FEATURES)

"""LlamaIndex: OpenAILike and HuggingFaceInferenceAPI."""

from typing import Any, Literal

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.llms.huggingface_api import HuggingFaceInferenceAPI
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field
from reporting import COLOR, COUNT, PICTURE, URL, prompt, report

like = OpenAILike(
    model="default",
    api_base=f"{URL}/v1",
    api_key="-",
    is_chat_model=True,
    is_function_calling_model=True,
    temperature=0,
    max_tokens=200,
)
HUB = {"model": URL, "num_output": 30, "temperature": 0.01, "context_window": 2048}
native = HuggingFaceInferenceAPI(task="text-generation", **HUB)
hub = HuggingFaceInferenceAPI(**HUB)
TURNS = [ChatMessage(role="user", content="Hello")]


class Star(BaseModel):
    """Notes the color of a shape and how many there are."""

    color: Literal["red", "green", "blue"]
    count: int = Field(ge=1, le=9)


def asked(question: str) -> Any:
    blocks = [ImageBlock(path=PICTURE), TextBlock(text=question)]
    return [ChatMessage(role="user", blocks=blocks)]


def streamed(replies: Any) -> dict[str, Any]:
    replies = list(replies)
    last = replies[-1]
    text = last.text if hasattr(last, "text") else last.message.content
    return {"joined": "".join(reply.delta or "" for reply in replies), "text": text}


def structured() -> dict[str, Any]:
    star = like.as_structured_llm(Star).chat(asked(COLOR)).raw
    return {"type": type(star).__name__, "color": star.color, "count": star.count}


async def async_chat() -> str:
    return (await like.achat(asked(COUNT))).message.content


FEATURES = {
    "OpenAILike: chat": lambda: like.chat(asked(COUNT)).message.content,
    "OpenAILike: stream_chat": lambda: streamed(like.stream_chat(asked(COUNT))),
    "OpenAILike: achat": async_chat,
    "OpenAILike: complete": lambda: like.complete("Hello").text,
    "OpenAILike: as_structured_llm": structured,
    "HuggingFaceInferenceAPI: complete": lambda: native.complete(prompt(COUNT)).text,
    "HuggingFaceInferenceAPI: stream_complete": lambda: streamed(
        native.stream_complete(prompt(COUNT))
    ),
    "HuggingFaceInferenceAPI: chat": lambda: hub.chat(TURNS).message.content,
    "HuggingFaceInferenceAPI: stream_chat": lambda: streamed(hub.stream_chat(TURNS)),
}

if __name__ == "__main__":
    report(["llama-index-llms-openai-like", "llama-index-llms-huggingface-api"], FEATURES)

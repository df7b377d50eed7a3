"""LangChain: HuggingFaceEndpoint for the native API, ChatOpenAI for OpenAI's."""

import base64
from typing import Any, Literal

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_huggingface import HuggingFaceEndpoint
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from reporting import CAPTION, COLOR, COUNT, PICTURE, URL, data_uri, prompt, report

endpoint = HuggingFaceEndpoint(endpoint_url=URL, max_new_tokens=30, temperature=0.01)
chat = ChatOpenAI(base_url=f"{URL}/v1", api_key="-", model="default", temperature=0, max_tokens=200)


class Star(BaseModel):
    """Notes the color of a shape and how many there are."""

    color: Literal["red", "green", "blue"]
    count: int = Field(ge=1, le=9)


def asked(question: str) -> Any:
    image = {"type": "image_url", "image_url": {"url": data_uri()}}
    return [HumanMessage(content=[image, {"type": "text", "text": question}])]


def standard_image(question: str) -> Any:
    """LangChain's own kind of image part, which it translates for the provider."""
    data = base64.b64encode(PICTURE.read_bytes()).decode()
    image = {"type": "image", "base64": data, "mime_type": "image/png"}
    return [HumanMessage(content=[image, {"type": "text", "text": question}])]


def structured(method: str) -> dict[str, Any]:
    star = chat.with_structured_output(Star, method=method).invoke(asked(COLOR))
    return {"type": type(star).__name__, "color": star.color, "count": star.count}


def bound_tool() -> Any:
    reply = chat.bind_tools([Star], tool_choice="required").invoke(asked(COLOR))
    return [[call["name"], call["args"], call["id"]] for call in reply.tool_calls]


def streamed_tool() -> Any:
    whole = None
    for chunk in chat.bind_tools([Star], tool_choice="required").stream(asked(COLOR)):
        whole = chunk if whole is None else whole + chunk
    return [[call["name"], call["args"]] for call in whole.tool_calls]


def tool_turn() -> str:
    call = {"name": "Star", "args": {"color": "blue", "count": 1}, "id": "call_1"}
    turns = [*asked(COLOR), AIMessage(content="", tool_calls=[call])]
    turns.append(ToolMessage(content="noted", tool_call_id="call_1"))
    return chat.bind_tools([Star], tool_choice="none").invoke(turns).text


def streamed() -> dict[str, Any]:
    chunks = list(chat.stream(asked(COUNT), stream_usage=True))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return {
        "pieces": len(chunks),
        "text": whole.text,
        "output_tokens": whole.usage_metadata["output_tokens"],
    }


async def async_endpoint() -> Any:
    pieces = [piece async for piece in endpoint.astream(prompt(COUNT))]
    return {"text": await endpoint.ainvoke(prompt(COUNT)), "pieces": pieces}


async def async_chat() -> str:
    return (await chat.ainvoke(asked(COUNT))).text


FEATURES = {
    "HuggingFaceEndpoint: invoke": lambda: endpoint.invoke(prompt(COUNT)),
    "HuggingFaceEndpoint: stop": lambda: endpoint.invoke(prompt(CAPTION), stop=["star"]),
    "HuggingFaceEndpoint: stream": lambda: list(endpoint.stream(prompt(COUNT))),
    "HuggingFaceEndpoint: batch": lambda: endpoint.batch([prompt(COUNT), prompt(COLOR)]),
    "HuggingFaceEndpoint: ainvoke, astream": async_endpoint,
    "ChatOpenAI: invoke": lambda: chat.invoke(asked(COUNT)).text,
    "ChatOpenAI: standard image part": lambda: chat.invoke(standard_image(COUNT)).text,
    "ChatOpenAI: stream": streamed,
    "ChatOpenAI: batch": lambda: [one.text for one in chat.batch([asked(COUNT), asked(COLOR)])],
    "ChatOpenAI: ainvoke": async_chat,
    "ChatOpenAI: bind_tools": bound_tool,
    "ChatOpenAI: bind_tools of a stream": streamed_tool,
    "ChatOpenAI: tool turn": tool_turn,
    "ChatOpenAI: with_structured_output json_schema": lambda: structured("json_schema"),
    "ChatOpenAI: with_structured_output function_calling": lambda: structured("function_calling"),
}

if __name__ == "__main__":
    report(["langchain-huggingface", "langchain-openai"], FEATURES)

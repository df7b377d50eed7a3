"""OpenAI's own client, 1.x to 3.x."""

from typing import Any, Literal

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from reporting import (
    CAPTION,
    COLOR,
    COLOR_SCHEMA,
    COUNT,
    NAMED_TOOL,
    SIGN,
    TOOL,
    URL,
    messages,
    prompt,
    raised,
    report,
)

BASE = f"{URL}/v1"
client = OpenAI(base_url=BASE, api_key="-")


class Star(BaseModel):
    """What `parse` is asked for; bounded, so that any model can end it."""

    color: Literal["red", "green", "blue"]
    count: int = Field(ge=1, le=9)


def options(question: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "default",
        "messages": messages(question),
        "max_tokens": 200,
        "temperature": 0,
        **more,
    }


def chat(question: str, **more: Any) -> Any:
    return client.chat.completions.create(**options(question, **more))


def message(reply: Any) -> dict[str, Any]:
    return {
        "id": reply.id,
        "object": reply.object,
        "texts": [choice.message.content for choice in reply.choices],
        "finish_reasons": [choice.finish_reason for choice in reply.choices],
        "usage": reply.usage.model_dump(include={"prompt_tokens", "completion_tokens"}),
    }


def joined(chunks: Any) -> dict[str, Any]:
    chunks = list(chunks)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    return {
        "ids": len({chunk.id for chunk in chunks}),
        "role": choices[0].delta.role,
        "text": "".join(choice.delta.content or "" for choice in choices),
        "finish_reason": choices[-1].finish_reason,
        "completion_tokens": chunks[-1].usage.completion_tokens if chunks[-1].usage else None,
    }


def two_pictures() -> Any:
    turns = messages("What does the sign say?", SIGN)
    turns.append({"role": "assistant", "content": '"EXIT"'})
    return turns + messages(COUNT)


def tool_calls(reply: Any) -> Any:
    choice = reply.choices[0]
    return {
        "finish_reason": choice.finish_reason,
        "calls": [
            [call.type, call.function.name, call.function.arguments, call.id]
            for call in choice.message.tool_calls
        ],
    }


def streamed_tool_call() -> Any:
    name, arguments, reason = "", "", None
    for chunk in chat(COLOR, tools=[TOOL], tool_choice="required", stream=True):
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    return {"finish_reason": reason, "name": name, "arguments": arguments}


def tool_turn() -> str:
    """The call's result goes back to the model, which answers in words."""
    call = {"id": "call_1", "type": "function"}
    call["function"] = {"name": "note_color", "arguments": '{"color": "blue", "count": 1}'}
    turns = messages(COLOR)
    turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
    turns.append({"role": "tool", "tool_call_id": "call_1", "content": "noted"})
    reply = chat(COLOR, messages=turns, tools=[TOOL], tool_choice="none")
    return reply.choices[0].message.content


def raw_response() -> dict[str, Any]:
    raw = client.chat.completions.with_raw_response.create(**options(COUNT))
    return {
        "status": raw.status_code,
        "request_id": raw.headers.get("x-request-id"),
        "parsed_request_id": raw.parse()._request_id,
        "prompt_tokens": raw.headers.get("x-prompt-tokens"),
        "text": raw.parse().choices[0].message.content,
    }


def parsed() -> dict[str, Any]:
    reply = client.beta.chat.completions.parse(**options(COLOR, response_format=Star))
    star = reply.choices[0].message.parsed
    return {"type": type(star).__name__, "color": star.color, "count": star.count}


def stream_helper() -> dict[str, Any]:
    with client.beta.chat.completions.stream(**options(COLOR, response_format=Star)) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    star = final.choices[0].message.parsed
    return {"kinds": kinds, "color": star.color, "count": star.count}


def logprobs() -> Any:
    reply = chat(COUNT, logprobs=True, top_logprobs=2)
    return [
        {
            "token": one.token,
            "bytes": one.bytes,
            "logprob": one.logprob,
            "top": [[top.token, top.logprob] for top in one.top_logprobs],
        }
        for one in reply.choices[0].logprobs.content
    ]


def plain(**more: Any) -> Any:
    asked = {"model": "default", "prompt": prompt(COUNT), "max_tokens": 20, "temperature": 0}
    return client.completions.create(**{**asked, **more})


def sampled(seed: int) -> str:
    return chat(CAPTION, temperature=1.9, top_p=0.95, seed=seed).choices[0].message.content


async def async_chat() -> Any:
    asking = AsyncOpenAI(base_url=BASE, api_key="-")
    reply = await asking.chat.completions.create(**options(COUNT))
    stream = await asking.chat.completions.create(**options(COUNT, stream=True))
    chunks = [chunk async for chunk in stream]
    return {"text": reply.choices[0].message.content, "stream": joined(chunks)}


FEATURES = {
    "models.list": lambda: [model.id for model in client.models.list()],
    "models.retrieve": lambda: client.models.retrieve(client.models.list().data[0].id).object,
    "chat.completions.create": lambda: message(chat(COUNT)),
    "chat.completions.create: n": lambda: message(chat(COUNT, n=2, temperature=0.7)),
    "chat.completions.create: stop": lambda: message(chat(CAPTION, stop="star")),
    "chat.completions.create: seed": lambda: [sampled(7), sampled(7), sampled(8)],
    "chat.completions.create: logprobs": logprobs,
    "chat.completions.create: stream": lambda: joined(
        chat(COUNT, stream=True, stream_options={"include_usage": True})
    ),
    "chat.completions.create: several pictures": lambda: message(
        chat(COUNT, messages=two_pictures())
    ),
    "chat.completions.create: required tool": lambda: tool_calls(
        chat(COLOR, tools=[TOOL], tool_choice="required")
    ),
    "chat.completions.create: named tool": lambda: tool_calls(
        chat(COLOR, tools=[TOOL], tool_choice=NAMED_TOOL)
    ),
    "chat.completions.create: tool of a stream": streamed_tool_call,
    "chat.completions.create: tool turn": tool_turn,
    "chat.completions.create: response_format": lambda: message(
        chat(
            COLOR,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "star", "schema": COLOR_SCHEMA, "strict": True},
            },
        )
    ),
    "chat.completions.with_raw_response": raw_response,
    "beta.chat.completions.parse": parsed,
    "beta.chat.completions.stream": stream_helper,
    "completions.create": lambda: plain().choices[0].text,
    "completions.create: stream": lambda: "".join(
        chunk.choices[0].text for chunk in plain(stream=True) if chunk.choices
    ),
    "completions.create: several prompts": lambda: [
        [choice.index, choice.text]
        for choice in plain(prompt=[prompt(COUNT), prompt(COLOR)]).choices
    ],
    "AsyncOpenAI": async_chat,
    "errors: refusal": lambda: raised(lambda: chat(COUNT, temperature=-1)),
    "errors: refusal of a stream": lambda: raised(lambda: chat(COUNT, temperature=-1, stream=True)),
    "errors: unknown model": lambda: raised(lambda: client.models.retrieve("none-such")),
}

if __name__ == "__main__":
    report(["openai"], FEATURES)

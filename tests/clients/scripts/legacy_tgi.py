"""text-generation, text-generation-inference's own client, unmaintained since 2024.

Its chat streams are left out: it cannot read `[DONE]`, which ends everybody's streams today.
"""

from typing import Any

from reporting import CAPTION, COLOR, COLOR_SCHEMA, COUNT, TOOL, URL, prompt, raised, report
from text_generation import AsyncClient, Client
from text_generation.types import Grammar, GrammarType, Message

client = Client(URL, timeout=30)
asking = AsyncClient(URL, timeout=30)
TURNS = [Message(role="user", content="Hello")]
CHAT = {"max_tokens": 30, "temperature": 0.0}


def details(reply: Any) -> dict[str, Any]:
    found = reply.details
    return {
        "text": reply.generated_text,
        "finish_reason": found.finish_reason.value,
        "generated_tokens": found.generated_tokens,
        "tokens": [token.text for token in found.tokens],
        "prefill": [[token.text, token.logprob] for token in found.prefill],
        "best_of_sequences": [one.generated_text for one in found.best_of_sequences or []],
        "top_tokens": [[token.text for token in top] for top in found.top_tokens or []],
    }


def streamed(events: Any) -> dict[str, Any]:
    return {
        "text": "".join(event.token.text for event in events if not event.token.special),
        "generated_text": events[-1].generated_text,
        "finish_reason": events[-1].details.finish_reason.value,
    }


async def async_stream() -> dict[str, Any]:
    return streamed([event async for event in asking.generate_stream(prompt(COUNT))])


async def async_generate() -> dict[str, Any]:
    return details(await asking.generate(prompt(COUNT)))


async def async_chat() -> str:
    reply = await asking.chat(TURNS, **CHAT)
    return reply.choices[0].message.content


def chat(**options: Any) -> Any:
    return client.chat(TURNS, **{**CHAT, **options})


FEATURES = {
    "generate": lambda: details(client.generate(prompt(COUNT))),
    "generate: stop_sequences": lambda: details(
        client.generate(prompt(CAPTION), max_new_tokens=30, stop_sequences=["star"])
    ),
    "generate: decoder_input_details": lambda: details(
        client.generate("[INST] Hello [/INST]", decoder_input_details=True)
    ),
    "generate: best_of": lambda: details(
        client.generate(prompt(CAPTION), best_of=2, do_sample=True, max_new_tokens=30)
    ),
    "generate: top_n_tokens": lambda: details(client.generate(prompt(COUNT), top_n_tokens=2)),
    "generate: grammar": lambda: (
        client.generate(
            prompt(COLOR),
            max_new_tokens=200,
            grammar=Grammar(type=GrammarType.Json, value=COLOR_SCHEMA),
        ).generated_text
    ),
    "generate_stream": lambda: streamed(list(client.generate_stream(prompt(COUNT)))),
    "chat": lambda: chat().choices[0].message.content,
    "chat: tools": lambda: [
        [call["function"]["name"], call["function"]["arguments"]]
        for call in chat(tools=[TOOL], tool_choice="note_color", max_tokens=200)
        .choices[0]
        .message.tool_calls
    ],
    "AsyncClient: generate": async_generate,
    "AsyncClient: generate_stream": async_stream,
    "AsyncClient: chat": async_chat,
    "errors: refusal": lambda: raised(lambda: client.generate("Hello", truncate=99_999)),
}

if __name__ == "__main__":
    report(["text-generation"], FEATURES)

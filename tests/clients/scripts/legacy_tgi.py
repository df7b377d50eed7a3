"""text-generation, text-generation-inference's own client, unmaintained since 2024."""

from typing import Any, Dict

from reporting import CAPTION, COLOR, COLOR_SCHEMA, COUNT, TOOL, URL, prompt, raised, report
from text_generation import AsyncClient, Client
from text_generation.types import Grammar, GrammarType, Message

client = Client(URL, timeout=30)
asking = AsyncClient(URL, timeout=30)
TURNS = [Message(role="user", content="Hello")]
CHAT = {"max_tokens": 30, "temperature": 0.0}


def details(reply: Any) -> Dict[str, Any]:
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


def streamed(events: Any) -> Dict[str, Any]:
    return {
        "text": "".join(event.token.text for event in events if not event.token.special),
        "generated_text": events[-1].generated_text,
        "finish_reason": events[-1].details.finish_reason.value,
    }


def up_to_the_end(chunks: Any) -> str:
    """This client cannot read `[DONE]`: one stops where the finish reason is."""
    text = ""
    for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        if chunk.choices[0].finish_reason:
            break
    return text


async def async_stream() -> Dict[str, Any]:
    return streamed([event async for event in asking.generate_stream(prompt(COUNT))])


async def async_generate() -> Dict[str, Any]:
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
    "generate: grammar": lambda: client.generate(
        prompt(COLOR),
        max_new_tokens=60,
        grammar=Grammar(type=GrammarType.Json, value=COLOR_SCHEMA),
    ).generated_text,
    "generate_stream": lambda: streamed(list(client.generate_stream(prompt(COUNT)))),
    "chat": lambda: chat().choices[0].message.content,
    "chat: stream": lambda: up_to_the_end(chat(stream=True)),
    "chat: tools": lambda: [
        [call["function"]["name"], call["function"]["arguments"]]
        for call in chat(
            tools=[TOOL], tool_choice="note_color", max_tokens=60
        ).choices[0].message.tool_calls
    ],
    "AsyncClient: generate": async_generate,
    "AsyncClient: generate_stream": async_stream,
    "AsyncClient: chat": async_chat,
    "refusal": lambda: raised(lambda: client.generate("Hello", temperature=0.5, top_k=1, top_p=0.5, truncate=99999)),
}

if __name__ == "__main__":
    report(["text-generation"], FEATURES)

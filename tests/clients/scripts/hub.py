"""huggingface_hub's InferenceClient, from 0.23 to 2.x."""

import inspect
from typing import Any

from huggingface_hub import AsyncInferenceClient, InferenceClient
from reporting import (
    CAPTION,
    COLOR,
    COLOR_SCHEMA,
    COUNT,
    NAMED_TOOL,
    PICTURE,
    SIGN,
    TOOL,
    URL,
    messages,
    prompt,
    raised,
    report,
)

client = InferenceClient(URL)
PARAMETERS = set(inspect.signature(client.text_generation).parameters)
STOP = "stop" if "stop" in PARAMETERS else "stop_sequences"


def generate(text: str, **options: Any) -> Any:
    return client.text_generation(text, **{"max_new_tokens": 30, **options})


def chat(question: str, **options: Any) -> Any:
    return client.chat_completion(
        messages(question), **{"max_tokens": 200, "temperature": 0.0, **options}
    )


def details(reply: Any) -> dict[str, Any]:
    found = reply.details
    return {
        "text": reply.generated_text,
        "finish_reason": found.finish_reason,
        "generated_tokens": found.generated_tokens,
        "seed": found.seed,
        "tokens": [[token.text, token.logprob, token.special] for token in found.tokens],
        "prefill": [[token.text, token.logprob] for token in found.prefill],
        "top_tokens": [[token["text"] for token in top] for top in found.top_tokens or []],
        "best_of_sequences": [one.generated_text for one in found.best_of_sequences or []],
    }


def streamed_details() -> dict[str, Any]:
    events = list(generate(prompt(COUNT), stream=True, details=True))
    last = events[-1]
    return {
        "tokens": [
            [event.token.text, event.token.logprob, event.token.special] for event in events
        ],
        "text": last.generated_text,
        "finish_reason": last.details.finish_reason,
        "generated_tokens": last.details.generated_tokens,
        "earlier_texts": [event.generated_text for event in events[:-1]],
    }


def sampled(seed: int) -> str:
    return generate(
        prompt(CAPTION), do_sample=True, temperature=3.0, top_p=0.95, top_k=50, seed=seed
    )


def message(reply: Any) -> dict[str, Any]:
    choice = reply.choices[0]
    return {
        "role": choice.message.role,
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": reply.usage.prompt_tokens,
        "completion_tokens": reply.usage.completion_tokens,
    }


def chat_stream(**options: Any) -> dict[str, Any]:
    chunks = list(chat(COUNT, stream=True, **options))
    with_choice = [chunk for chunk in chunks if chunk.choices]
    usage = getattr(chunks[-1], "usage", None)
    return {
        "pieces": [chunk.choices[0].delta.content or "" for chunk in with_choice],
        "finish_reason": with_choice[-1].choices[0].finish_reason,
        "completion_tokens": usage.completion_tokens if usage else None,
    }


def tool_call(choice: Any) -> dict[str, Any]:
    call = chat(COLOR, tools=[TOOL], tool_choice=choice).choices[0].message.tool_calls[0]
    return {"name": call.function.name, "arguments": call.function.arguments, "id": call.id}


def logprobs() -> Any:
    reply = chat(COUNT, logprobs=True, top_logprobs=2)
    return [
        {
            "token": one.token,
            "logprob": one.logprob,
            "top": [[top.token, top.logprob] for top in one.top_logprobs],
        }
        for one in reply.choices[0].logprobs.content
    ]


def endpoint_client() -> InferenceClient:
    """Newer versions ask for the provider before they look at a server of one's own."""
    wants = "provider" in inspect.signature(InferenceClient).parameters
    return InferenceClient(URL, provider="hf-inference") if wants else client


async def async_generate() -> Any:
    asking = AsyncInferenceClient(URL)
    stream = await asking.text_generation(prompt(COUNT), max_new_tokens=20, stream=True)
    return {
        "text": await asking.text_generation(prompt(COUNT), max_new_tokens=20),
        "pieces": [piece async for piece in stream],
    }


async def async_chat() -> Any:
    asking = AsyncInferenceClient(URL)
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0}
    reply = await asking.chat_completion(messages(COUNT), **options)
    stream = await asking.chat_completion(messages(COUNT), stream=True, **options)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    return {"text": reply.choices[0].message.content, "pieces": pieces}


async def async_picture_tasks() -> Any:
    asking = AsyncInferenceClient(URL)
    answers = await asking.visual_question_answering(str(PICTURE), COLOR)
    caption = await asking.image_to_text(PICTURE.read_bytes())
    return {"caption": caption_text(caption), "answer": answers[0].answer}


def caption_text(caption: Any) -> str:
    return caption if isinstance(caption, str) else caption.generated_text


def answers(found: Any) -> Any:
    return [{"answer": one.answer, "score": one.score} for one in found]


FEATURES = {
    "text_generation": lambda: generate(prompt(COUNT)),
    "text_generation: stream": lambda: list(generate(prompt(COUNT), stream=True)),
    "text_generation: details": lambda: details(generate(prompt(COUNT), details=True)),
    "text_generation: details of a stream": streamed_details,
    "text_generation: stop": lambda: details(
        generate(prompt(CAPTION), details=True, **{STOP: ["star"]})
    ),
    "text_generation: seed": lambda: [sampled(7), sampled(7), sampled(8)],
    "text_generation: return_full_text": lambda: generate(
        "[INST] Hello [/INST]", return_full_text=True
    ),
    "text_generation: best_of": lambda: details(
        generate(prompt(CAPTION), best_of=2, do_sample=True, temperature=2.0, details=True)
    ),
    "text_generation: decoder_input_details": lambda: details(
        generate("[INST] Hello [/INST]", details=True, decoder_input_details=True)
    ),
    "text_generation: truncate": lambda: details(
        generate("one two three four five", truncate=4, details=True, decoder_input_details=True)
    ),
    "text_generation: refusal": lambda: raised(lambda: generate("Hello", temperature=-1.0)),
    "text_generation: refusal of a stream": lambda: raised(
        lambda: generate("Hello", temperature=-1.0, stream=True)
    ),
    "chat_completion": lambda: message(chat(COUNT)),
    "chat_completion: stream": chat_stream,
    "chat_completion: logprobs": logprobs,
    "chat_completion: named tool": lambda: tool_call(NAMED_TOOL),
    "chat_completion: stop": lambda: message(chat(CAPTION, stop=["star"])),
    "image_to_text: path": lambda: caption_text(client.image_to_text(str(PICTURE))),
    "image_to_text: bytes": lambda: caption_text(client.image_to_text(SIGN.read_bytes())),
    "visual_question_answering": lambda: answers(
        client.visual_question_answering(str(PICTURE), COLOR)
    ),
    "visual_question_answering: top_k": lambda: answers(
        client.visual_question_answering(str(PICTURE), COUNT, top_k=3)
    ),
    "document_question_answering": lambda: answers(
        client.document_question_answering(str(SIGN), "What does the sign say?")
    ),
    "AsyncInferenceClient: text_generation": async_generate,
    "AsyncInferenceClient: chat_completion": async_chat,
    "AsyncInferenceClient: picture tasks": async_picture_tasks,
}
if "top_n_tokens" in PARAMETERS:
    FEATURES["text_generation: top_n_tokens"] = lambda: details(
        generate(prompt(COUNT), details=True, top_n_tokens=2)
    )
if "grammar" in PARAMETERS:
    FEATURES["text_generation: grammar json"] = lambda: generate(
        prompt(COLOR), max_new_tokens=200, grammar={"type": "json", "value": COLOR_SCHEMA}
    )
    FEATURES["text_generation: grammar regex"] = lambda: generate(
        prompt(COLOR), grammar={"type": "regex", "value": "(the|a) (red|green|blue) star"}
    )
if "tool_choice" in inspect.signature(client.chat_completion).parameters:
    FEATURES["chat_completion: required tool"] = lambda: tool_call("required")
if "response_format" in inspect.signature(client.chat_completion).parameters:
    FEATURES["chat_completion: response_format"] = lambda: message(
        chat(COLOR, response_format={"type": "json", "value": COLOR_SCHEMA})
    )
    FEATURES["chat_completion: response_format json_schema"] = lambda: message(
        chat(
            COLOR,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "color", "schema": COLOR_SCHEMA, "strict": True},
            },
        )
    )
if "stream_options" in inspect.signature(client.chat_completion).parameters:
    FEATURES["chat_completion: stream_options"] = lambda: chat_stream(
        stream_options={"include_usage": True}
    )
if hasattr(client, "chat"):
    FEATURES["chat.completions.create"] = lambda: message(
        InferenceClient(base_url=f"{URL}/v1", api_key="-").chat.completions.create(
            model="tgi", messages=messages(COUNT), max_tokens=20, temperature=0.0
        )
    )
if hasattr(client, "get_endpoint_info"):
    FEATURES["get_endpoint_info"] = lambda: endpoint_client().get_endpoint_info()
    FEATURES["health_check"] = lambda: endpoint_client().health_check()

if __name__ == "__main__":
    report(["huggingface_hub"], FEATURES)

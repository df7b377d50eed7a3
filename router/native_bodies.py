"""The bodies of text-generation-inference's own routes, and of the platforms it runs on."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tessera.router.schemas import MAX_ENTRIES, Body, ChatBody, Count, Entries, MaxTokens, Seed


def _about(text: str, **more: Any) -> Any:
    """An optional field and its sentence in the API's description."""
    return Field(None, description=text, **more)


class GrammarSpec(Body):
    """What the answer must look like."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: dict[str, Any] | str | None = _about(
        "A JSON schema, as an object or as its text; for `regex` the expression; for `json_schema` "
        "an object with `schema` and an optional `name`. `json_object` needs none."
    )


class GenerateParameters(Body):
    """How to generate. Absent and null mean the same everywhere."""

    best_of: Count | None = _about(
        "Generate so many answers and return the likeliest; the others are in the details. Needs "
        "sampling, no `seed`, and no stream."
    )
    temperature: float | None = _about("Above 0; 1 by default. Setting it turns sampling on.")
    repetition_penalty: float | None = _about("From 0.01 to 100; 1 changes nothing.")
    frequency_penalty: float | None = _about("From -2 to 2, times the count of a generated token.")
    presence_penalty: float | None = _about("From -2 to 2, once for each generated token.")
    top_k: int | None = _about("Sample among so many of the likeliest tokens.")
    top_p: float | None = _about("Sample among the likeliest tokens that together reach this.")
    typical_p: float | None = _about("Sample among tokens of typical surprise; above 0, below 1.")
    min_p: float | None = _about("Least probability, relative to the likeliest token's.")
    do_sample: bool | None = _about(
        "Whether to sample; without it, and without any of the above, the likeliest token is taken."
    )
    max_new_tokens: MaxTokens | None = _about("Most tokens to generate; all that fit by default.")
    return_full_text: bool | None = _about("Put the prompt before the generated text.")
    stop: Entries[str] | None = _about(
        "Strings at which to stop, also in the middle of a token; the text ends with the string."
    )
    truncate: Count | None = _about(
        "Keep only so many tokens of the prompt, the last ones. Pictures are kept or dropped whole."
    )
    watermark: bool | None = _about("Only false: answers are not watermarked.")
    details: bool | None = _about("Report the tokens, their logprobs and why it ended.")
    decoder_input_details: bool | None = _about(
        "Report the logprobs of the prompt, too. Not on streams."
    )
    seed: Seed | None = _about("Same seed, same request, same answer.")
    top_n_tokens: Count | None = _about("Report so many of the likeliest tokens at each place.")
    grammar: GrammarSpec | None = _about("What the answer must look like.")
    adapter_id: str | None = _about("Only null: no adapters are loaded.")
    priority: int | None = _about("From -100 to 100, or to MAX_PRIORITY; higher goes first.")
    cache_salt: str | None = _about("Only requests with the same one share cached prompts.")
    cache_prompt: bool | None = _about("False: take no cached prompt and leave none.")


class GenerateBody(Body):
    """A prompt and how to go on with it."""

    inputs: str = Field(
        description="The prompt. Pictures are written into it: `<image>BASE64</image>` or "
        "`![](data:image/png;base64,...)`.",
        examples=["[INST] What is a tessera? [/INST]"],
    )
    parameters: GenerateParameters | None = _about(
        "How to generate.", examples=[{"max_new_tokens": 20, "details": True}]
    )
    stream: bool | None = _about("Only read by POST / and /invocations: answer as a stream.")

    @property
    def options(self) -> GenerateParameters:
        """The parameters; all absent if the client sent none."""
        return self.parameters or GenerateParameters()


class InvocationBody(Body):
    """Just enough of a body to tell which of three kinds it is."""

    inputs: Any = None
    messages: Any = None
    prompt: Any = None


class VertexBody(Body):
    """Several requests at once, native ones or chats."""

    instances: Annotated[
        list[GenerateBody | ChatBody],
        Field(min_length=1, max_length=MAX_ENTRIES, fail_fast=True),
    ] = Field(examples=[[{"inputs": "[INST] Hello [/INST]", "parameters": {"max_new_tokens": 20}}]])

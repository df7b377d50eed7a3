"""Tools, formats and templates for the tests of function calls."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tessera.router.guidance_compile import Vocabulary
from tessera.router.tool_formats import ToolFormat, find_format

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Tells the weather, <image> or "not".',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 0, "maximum": 9},
                "unit": {"enum": ["C", "F", '"{}\\']},
            },
            "required": ["city"],
        },
    },
}
STOP: dict[str, Any] = {"type": "function", "function": {"name": "stop"}}
NEST: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "nest-1",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/tree"}},
            "required": ["tree"],
            "additionalProperties": False,
            "$defs": {
                "tree": {
                    "type": "object",
                    "properties": {"next": {"$ref": "#/$defs/tree"}, "is": {"type": "boolean"}},
                    "additionalProperties": False,
                }
            },
        },
    },
}
TOOLS = [WEATHER, STOP, NEST]

HERMES = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>"
    '<tool_call>{\\"name\\": NAME, \\"arguments\\": OBJECT}</tool_call>{% endif %}'
    "{% for m in messages %}{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{% else %}{{ m.role }}: {{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}{% endif %}\n{% endfor %}"
)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    "{{ c.function | tojson }}{% endfor %}]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }} {{ m.tool_call_id }}[/TOOL_RESULTS]"
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% if tools %}Respond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.'
    "{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"

EOS_TOKEN = "</s>"
MARKERS = ("[TOOL_CALLS]", "<tool_call>", "</tool_call>")


@dataclass(eq=False)
class Model:
    """A tokenizer and a format; its tokens are bytes and a few special ones."""

    format: ToolFormat
    tokenizer: Tokenizer = field(repr=False)

    @cached_property
    def tokens(self) -> LLTokenizer:
        size = self.tokenizer.get_vocab_size()
        return Vocabulary(self.tokenizer.to_str(), size, (self.eos_id,)).load()

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.token_to_id(EOS_TOKEN))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def model(template: str | None, *special: str) -> Model:
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text) for text in (EOS_TOKEN, *special)])
    return Model(find_format(template, tokenizer.token_to_id), tokenizer)


MODELS: dict[str, Model] = {
    "tagged": model(HERMES),
    "tagged-special": model(HERMES, *MARKERS),
    "listed": model(MISTRAL),
    "listed-special": model(MISTRAL, *MARKERS),
    "bare": model(LLAMA3),
    "explained": model(None),
}


def written_call(format: ToolFormat, name: str = "stop", arguments: str = "{}") -> str:
    return f"{format.head(name)}{arguments}}}"


def written_calls(format: ToolFormat, *each: str) -> str:
    return format.marker + format.opening + (format.between or "").join(each) + format.last

"""Tiny random checkpoints in the hub's formats, made without any download.

Needs numpy, safetensors and tokenizers only. Every random number comes from a generator seeded with
the tensor's name, so a rebuild gives the same bytes. Widths are multiples of 64 where 4-bit code
paths want them, head counts are even so that two ranks can share them.

    kind          like                             differs by
    next-mistral  llava-hf/llava-v1.6-mistral-7b   2 kv heads, no sliding window
    next-vicuna   llava-hf/llava-v1.6-vicuna-7b    llama text model
    next-yi       llava-hf/llava-v1.6-34b          chatml, eos 7, no bos, a larger rope base
    next-custom   a configuration made by hand     relu, "full", layer -1, own pinpoints, tied
    llava15       llava-hf/llava-1.5-7b            one crop, no tiles
    llama         a llama-2 chat model             text only, one file
    mistral       a mistral-7b-v0.1 model          text only, sliding window of 24
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

Array = NDArray[Any]
Config = dict[str, Any]

KINDS = ("next-mistral", "next-vicuna", "next-yi", "next-custom", "llava15", "llama", "mistral")

BASE_VOCABULARY = 600
"""Tokens of the language model's own vocabulary; `<image>` and `<pad>` follow it."""
EMBEDDING_ROWS = 640  # padded to a multiple of 64, as the hub's 32064 is
CUSTOM_IMAGE_TOKEN = 500  # inside the vocabulary, as a hand-made configuration may have it

MISTRAL_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + m['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'][0]['text'] + '</s> ' }}"
    "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)
VICUNA_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)

VISION: Config = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 64,
    "vocab_size": EMBEDDING_ROWS,
}
TEXT: Config = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-05,
    "vocab_size": EMBEDDING_ROWS,
}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
CUSTOM_PINPOINTS = [[64, 64], [128, 128]]


@dataclass(frozen=True, slots=True)
class Words:
    """The special tokens of a tokenizer: what stands at which id."""

    first: tuple[str, ...]  # the ids from 0 on, before the bytes
    bos: str | None
    eos: str
    pad: str
    image: int | None  # id of `<image>`
    has_pad_token: bool = False  # `<pad>` stands right after `<image>`


LLAMA_FIRST = ("<unk>", "<s>", "</s>")
YI_FIRST = (
    "<unk>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|Human|>",
    "<|Assistant|>",
    "<|System|>",
    "<|im_start|>",
    "<|im_end|>",
)


def make(kind: str, folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a checkpoint of `kind` into `folder`, which is created.

    Args:
        changes: merged into config.json key by key, into nested objects too; a value of None
            stays None, as JSON's null. Tensors take the shapes the changed configuration asks for.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = merged(model_config(kind), changes or {})
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(kind))
    write_tokenizer(folder, kind)
    if "vision_config" in config:
        write_processors(folder, kind, config)
    write_tensors(folder, hub_tensors(config), num_files=1 if kind == "llama" else 2)
    return folder


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> Config:
    """`base` with `changes` laid over it, nested objects key by key."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merged(old, value) if nested else value  # type: ignore[arg-type]
    return result


# --- config.json ---------------------------------------------------------------------------------


def model_config(kind: str) -> Config:
    """config.json of a kind, in the keys the hub's files have (transformers 4.36 to 4.41)."""
    return _CONFIGS[kind]()


def _mistral_text() -> Config:
    return TEXT | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }


def _vicuna_text() -> Config:
    return TEXT | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "torch_dtype": "float16",
    }


def _yi_text() -> Config:
    return TEXT | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 7,
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "rope_theta": 5000000.0,
        "torch_dtype": "bfloat16",
    }


def _next(text: Config) -> Config:
    return {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "ignore_index": -100,
        "image_grid_pinpoints": PINPOINTS,
        "image_token_index": BASE_VOCABULARY,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.39.0.dev0",
        "use_image_newline_parameter": True,
        "vision_config": dict(VISION),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _custom() -> Config:
    changes = {
        "ignore_index": -1,
        "image_token_index": CUSTOM_IMAGE_TOKEN,
        "image_grid_pinpoints": CUSTOM_PINPOINTS,
        "projector_hidden_act": "relu",
        "tie_word_embeddings": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_config": {"image_size": 64, "patch_size": 16},
        "text_config": {"max_position_embeddings": 2048},
    }
    return merged(_next(_vicuna_text()), changes)


def _llava15() -> Config:
    config = _next(_vicuna_text()) | {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "pad_token_id": BASE_VOCABULARY + 1,
    }
    del config["image_grid_pinpoints"], config["use_image_newline_parameter"]
    return config


def _llama() -> Config:
    return _vicuna_text() | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _mistral() -> Config:
    return _mistral_text() | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "sliding_window": 24,
        "tie_word_embeddings": False,
    }


_CONFIGS: Mapping[str, Callable[[], Config]] = {
    "next-mistral": lambda: _next(_mistral_text()),
    "next-vicuna": lambda: _next(_vicuna_text()),
    "next-yi": lambda: _next(_yi_text()),
    "next-custom": _custom,
    "llava15": _llava15,
    "llama": _llama,
    "mistral": _mistral,
}


def generation_config(kind: str) -> Config:
    """generation_config.json: the hub's have no sampling defaults, hence greedy."""
    config: Config = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "next-yi":
        config["eos_token_id"] = 7
    if kind in ("next-vicuna", "next-yi"):
        config["pad_token_id"] = 0
    if kind == "llava15":
        config["pad_token_id"] = BASE_VOCABULARY + 1
    return config | {"transformers_version": "4.39.0.dev0"}


# --- tokenizer -----------------------------------------------------------------------------------


def words(kind: str) -> Words:
    """The special tokens of a kind."""
    if kind == "next-yi":
        return Words(YI_FIRST, None, "<|im_end|>", "<unk>", BASE_VOCABULARY)
    if kind == "next-custom":
        return Words(LLAMA_FIRST, "<s>", "</s>", "<unk>", CUSTOM_IMAGE_TOKEN)
    if kind in ("llama", "mistral"):
        return Words(LLAMA_FIRST, "<s>", "</s>", "<unk>", None)
    if kind == "next-vicuna":
        return Words(LLAMA_FIRST, "<s>", "</s>", "<unk>", BASE_VOCABULARY, has_pad_token=True)
    return Words(LLAMA_FIRST, "<s>", "</s>", "<pad>", BASE_VOCABULARY, has_pad_token=True)


def chat_template(kind: str) -> str | None:
    """The chat template of a kind; the base model `mistral` has none."""
    if kind == "next-mistral":
        return MISTRAL_TEMPLATE
    if kind == "next-yi":
        return CHATML_TEMPLATE
    if kind == "llama":
        return LLAMA2_TEMPLATE
    return None if kind == "mistral" else VICUNA_TEMPLATE


def build_tokenizer(kind: str) -> Tokenizer:
    """A byte-fallback BPE as the hub's llama-likes have it (`legacy`: a space before all text)."""
    special = words(kind)
    pieces, merges = _trained_pieces(BASE_VOCABULARY - len(special.first) - 256)
    tokens = [*special.first, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    if special.image is not None and special.image < BASE_VOCABULARY:
        # The image token stands inside the vocabulary; the last piece and its merge make room.
        dropped = tokens.pop()
        tokens.insert(special.image, "<image>")
        merges = [pair for pair in merges if "".join(pair) != dropped and dropped not in pair]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    if special.bos:
        bos = (special.bos, vocabulary[special.bos])
        tokenizer.post_processor = TemplateProcessing(
            single=f"{special.bos} $A",
            pair=f"{special.bos} $A {special.bos} $B:1",
            special_tokens=[bos],
        )
    tokenizer.add_special_tokens([_special(token) for token in _special_tokens(special)])
    return tokenizer


def _special_tokens(special: Words) -> Iterator[str]:
    yield from special.first
    if special.image is not None:
        yield "<image>"
    if special.has_pad_token:
        yield "<pad>"


def _special(token: str) -> AddedToken:
    return AddedToken(token, normalized=False, special=True)


@cache
def _trained_pieces(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """`count` pieces learnt from `_CORPUS`: its characters, then merges of them in order."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n"), "removed"), pre_tokenizers.Metaspace()]
    )
    trainer = trainers.BpeTrainer(vocab_size=count, show_progress=False)
    tokenizer.train_from_iterator([_CORPUS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if len(pieces) != count:
        raise AssertionError(f"the corpus gives {len(pieces)} pieces, {count} are wanted")
    return pieces, [(left, right) for left, right in model["merges"]]


def write_tokenizer(folder: Path, kind: str) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    special, tokenizer = words(kind), build_tokenizer(kind)
    text = tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    named = {"eos_token": special.eos, "pad_token": special.pad, "unk_token": "<unk>"}
    if special.bos:
        named["bos_token"] = special.bos
    config: Config = {
        "add_bos_token": special.bos is not None,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in json.loads(text)["added_tokens"]
        },
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 4096,
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
        **named,
    }
    template = chat_template(kind)
    if special.image is None:
        if template is not None:
            config["chat_template"] = template
    else:
        config["extra_special_tokens"] = {"image_token": "<image>"}
        config["processor_class"] = _processor_class(kind)
        write_json(folder / "chat_template.json", {"chat_template": template})
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", named)


# --- processors ----------------------------------------------------------------------------------


def _processor_class(kind: str) -> str:
    return "LlavaProcessor" if kind == "llava15" else "LlavaNextProcessor"


def write_processors(folder: Path, kind: str, config: Config) -> None:
    """processor_config.json and preprocessor_config.json."""
    side = config["vision_config"]["image_size"]
    images: Config = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "processor_class": _processor_class(kind),
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": side},
    }
    if config["model_type"] == "llava_next":
        images |= {
            "aspect_ratio_setting": "anyres",
            "do_pad": True,
            "image_grid_pinpoints": config["image_grid_pinpoints"],
            "image_processor_type": "LlavaNextImageProcessor",
        }
    write_json(folder / "preprocessor_config.json", images)
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": config["vision_config"]["patch_size"],
        "processor_class": _processor_class(kind),
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }
    write_json(folder / "processor_config.json", processor)


# --- tensors -------------------------------------------------------------------------------------


def hub_tensors(config: Mapping[str, Any]) -> dict[str, Array]:
    """Every tensor of a model, float16, under the names the hub's files have."""
    tied = bool(config.get("tie_word_embeddings"))
    if "vision_config" not in config:
        return dict(_text_tensors(config, "", tied))
    tensors = dict(_text_tensors(config["text_config"], "language_model.", tied))
    vision, width = config["vision_config"], config["text_config"]["hidden_size"]
    tensors |= dict(_vision_tensors(vision, "vision_tower.vision_model."))
    layers = config["vision_feature_layer"]
    features = vision["hidden_size"] * (len(layers) if isinstance(layers, list) else 1)
    name = "multi_modal_projector"
    tensors[f"{name}.linear_1.weight"] = _matrix(f"{name}.1", width, features)
    tensors[f"{name}.linear_2.weight"] = _matrix(f"{name}.2", width, width)
    if config.get("multimodal_projector_bias", True):
        tensors[f"{name}.linear_1.bias"] = _normal(f"{name}.1b", (width,), 0.1)
        tensors[f"{name}.linear_2.bias"] = _normal(f"{name}.2b", (width,), 0.1)
    if config["model_type"] == "llava_next":
        tensors["image_newline"] = _normal("image_newline", (width,), 0.5)
    return tensors


def _text_tensors(c: Mapping[str, Any], prefix: str, tied: bool) -> Iterator[tuple[str, Array]]:
    width, inner, rows = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    heads = c["num_attention_heads"]
    kv_heads = c.get("num_key_value_heads") or heads
    head = c.get("head_dim") or width // heads
    # A tied embedding is also the head: kept small, so that a token does not predict itself.
    yield (
        f"{prefix}model.embed_tokens.weight",
        _normal("embed", (rows, width), 0.08 if tied else 0.3),
    )
    for i in range(c["num_hidden_layers"]):
        name = f"{prefix}model.layers.{i}"
        shapes = {
            "self_attn.q_proj": (heads * head, width),
            "self_attn.k_proj": (kv_heads * head, width),
            "self_attn.v_proj": (kv_heads * head, width),
            "self_attn.o_proj": (width, heads * head),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }
        for part, (rows_, columns) in shapes.items():
            # Sharp attention: what stands far back must matter, or tests would not see it missing.
            gain = 2.0 if part in ("self_attn.q_proj", "self_attn.k_proj") else 1.0
            yield f"{name}.{part}.weight", _matrix(f"{i}.{part}", rows_, columns, gain)
            if c.get("attention_bias" if part.startswith("self_attn") else "mlp_bias"):
                yield f"{name}.{part}.bias", _normal(f"{i}.{part}.bias", (rows_,), 0.2)
        yield f"{name}.input_layernorm.weight", _norm(f"{i}.norm1", width)
        yield f"{name}.post_attention_layernorm.weight", _norm(f"{i}.norm2", width)
    yield f"{prefix}model.norm.weight", _norm("norm", width)
    if not tied:
        yield f"{prefix}lm_head.weight", _normal("lm_head", (rows, width), 2 * width**-0.5)


def _vision_tensors(c: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Array]]:
    width, inner, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    positions = (c["image_size"] // patch) ** 2 + 1
    yield f"{prefix}embeddings.class_embedding", _normal("class", (width,), 0.5)
    yield (
        f"{prefix}embeddings.position_embedding.weight",
        _normal("position", (positions, width), 0.3),
    )
    kernel = _normal("patch", (width, 3, patch, patch), 1 / patch)
    yield f"{prefix}embeddings.patch_embedding.weight", kernel
    norms = {"pre_layrnorm": "pre", "post_layernorm": "post"}
    for i in range(c["num_hidden_layers"]):
        name = f"encoder.layers.{i}"
        shapes = {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width, width),
            "self_attn.v_proj": (width, width),
            "self_attn.out_proj": (width, width),
            "mlp.fc1": (inner, width),
            "mlp.fc2": (width, inner),
        }
        for part, (rows, columns) in shapes.items():
            yield f"{prefix}{name}.{part}.weight", _matrix(f"v{i}.{part}", rows, columns)
            yield f"{prefix}{name}.{part}.bias", _normal(f"v{i}.{part}.bias", (rows,), 0.1)
        norms |= {f"{name}.layer_norm1": f"v{i}.1", f"{name}.layer_norm2": f"v{i}.2"}
    for norm, seed in norms.items():
        yield f"{prefix}{norm}.weight", _norm(seed, width)
        yield f"{prefix}{norm}.bias", _normal(f"{seed}.bias", (width,), 0.1)


def _normal(seed: str, shape: tuple[int, ...], scale: float) -> Array:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(seed.encode())))
    return (generator.standard_normal(shape, dtype=np.float32) * scale).astype(np.float16)


def _matrix(seed: str, rows: int, columns: int, gain: float = 1.0) -> Array:
    return _normal(seed, (rows, columns), gain * columns**-0.5)


def _norm(seed: str, width: int) -> Array:
    return (1 + _normal(seed, (width,), 0.1)).astype(np.float16)


def write_tensors(folder: Path, tensors: Mapping[str, Array], num_files: int = 2) -> None:
    """One `model.safetensors`, or several files and their index."""
    names = sorted(tensors)
    if num_files == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    per_file = -(-len(names) // num_files)
    weight_map: dict[str, str] = {}
    for i in range(num_files):
        part = names[i * per_file : (i + 1) * per_file]
        file = f"model-{i + 1:05d}-of-{num_files:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as the hub writes it: sorted, two spaces."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_CORPUS = """
A chat between a curious human and an artificial intelligence assistant. The assistant gives
helpful, detailed, and polite answers to the human's questions. USER: What is shown in this image?
ASSISTANT: The picture shows a red circle on a white background, and a blue square to the left of
the circle. USER: How many objects can you see? ASSISTANT: There are three objects: a circle, a
square and a star. [INST] What does the sign say? [/INST] The sign says STOP in large white
letters. [INST] Describe the image in detail. [/INST] In the middle of the picture there is a
street with a traffic light; behind it stand two tall buildings, and in front of them a man with a
dog waits for the green light. What colour is the car? It is yellow. Is there a cat? No, there is
not. Classify the object in the image. It is a bicycle. Read the text: 0123456789, 42, 365, 1984,
2024. Write one sentence about the weather. It was raining all morning, but in the evening the sun
came through the clouds over the harbour. Who are you? I am a language model that was made for
tests; nothing I say means anything at all. The quick brown fox jumps over the lazy dog. Pack my
box with five dozen liquor jugs! (Really?) "Yes," he said; 'no', she wrote -- and so on & so
forth: a/b, c*d, e=f, x+y, 50% of $100 #1 @home {ok} ~ ^ | < >. Translate to German: good morning,
thank you very much, where is the station? Summarise the following text in a few words. List the
steps: first, open the door; second, turn on the light; third, sit down. JSON keys are strings and
values may be numbers, strings, true, false or null. Keep the answer short.
""".strip()

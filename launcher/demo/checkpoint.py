"""The demo model as a folder in the hub's LLaVA-NeXT format."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

from tessera.launcher.demo import pictures
from tessera.launcher.demo.network import Sizes
from tessera.launcher.demo.tiles import PATCH, PINPOINTS, TILE

UNKNOWN, BOS, EOS, IMAGE, PAD = 0, 1, 2, 768, 769
SPECIAL = {"<unk>": UNKNOWN, "<s>": BOS, "</s>": EOS, "<image>": IMAGE, "<pad>": PAD}
MAX_POSITIONS = 2048
CHAT_TEMPLATE = (  # the hub's mistral template; a message's content may also be a plain string
    "{% for message in messages %}"
    "{% set is_text = message['content'] is string %}"
    "{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + (message['content'] if is_text else message['content'][0]['text'])"
    " + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}"
    "{% if is_text %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + (message['content'] if is_text else message['content'][0]['text']) + '</s> ' }}"
    "{% else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}"
    "{% endif %}"
    "{% endfor %}"
)


def build_tokenizer() -> Tokenizer:
    """A byte-fallback BPE like Llama's; the characters of read text stay single tokens."""
    trained = Tokenizer(models.BPE())
    words = Regex(r'▁?"|▁?[A-Za-z]+|▁?[^A-Za-z"▁]|▁')
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Split(words, "isolated")]
    )
    alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
    first = 3 + 256
    trainer = trainers.BpeTrainer(
        vocab_size=IMAGE - first, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(_corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *learned]
    tokens += [f"<unused_{i}>" for i in range(IMAGE - len(tokens))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(pair) for pair in model["merges"]],
            unk_token="<unk>", byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
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
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    assert all(tokenizer.token_to_id(token) == i for token, i in SPECIAL.items())
    return tokenizer


def _corpus() -> Iterator[str]:
    """Questions and answers without any read text, so that no run of capitals is ever merged."""
    for index in range(4000):
        rng = pictures.seeded("tokenizer", 0, index)
        scene = pictures.random_scene(rng, 200, 200)
        if scene.lines:
            continue
        for question in pictures.questions(rng, scene):
            yield f" {question.text} {question.answer}"
            yield question.text
    for question_text, answer in pictures.CHAT * 20:
        yield f" {question_text} {answer}"
        yield question_text
    for name in pictures.COLOR_NAMES * 50:
        yield f' {name} {name.capitalize()} {name} the text " colour'
    for _ in range(30):
        yield (
            " chat between curious human and an artificial intelligence assistant"
            " gives helpful detailed polite answers to questions"
        )


def save(folder: Path, sizes: Sizes, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write everything that serving needs; weights are stored in bf16 under the hub's names."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in configs(sizes).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    stored = {
        name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in weights.items()
    }
    partial = folder / ".model.safetensors.partial"
    save_file(stored, str(partial), metadata={"format": "pt"})
    partial.rename(folder / "model.safetensors")


def configs(sizes: Sizes) -> dict[str, dict[str, object]]:
    """The JSON files of the checkpoint, by name."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(i): {"content": token, **flags, "special": True} for token, i in SPECIAL.items()}
    return {
        "config.json": {
            "architectures": ["LlavaNextForConditionalGeneration"],
            "model_type": "llava_next",
            "image_token_index": IMAGE,
            "image_grid_pinpoints": [list(pinpoint) for pinpoint in PINPOINTS],
            "projector_hidden_act": "gelu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_image_newline_parameter": True,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "text_config": {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
                "head_dim": sizes.head_size,
                "hidden_act": "silu",
                "hidden_size": sizes.text_hidden,
                "intermediate_size": sizes.text_intermediate,
                "max_position_embeddings": MAX_POSITIONS,
                "num_attention_heads": sizes.text_heads,
                "num_hidden_layers": sizes.text_layers,
                "num_key_value_heads": sizes.key_value_heads,
                "rms_norm_eps": sizes.norm_eps,
                "rope_theta": sizes.rope_theta,
                "sliding_window": None,
                "tie_word_embeddings": True,
                "vocab_size": sizes.vocabulary,
            },
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_act": "quick_gelu",
                "hidden_size": sizes.vision_hidden,
                "image_size": TILE,
                "intermediate_size": sizes.vision_intermediate,
                "layer_norm_eps": 1e-5,
                "num_attention_heads": sizes.vision_heads,
                "num_hidden_layers": sizes.vision_layers,
                "patch_size": PATCH,
                "projection_dim": 64,
            },
        },
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": added,
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            "legacy": True,
            "model_max_length": MAX_POSITIONS,
            "pad_token": "<pad>",
            "padding_side": "left",
            "processor_class": "LlavaNextProcessor",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
        },
        "special_tokens_map.json": {
            "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        },
        "preprocessor_config.json": {
            "aspect_ratio_setting": "anyres",
            "crop_size": {"height": TILE, "width": TILE},
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_grid_pinpoints": [list(pinpoint) for pinpoint in PINPOINTS],
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "LlavaNextImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "processor_class": "LlavaNextProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": TILE},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": PATCH,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": "default",
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }  # fmt: skip

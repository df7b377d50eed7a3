import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from tessera.router.errors import ValidationError
from tessera.router.model_files import ModelFiles, ModelFilesError
from tessera.router.pieces import PieceKind, piece_kind
from tessera.router.request import PlacedImage, PreparedImage
from tessera.router.tokenizer import Tokenizer
from tests import checkpoints

Checkpoint = Callable[[str], Path]
VISION_KINDS = ("next-mistral", "next-vicuna", "next-yi", "next-custom", "llava15")
QUESTION = "What is shown in this image?"
PROMPTS = (
    "<image>\nWhat is shown?",
    "[INST] <image>\nWhat is shown in this image? [/INST]",
    f"A chat. USER: <image>\n{QUESTION} ASSISTANT:",
    f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    f"[INST] <image>\n<image> and  <image>\n{QUESTION} [/INST]",
    "<image>",
    "<image><image><image>",
    "  no picture, two  spaces \n",
    "</s> <s>grüße 🙂 ​<unk>",
    "",
)


def picture(num_tokens: int = 3, tag: int = 0) -> PreparedImage:
    return PreparedImage(bytes([tag]) * 16, 1, 1, 1, b"", num_tokens)


def split(prompt: str, images: list[PreparedImage]) -> list[str | PreparedImage]:
    parts: list[str | PreparedImage] = []
    for index, text in enumerate(prompt.split("<image>")):
        if index:
            parts.append(images[index - 1])
        parts.append(text)
    return parts


def encode(
    tokenizer: Tokenizer, parts: list[str | PreparedImage], add_special_tokens: bool = True
) -> tuple[tuple[int, ...], tuple[PlacedImage, ...]]:
    """A prompt as `PromptBuilder` makes it: tokens first, then the pictures' places."""
    pictures = [part for part in parts if isinstance(part, PreparedImage)]
    return tokenizer.place_images(tokenizer.encode_parts(parts, add_special_tokens), pictures)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return {}


@pytest.fixture
def tokenizer_of(
    checkpoint: Checkpoint, tokenizers: dict[str, Tokenizer]
) -> Callable[[str], Tokenizer]:
    def get(kind: str) -> Tokenizer:
        if kind not in tokenizers:
            tokenizers[kind] = Tokenizer.from_folder(checkpoint(kind))
        return tokenizers[kind]

    return get


def byte_level() -> dict[str, Any]:
    """A GPT-2 style tokenizer.json of single bytes, with one added token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>")])
    backend.add_tokens(["<tool>"])
    definition: dict[str, Any] = json.loads(backend.to_str())
    return definition


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_prompt_ids_equal_the_processor(
    checkpoint: Checkpoint, tokenizer_of: Callable[[str], Tokenizer], kind: str
) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.AutoProcessor.from_pretrained(checkpoint(kind), use_fast=True)
    layout = ModelFiles.read(checkpoint(kind)).layout
    assert layout is not None
    tokenizer = tokenizer_of(kind)
    sizes = [(60, 60), (130, 40), (33, 99)]
    for prompt in PROMPTS[:-1]:
        count = prompt.count("<image>")
        pictures = [Image.new("RGB", size) for size in sizes[:count]]
        expected = processor(images=pictures or None, text=prompt)["input_ids"][0]
        prepared = [
            PreparedImage(b"", h, w, 1, b"", layout.plan(h, w).num_tokens) for w, h in sizes[:count]
        ]
        ids, placed = encode(tokenizer, split(prompt, prepared))
        assert list(ids) == list(expected), prompt
        assert [p.image for p in placed] == prepared
        for p in placed:
            end = p.offset + p.image.num_tokens
            assert set(ids[p.offset : end]) == {tokenizer.image_token_id}


@pytest.mark.parametrize("kind", checkpoints.KINDS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_text_ids_equal_the_backend(
    checkpoint: Checkpoint,
    tokenizer_of: Callable[[str], Tokenizer],
    kind: str,
    add_special_tokens: bool,
) -> None:
    backend = Backend.from_file(str(checkpoint(kind) / "tokenizer.json"))
    for prompt in PROMPTS:
        text = prompt.replace("<image>", "(image)")
        ids = tokenizer_of(kind).encode_parts([text], add_special_tokens)
        assert ids == backend.encode(text, add_special_tokens=add_special_tokens).ids


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_written_image_token_is_text(tokenizer_of: Callable[[str], Tokenizer], kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = "What does <image> mean? <image><image>"
    ids, placed = encode(tokenizer, [text, picture(4), text])
    assert ids.count(tokenizer.image_token_id) == 4
    assert [p.offset for p in placed] == [ids.index(tokenizer.image_token_id)]  # type: ignore[arg-type]
    assert tokenizer.decode(ids).replace(" ", "") == 2 * text.replace(" ", "")


@pytest.fixture(scope="module")
def custom_tokenizer() -> Tokenizer:
    definition = json.loads(checkpoints.build_tokenizer("next-custom").to_str())
    return Tokenizer(definition, image_token="<image>", image_token_id=500)


@settings(max_examples=100, deadline=None)
@given(text=st.text(), parts=st.lists(st.sampled_from(["<image>", "<", "image>", "<im", "age>"])))
def test_no_text_becomes_the_image_token(
    custom_tokenizer: Tokenizer, text: str, parts: list[str]
) -> None:
    assert 500 not in custom_tokenizer.encode_parts([*parts, text, *parts], True)


def test_other_special_tokens_in_text_are_special(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    assert tokenizer_of("next-mistral").encode_parts(["a</s>"], False)[-1] == 2


def test_pictures_for_a_text_model_are_refused(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(ValidationError, match="text only"):
        tokenizer_of("llama").encode_parts(["a", picture()], add_special_tokens=True)


def test_lone_surrogates_are_refused(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(ValidationError, match="surrogate"):
        tokenizer_of("llama").encode_parts(["a\ud83d"], add_special_tokens=True)
    with pytest.raises(ValidationError, match="surrogate"):
        tokenizer_of("llama").encode_with_spans("a\ud83d", add_special_tokens=True)


def test_spans_are_characters_of_the_text(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    text = "The 🙂 picture"
    spans = tokenizer_of("llama").encode_with_spans(text, add_special_tokens=True)
    assert spans[0] == (1, 0, 0)
    assert "".join(dict.fromkeys(text[a:b] for _, a, b in spans)) == text
    assert [s[0] for s in spans] == tokenizer_of("llama").encode_parts([text], True)


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    backend = checkpoints.build_tokenizer("llama")
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer(json.loads(backend.to_str()))
    assert 3 < len(tokenizer.encode_parts(["many many words"], True)) < 50


class TestTruncateLeft:
    @pytest.fixture
    def tokenizer(self, tokenizer_of: Callable[[str], Tokenizer]) -> Tokenizer:
        return tokenizer_of("next-mistral")

    def test_short_prompts_stay(self, tokenizer: Tokenizer) -> None:
        images = (PlacedImage(picture(), 1),)
        assert tokenizer.truncate_left((1, 600, 600, 600), images, 4) == (
            (1, 600, 600, 600),
            images,
        )

    def test_first_token_stays_if_it_begins_sequences(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.truncate_left((1, 10, 11, 12), (), 3) == ((1, 11, 12), ())
        assert tokenizer.truncate_left((9, 10, 11, 12), (), 3) == ((10, 11, 12), ())
        assert tokenizer.truncate_left((1, 10, 11, 12), (), 1) == ((1,), ())

    def test_whole_pictures_fall_out_or_move(self, tokenizer: Tokenizer) -> None:
        first, second = picture(2, 1), picture(3, 2)
        ids = (1, 600, 600, 50, 600, 600, 600, 51)
        images = (PlacedImage(first, 1), PlacedImage(second, 4))
        kept, placed = tokenizer.truncate_left(ids, images, 6)
        assert kept == (1, 50, 600, 600, 600, 51)
        assert placed == (PlacedImage(second, 2),)
        assert tokenizer.truncate_left(ids, images, 5)[1] == (PlacedImage(second, 1),)
        assert tokenizer.truncate_left(ids, images, 2) == ((1, 51), ())

    def test_no_picture_is_cut(self, tokenizer: Tokenizer) -> None:
        ids, images = (1, 600, 600, 600, 51), (PlacedImage(picture(3), 1),)
        for length in (3, 4):
            with pytest.raises(ValidationError, match=f"`truncate`={length} would cut a picture"):
                tokenizer.truncate_left(ids, images, length)


@pytest.mark.parametrize("kind", checkpoints.KINDS)
def test_decoding_equals_the_backend(
    checkpoint: Checkpoint, tokenizer_of: Callable[[str], Tokenizer], kind: str
) -> None:
    backend = Backend.from_file(str(checkpoint(kind) / "tokenizer.json"))
    tokenizer = tokenizer_of(kind)
    ids = [*range(tokenizer.vocab_size), 5000]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)


def test_token_texts(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of("next-mistral")

    def known(token: str) -> int:
        token_id = tokenizer.token_id(token)
        assert token_id is not None
        return token_id

    assert tokenizer.token_text(2) == "</s>" and tokenizer.is_special(2)
    assert tokenizer.token_text(600) == "<image>" and tokenizer.is_special(600)
    assert known("<image>") == 600
    assert tokenizer.token_text(known("▁the")) == " the"
    assert tokenizer.token_text(known("<0x0A>")) == "\n"
    assert tokenizer.token_text(known("<0xE2>")) == "\ufffd"
    assert tokenizer.token_bytes(known("<0xE2>")) == b"\xe2"
    assert tokenizer.token_bytes(known("▁the")) == b" the"
    assert not tokenizer.is_special(known("▁the"))
    assert tokenizer.token_text(639) == "" == tokenizer.token_text(-1)  # rows without a token
    assert tokenizer.token_id("no such token") is None


def test_end_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert Tokenizer.from_folder(checkpoint("next-yi")).eos_ids == {7}
    folder = checkpoints.make("next-vicuna", tmp_path / "model")
    checkpoints.write_json(folder / "generation_config.json", {"eos_token_id": [5, 6]})
    assert Tokenizer.from_folder(folder).eos_ids == {2, 5, 6}
    other = tmp_path / "other.json"
    checkpoints.write_json(other, {"eos_token": {"content": "<s>"}})
    assert Tokenizer.from_folder(folder, other).eos_ids == {1, 5, 6}


def test_bos_without_a_post_processor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoints.make("next-vicuna", tmp_path / "model")
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    definition["post_processor"] = None
    checkpoints.write_json(folder / "tokenizer.json", definition)
    tokenizer = Tokenizer.from_folder(folder)
    original = Tokenizer.from_folder(checkpoint("next-vicuna"))
    parts = ["USER: ", picture(), "\nWhy?"]
    for special in (True, False):
        assert tokenizer.encode_parts(parts, special) == original.encode_parts(parts, special)
    assert tokenizer.encode_with_spans("a", True) == original.encode_with_spans("a", True)

    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    checkpoints.write_json(folder / "tokenizer_config.json", config | {"add_bos_token": False})
    assert Tokenizer.from_folder(folder).encode_parts(["a"], True)[0] != 1


def test_missing_tokenizer_names_the_command(tmp_path: Path) -> None:
    folder = checkpoints.make("llama", tmp_path / "model")
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ModelFilesError, match=r"save_pretrained"):
        Tokenizer.from_folder(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_token_index": 601}, "token 601"),
        ({"image_token_index": 10}, "has it as token 600"),
        ({"text_config": {"vocab_size": 600}}, "ids up to 601.*vocab_size=600"),
    ],
)
def test_contradicting_files_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = checkpoints.make("next-mistral", tmp_path / "model")
    config = checkpoints.merged(checkpoints.model_config("next-mistral"), changes)
    checkpoints.write_json(folder / "config.json", config)
    with pytest.raises(ModelFilesError, match=message):
        Tokenizer.from_folder(folder)


def test_missing_image_token_is_refused(tmp_path: Path, checkpoint: Checkpoint) -> None:
    folder = checkpoints.make("next-mistral", tmp_path / "model")
    text = (checkpoint("llama") / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFilesError, match="no such added token"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("definition", [{}, {"model": {"type": "Nothing"}}, {"model": 3}])
def test_damaged_tokenizer_is_refused(definition: dict[str, Any]) -> None:
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json cannot be used"):
        Tokenizer(definition)


def test_unknown_bos_is_refused() -> None:
    definition = byte_level() | {"post_processor": None}
    with pytest.raises(ModelFilesError, match="'<s>'"):
        Tokenizer(definition, bos_token="<s>", add_bos_token=True)


def test_byte_level_tokens() -> None:
    tokenizer = Tokenizer(byte_level(), eos_token="<|end|>")
    assert tokenizer.kind is PieceKind.BYTE_LEVEL
    text = "grüße 🙂\n"
    ids = tokenizer.encode_parts([text], add_special_tokens=True)
    assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_text(257) == "<tool>" and not tokenizer.is_special(257)
    assert tokenizer.eos_ids == {256}


@pytest.mark.parametrize(
    ("decoder", "kind"),
    [
        (None, PieceKind.OTHER),
        (decoders.ByteLevel(), PieceKind.BYTE_LEVEL),
        (decoders.WordPiece(), PieceKind.OTHER),
        (decoders.Metaspace(), PieceKind.OTHER),
        (
            decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            ),
            PieceKind.BYTE_FALLBACK,
        ),
        (
            decoders.Sequence(
                [decoders.Replace("_", " "), decoders.ByteFallback(), decoders.Fuse()]
            ),
            PieceKind.OTHER,
        ),
        (
            decoders.Sequence(
                [
                    decoders.Replace("▁", " "),
                    decoders.ByteFallback(),
                    decoders.Fuse(),
                    decoders.Strip(" ", 2, 0),
                ]
            ),
            PieceKind.OTHER,
        ),
    ],
)
def test_decoder_families(decoder: Any, kind: PieceKind) -> None:
    backend = Backend(BPE())
    if decoder is not None:
        backend.decoder = decoder
    assert piece_kind(json.loads(backend.to_str())["decoder"]) is kind

"""The checkpoint in the repository is what the code beside it describes."""

import json
from pathlib import Path

from safetensors import safe_open
from tokenizers import Tokenizer

from tessera.launcher.demo import pictures
from tessera.launcher.demo.checkpoint import EOS, SPECIAL, build_tokenizer, configs
from tessera.launcher.demo.network import Sizes

FOLDER = Path(pictures.__file__).parent / "model"


def test_folder_is_at_most_16_megabytes() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 16_000_000


def test_configuration_files_are_what_the_code_writes() -> None:
    for name, content in configs(Sizes()).items():
        assert json.loads((FOLDER / name).read_text()) == content


def test_tokenizer_is_what_the_code_builds() -> None:
    stored = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert stored.get_vocab() == build_tokenizer().get_vocab()
    assert {token: stored.token_to_id(token) for token in SPECIAL} == SPECIAL
    assert stored.decode([*stored.encode('It says "K7".').ids, EOS]) == 'It says "K7".'


def test_two_shards_can_share_all_heads() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    for heads in ("num_attention_heads", "num_key_value_heads"):
        assert text[heads] % 2 == 0
    assert vision["num_attention_heads"] % 2 == 0
    assert text["vocab_size"] % 64 == 0


def test_tensors_have_the_hubs_names_in_bf16() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="numpy") as file:
        names = set(file.keys())
        kinds = {file.get_slice(name).get_dtype() for name in names}
    assert kinds == {"BF16"}
    assert "language_model.model.embed_tokens.weight" in names
    assert "vision_tower.vision_model.pre_layrnorm.weight" in names
    assert "multi_modal_projector.linear_2.bias" in names
    assert "image_newline" in names
    assert not [name for name in names if "_head." in name]

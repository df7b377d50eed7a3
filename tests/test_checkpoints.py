"""The tiny checkpoints are what tests take them for: reproducible, and in the hub's format."""

import filecmp
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests import checkpoints

ROOT = Path(__file__).parents[1]


def test_a_rebuild_by_another_process_gives_the_same_bytes(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    code = (
        "from tests.checkpoints import KINDS, make; from pathlib import Path; import sys\n"
        "for kind in KINDS: make(kind, Path(sys.argv[1]) / kind)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    for kind in checkpoints.KINDS:
        names = sorted(path.name for path in checkpoint(kind).iterdir())
        assert names == sorted(path.name for path in (tmp_path / kind).iterdir())
        _, different, _ = filecmp.cmpfiles(checkpoint(kind), tmp_path / kind, names, shallow=False)
        assert not different


@pytest.mark.parametrize("kind", [k for k in checkpoints.KINDS if k not in ("llama", "mistral")])
def test_the_image_token_is_one_special_token(kind: str, checkpoint: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint(kind) / "tokenizer.json"))
    config = json.loads((checkpoint(kind) / "config.json").read_text())
    ids = tokenizer.encode("a <image>\nb<image>").ids
    assert ids.count(config["image_token_index"]) == 2
    assert tokenizer.token_to_id("<image>") == config["image_token_index"]
    assert tokenizer.get_vocab_size() <= config["text_config"]["vocab_size"]
    assert "<image>" not in tokenizer.decode(ids)


def test_legacy_spaces_and_byte_fallback(checkpoint: Callable[[str], Path]) -> None:
    """The text after a special token gets a space of its own; unknown characters become bytes."""
    tokenizer = Tokenizer.from_file(str(checkpoint("next-mistral") / "tokenizer.json"))
    tokens = tokenizer.encode("[INST] <image>\nWhat ü").tokens
    assert tokens[0] == "<s>"
    place = tokens.index("<image>")
    assert tokens[place - 1 : place + 3] == ["▁", "<image>", "▁", "<0x0A>"]
    assert tokens[-2:] == ["<0xC3>", "<0xBC>"]


def test_no_bos_for_yi(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint("next-yi") / "tokenizer.json"))
    encoded = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert encoded.ids[0] == 6
    assert encoded.ids[-1] == 7

"""AWQ and GPTQ checkpoints compute what transformers computes with the floats they stand for."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tessera.shard.errors import CheckpointError
from tessera.shard.models import load_model
from tessera.shard.models.base import Placement
from tessera.shard.quantization_names import quantization
from tests import checkpoints
from tests.shard.models.cases import ATOL, mixed_cases, text_case
from tests.shard.models.driver import Runner, on_ranks, placement
from tests.shard.models.oracle import Oracle
from tests.shard.packed_checkpoints import Packing, convert, rewritten

PACKINGS = {
    "awq": Packing("awq", group_size=32),
    "awq 64": Packing("awq", group_size=64),
    "awq row": Packing("awq", group_size=-1),
    "gptq": Packing("gptq", group_size=32),
    "gptq 128": Packing("gptq", group_size=128),
    "gptq v2": Packing("gptq", group_size=64, file_format="gptq_v2"),
    "gptq 8": Packing("gptq", bits=8, group_size=64, file_format="gptq"),
    "gptq row": Packing("gptq", group_size=-1),
    "gptq bias": Packing("gptq", bias=0.0),
    "gptq symmetric": Packing("gptq", group_size=64, symmetric=True),
}
ACT_ORDERS = {
    "4": Packing("gptq", act_order=True),
    "4 64": Packing("gptq", group_size=64, symmetric=True, act_order=True),
    "8": Packing("gptq", bits=8, group_size=64, act_order=True, file_format="gptq_v2"),
}
Make = Callable[..., tuple[Path, Path]]


@pytest.fixture
def make(tmp_path: Path, checkpoint: Callable[[str], Path]) -> Make:
    """`make(kind, packing)`: the packed folder, and that of the floats it stands for."""

    def made(kind: str, packing: Packing, source: Path | None = None) -> tuple[Path, Path]:
        packed, plain = tmp_path / "packed", tmp_path / "plain"
        convert(source or checkpoint(kind), packed, plain, packing)
        return packed, plain

    return made


@pytest.mark.parametrize("name", PACKINGS)
def test_logits_and_greedy_ids_are_those_of_the_floats(name: str, make: Make) -> None:
    packed, plain = make("mistral", PACKINGS[name])
    oracle, runner = Oracle(plain), Runner(packed, placement())
    cases = mixed_cases(oracle)
    for case in cases:
        ours = runner.logits(case.prompt)
        torch.testing.assert_close(ours, oracle.logits(case), atol=ATOL, rtol=0)
    greedy = runner.greedy([case.prompt for case in cases], 32)
    assert greedy == [oracle.greedy(case, 32) for case in cases]


@pytest.mark.parametrize("name", ["awq", "gptq 128"])
def test_a_model_with_pictures(name: str, make: Make) -> None:
    """The tower and the projector are floats as they were."""
    packed, plain = make("next-mistral", PACKINGS[name])
    oracle, runner = Oracle(plain), Runner(packed, placement())
    for case in mixed_cases(oracle):
        ours = runner.logits(case.prompt)
        torch.testing.assert_close(ours, oracle.logits(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", PACKINGS)
def test_ranks_take_their_rows_and_columns(name: str, world_size: int, make: Make) -> None:
    """With 4 ranks a part begins inside a group of 64 or 128, and inside AWQ's words."""
    packed, plain = make("next-mistral", PACKINGS[name])
    oracle = Oracle(plain)
    case = text_case(oracle)
    logits, *_ = on_ranks(
        world_size, lambda group: Runner(packed, placement(group=group)).logits(case.prompt)
    )
    torch.testing.assert_close(logits, oracle.logits(case), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["awq", "gptq 8"])
def test_parts_that_do_not_begin_with_groups_are_floats(
    name: str, tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """160 inner columns for 3 ranks: 53, 53 and 54; 96 of heads: 32 each."""
    text = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    text |= {"intermediate_size": 160, "sliding_window": None}
    source = checkpoints.make("mistral", tmp_path / "odd", text)
    packed, plain = make("mistral", Packing(**vars(PACKINGS[name]) | {"group_size": 32}), source)
    oracle = Oracle(plain)
    case = text_case(oracle)
    with caplog.at_level(logging.WARNING):
        logits, *_ = on_ranks(
            3, lambda group: Runner(packed, placement(group=group)).logits(case.prompt)
        )
    torch.testing.assert_close(logits, oracle.logits(case), atol=ATOL, rtol=0)
    said = [r.message for r in caplog.records if "not quantised" in r.message]
    assert len(said) == 3  # once per rank
    sizes = sorted(text.split("their inputs on this rank (")[1][:2] for text in said)
    assert sizes == ["53", "53", "54"]
    assert all(text.startswith("3 linear layers are not quantised") for text in said)


@pytest.mark.parametrize("name", ["awq", "gptq", "gptq 8"])
def test_the_cpu_kernels_stay_near(name: str, make: Make) -> None:
    """They round the input to 8 bits as well."""
    packed, plain = make("mistral", PACKINGS[name])
    oracle, runner = Oracle(plain), Runner(packed, placement("cpu"))
    case = text_case(oracle)
    expected = oracle.logits(case)
    error = (runner.logits(case.prompt) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_old_files_say_it_in_a_file_of_their_own(make: Make) -> None:
    packed, plain = make("mistral", PACKINGS["awq"])
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    checkpoints.write_json(packed / "config.json", config)
    own = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    checkpoints.write_json(packed / "quant_config.json", own)
    case = text_case(Oracle(plain))
    ours = Runner(packed, placement()).logits(case.prompt)
    torch.testing.assert_close(ours, Oracle(plain).logits(case), atol=ATOL, rtol=0)


def place_of(name: str) -> Placement:
    return replace(placement(), quantization=quantization(name))


def refusal(folder: Path, name: str = "") -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, place_of(name))
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_tensors(folder: Path, **changes: object) -> Path:
    """`folder` with tensors of layer 1's query projection replaced, or left out by None."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    for part, value in changes.items():
        name = f"model.layers.1.self_attn.q_proj.{part}"
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    checkpoints.write_tensors(folder, tensors, num_files=2)
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ACT_ORDERS)
def test_groups_of_inputs_that_lie_apart_are_rounded_once_more(
    name: str, world_size: int, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """To 8 bits, from the floats that the file stands for."""
    packed, plain = make("next-mistral", ACT_ORDERS[name])
    oracle = Oracle(plain)
    case = text_case(oracle)
    with caplog.at_level(logging.INFO):
        logits, *_ = on_ranks(
            world_size, lambda group: Runner(packed, placement(group=group)).logits(case.prompt)
        )
    twice = place_of("int8")
    torch.testing.assert_close(logits, Runner(plain, twice).logits(case.prompt), atol=ATOL, rtol=0)
    expected = oracle.logits(case)
    assert (logits - expected).norm() / expected.norm() < 0.05
    assert "(gptq checkpoint), rounded once more to 8 (desc_act)" in caplog.text


def test_an_order_that_was_not_announced_is_refused(make: Make) -> None:
    packed, _ = make("mistral", PACKINGS["gptq"])
    order = np.arange(128, dtype=np.int32)[::-1].copy() // 32
    message = refusal(change_tensors(packed, g_idx=order))
    assert "layers.1.self_attn.q_proj are not made of neighbouring inputs, but" in message
    assert "desc_act=false" in message


@pytest.mark.parametrize("beyond", [-1, 4])
def test_groups_that_are_not_there_are_refused(beyond: int, make: Make) -> None:
    packed, _ = make("mistral", ACT_ORDERS["4"])
    order = np.arange(128, dtype=np.int32) // 32
    order[77] = beyond
    assert "names groups beyond the 4" in refusal(change_tensors(packed, g_idx=order))


def test_an_order_that_must_be_told(make: Make) -> None:
    packed, _ = make("mistral", PACKINGS["gptq"])
    change_tensors(packed, g_idx=None)
    load_model(packed, placement())
    assert "has no tensor" in refusal(rewritten(packed, {"desc_act": True}))


def test_a_bias_the_model_has_not(make: Make) -> None:
    packed, _ = make("mistral", Packing("gptq", bias=0.5))
    assert "has a tensor this model has not" in refusal(packed)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_parts_of_other_shapes_and_dtypes(part: str, make: Make) -> None:
    packed, _ = make("mistral", PACKINGS["awq"])
    change_tensors(packed, **{part: np.zeros((3, 5), np.int32)})
    assert f"q_proj.{part} has the shape [3, 5]" in refusal(packed)
    shape = {"qweight": (128, 16), "qzeros": (4, 16), "scales": (4, 128)}[part]
    change_tensors(packed, **{part: np.zeros(shape, np.int64)})
    assert f"q_proj.{part} has dtype I64" in refusal(packed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "fp8"}, r"(fp8) of which only awq and gptq"),
        ({"quant_method": "compressed-tensors"}, "(compressed-tensors)"),
        ({"quant_method": None}, "(None)"),
        ({"bits": 3}, "bits=3 cannot be read for awq"),
        ({"bits": 8}, "bits=8 cannot be read for awq"),
        ({"bits": None}, "bits=None"),
        ({"group_size": 16}, "group_size=16 is no multiple of 32"),
        ({"group_size": 0}, "group_size=0 must be"),
        ({"group_size": "128"}, "group_size='128' must be"),
        ({"version": "gemv"}, "packed for 'gemv'; of awq only gemm"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "packed for 'marlin'; of gptq"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "packed for 'marlin'"),
        ({"quant_method": "gptq", "bits": 2}, "bits=2 cannot be read for gptq"),
    ],
)
def test_formats_that_are_not_read(changes: dict[str, object], words: str, make: Make) -> None:
    packed, _ = make("mistral", PACKINGS["awq"])
    message = refusal(rewritten(packed, changes))
    assert words in message
    assert "QUANTIZE" in message or "must be" in message


def test_a_setting_that_contradicts_the_checkpoint(make: Make) -> None:
    packed, plain = make("mistral", PACKINGS["awq"])
    assert "QUANTIZE=gptq but the checkpoint is quantised by awq" in refusal(packed, "gptq")
    assert "not quantised; leave QUANTIZE empty, or set it to int8 or int4" in refusal(plain, "awq")


@pytest.mark.parametrize("name", ["awq", "int4", "int8"])
def test_settings_that_do_not(name: str, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    packed, plain = make("mistral", PACKINGS["awq"])
    case = text_case(Oracle(plain))
    with caplog.at_level(logging.INFO):
        runner = Runner(packed, place_of(name))
    assert "linear layers are in 4 bits (awq checkpoint)" in caplog.text
    assert ("changes nothing" in caplog.text) == (name == "int8")
    logits = runner.logits(case.prompt)
    torch.testing.assert_close(logits, Oracle(plain).logits(case), atol=ATOL, rtol=0)

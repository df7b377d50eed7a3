"""Names of other servers become the nearest that is there, or an error that names what is."""

import pytest

from tessera.shard.quantization_names import Quantization, quantization, quantization_name


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (8, "int8 INT8 bitsandbytes 8 Q8_0 q8_1 Q8K hqq8 afq8"),
        (4, "int4 bitsandbytes-nf4 bitsandbytes-fp4 4 Q4K q4k Q4_K_M q4_0 Q4_1 hqq4 afq4"),
        (8, "5 6 Q5K q5_0 Q5_1 q5_k_s Q6K afq6"),  # 4 would be less precise than what was asked for
        (4, "2 3 q2k Q3K q3_k_l afq2 afq3"),
    ],
)
def test_bits(bits: int, names: str) -> None:
    for name in names.split():
        assert quantization(name).bits == bits
        assert quantization(name).method is None


def test_what_is_not_what_it_was_called_is_told() -> None:
    assert quantization("int4").note == ""
    assert quantization("Q5K").note == (
        "q5k is int8 here: the fewest bits here that are not below 5, in groups of 32"
    )
    assert quantization("q4_0").note == "q4_0 is int4 here: as many bits, in groups of 32"
    assert "bitsandbytes-nf4 is int4" in quantization("bitsandbytes-nf4").note


def test_checkpoints_that_are_quantised_already() -> None:
    assert quantization("AWQ") == Quantization(method="awq")
    assert quantization("gptq") == Quantization(method="gptq")


def test_nothing_asked_for() -> None:
    assert quantization("") == quantization(" ") == Quantization()


@pytest.mark.parametrize(
    "name",
    ["eetq", "exl2", "marlin", "fp8", "compressed-tensors", "7", "16", "1", "q4_2", "q4kk", "int5",
     "q7_0", "q", "k", "44", "-4", "4.0", "true", "none"],
)  # fmt: skip
def test_other_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be int8 or int4 .* awq or gptq"):
        quantization(name)


def test_the_setting_is_kept_as_it_was_called() -> None:
    assert quantization_name(" Q4K ") == "q4k"
    with pytest.raises(ValueError, match="must be int8"):
        quantization_name("eetq")

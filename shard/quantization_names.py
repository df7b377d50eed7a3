"""The names that weight quantisation goes by elsewhere, and which of ours each of them is.

Ours: 8 or 4 bits in groups of 32, made while loading, or what an AWQ or GPTQ checkpoint holds.
"""

import re
from dataclasses import dataclass

OWN = {"int8": 8, "int4": 4}
# text-generation-inference's names of bitsandbytes' formats.
BITSANDBYTES = {"bitsandbytes": 8, "bitsandbytes-nf4": 4, "bitsandbytes-fp4": 4}
CHECKPOINTS = ("awq", "gptq")
# mistral.rs: a number of bits, or a name with one in it.
ISQ = re.compile(r"(?:(?:hqq|afq)?([2-68])|q([2-68])(?:_[01]|_?k(?:_[sml])?))")
EXPECTED = (
    "must be int8 or int4 (also as bitsandbytes, bitsandbytes-nf4, bitsandbytes-fp4, 8, 4, Q8_0, "
    "Q4K and the like), or awq or gptq for a checkpoint that is quantised so; other kinds are not "
    "supported"
)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What becomes of the language model's linear layers. The default: what the checkpoint says."""

    bits: int | None = None  # 4 or 8: made of floats while loading
    method: str | None = None  # the checkpoint must be quantised by it
    note: str = ""  # for the log, where the name promised something else


def quantization_name(text: str) -> str:
    """A parser for the setting: lower case, checked."""
    quantization(text)
    return text.strip().lower()


def quantization(name: str) -> Quantization:
    """What a name means; of 4 and 8 bits the fewest that are no less precise, else the most.

    Raises:
        ValueError: nothing is known by that name. The message says what is.
    """
    name = name.strip().lower()
    if not name:
        return Quantization()
    if name in CHECKPOINTS:
        return Quantization(method=name)
    if name in OWN:
        return Quantization(OWN[name])
    if name in BITSANDBYTES:
        bits = BITSANDBYTES[name]
        return Quantization(bits, note=f"{name} is int{bits} here: as many bits, in groups of 32")
    match = ISQ.fullmatch(name)
    if match is None:
        raise ValueError(EXPECTED)
    asked = int(match[1] or match[2])
    bits = 4 if asked <= 4 else 8
    reason = "as many bits" if bits == asked else f"the fewest bits here that are not below {asked}"
    return Quantization(bits, note=f"{name} is int{bits} here: {reason}, in groups of 32")

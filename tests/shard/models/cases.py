"""Prompts that together reach every branch of the image arithmetic."""

from tessera.shard.backends import cuda
from tessera.shard.backends.ipex_version import ipex_fits
from tests.shard.models.oracle import Case, Oracle, picture

BACKENDS = (
    "reference",
    "cpu",
    "xpu",
    *(("cuda",) if cuda.available() else ()),
    *(("ipex",) if ipex_fits("cpu") else ()),
)
"""Backend files, on the cpu but for cuda, and xpu, which runs on the simulated device."""

ATOL = 1e-4
"""Largest difference of two float32 logits that are computed in a different order."""

ASPECTS = {
    "square": (112, 112),
    "4:3": (80, 60),
    "3:4": (60, 80),
    "wide": (160, 40),
    "tall": (20, 120),
    "pixel": (1, 1),
    "tiny": (2, 3),
    "no columns": (1, 1000),
    "no rows": (1000, 1),
}

QUESTION = "[INST] <image>\nWhat is shown in this image? [/INST]"
THREE = "USER: <image> and <image>\n<image> Which one is red? ASSISTANT:"
TEXT = "A chat between a curious human and an assistant. USER: Who are you? ASSISTANT: " * 2


def text_case(oracle: Oracle) -> Case:
    """No image."""
    return oracle.case(TEXT)


def image_case(oracle: Oracle, aspect: str) -> Case:
    """One image."""
    return oracle.case(QUESTION, [picture(*ASPECTS[aspect])])


def three_images(oracle: Oracle) -> Case:
    """Three images of different shapes in one prompt."""
    return oracle.case(THREE, [picture(100, 50), picture(56, 56, seed=1), picture(30, 200)])


def mixed_cases(oracle: Oracle) -> list[Case]:
    """Prompts of very different lengths; with 0, 1, 3 and 0 images where there can be any."""
    short = oracle.case("Why?")
    if not oracle.takes_images:
        return [text_case(oracle), short, oracle.case(TEXT * 2)]
    return [text_case(oracle), image_case(oracle, "4:3"), three_images(oracle), short]

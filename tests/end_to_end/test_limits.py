"""Requests that meet a limit, through the real processes."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests import checkpoints
from tests.end_to_end.stack import Stack, running
from tests.shard.models.oracle import picture

pytestmark = pytest.mark.timeout(300)

MAX_INPUT_TOKENS = 80
CANVASES = [[56, 112], [112, 56], [168, 56], [56, 168]]  # all of the checkpoint's but the largest
EOS = "2"


@pytest.fixture(scope="module")
def stack(checkpoint: Callable[[str], Path]) -> Iterator[Stack]:
    """One request at a time, short prompts, little patience."""
    flags = ["--num-shard", "1", "--dtype", "float32", "--max-batch-size", "1"]
    flags += ["--max-input-tokens", str(MAX_INPUT_TOKENS), "--max-queue-time", "0.5"]
    with running(checkpoint("next-mistral"), *flags) as stack:
        yield stack


def as_png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_picture_that_is_too_large_is_answered_as_by_a_model_with_smaller_canvases(
    stack: Stack, tmp_path: Path
) -> None:
    folder = checkpoints.make("next-mistral", tmp_path / "few", {"image_grid_pinpoints": CANVASES})
    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    image, text = picture(112, 112), "[INST] <image>\nWhat? [/INST]"
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    prompt = text.replace("<image>", f"<image>{as_png(image)}</image>")
    parameters = {"max_new_tokens": 16, "details": True}
    reply = stack.post("/generate", {"inputs": prompt, "parameters": parameters})
    assert [token["id"] for token in reply.json()["details"]["tokens"]] == new.tolist()
    assert reply.headers["x-prompt-tokens"] == str(inputs["input_ids"].shape[1])
    assert reply.json()["warnings"] == [reply.headers["x-warnings"]]
    assert "36 tokens instead of 88" in reply.headers["x-warnings"]


def test_whoever_waits_longer_than_max_queue_time_is_told_to_come_again(stack: Stack) -> None:
    endless = {
        "prompt": "go on",
        "max_tokens": 4000,
        "logit_bias": {EOS: -100},
        "stream": True,
    }
    with httpx.stream("POST", f"{stack.url}/v1/completions", json=endless, timeout=60) as reply:
        lines = reply.iter_lines()
        assert "error" not in json.loads(next(lines)[5:])  # it runs, alone in the batch
        refused = stack.post("/generate", {"inputs": "me too"})
        assert refused.status_code == 429, refused.text
        assert int(refused.headers["retry-after"]) >= 1
        assert "MAX_QUEUE_TIME" in refused.json()["error"]
        next(line for line in lines if line.startswith("data:"))  # unharmed
    assert stack.generate("me too", max_new_tokens=3)  # the other client has left

"""transformers' own `generate` on the same device: a static cache, sdpa attention, compiled."""

import time
from pathlib import Path
from typing import Any

import torch

SETTINGS = {"cache_implementation": "static", "do_sample": False}


def static_generate(
    folder: Path, device: torch.device, dtype: torch.dtype, context: int, new_tokens: int
) -> "Generate":
    """The language model of a checkpoint, with random weights, as its values take no time."""
    # Seconds to import, and needed by those who ask for this part alone.
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    text = getattr(config, "text_config", config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(text, dtype=dtype, attn_implementation="sdpa")
    model.eval().generation_config.eos_token_id = None
    return Generate(model, device, context, new_tokens)


class Generate:
    """Decode rates of one model; half-way through an answer it sees `context` tokens."""

    def __init__(self, model: Any, device: torch.device, context: int, new_tokens: int) -> None:
        self._model = model
        self._device = device
        self._prompt = max(1, context - new_tokens // 2)
        self._new_tokens = new_tokens

    def tokens_per_s(self, batch: int, rounds: int) -> float:
        """Of a batch decoding; prefill is taken out by a run that stops after the first token."""
        whole, first = [], []
        for number in range(rounds + 1):
            took = self._seconds(batch, self._new_tokens + 1), self._seconds(batch, 1)
            if number:  # the first round compiles
                whole.append(took[0])
                first.append(took[1])
        return batch * self._new_tokens / (min(whole) - min(first))

    def _seconds(self, batch: int, new_tokens: int) -> float:
        ids = torch.full((batch, self._prompt), 5, dtype=torch.int64, device=self._device)
        start = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                **SETTINGS,
            )
        assert out.shape[1] == self._prompt + new_tokens
        out.cpu()  # waits for the device
        return time.perf_counter() - start

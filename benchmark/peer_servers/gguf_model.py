"""Writes a llama checkpoint as a GGUF file: what llama.cpp and OpenVINO read.

Runs in their environments, which have neither torch nor this project.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(folder: Path, path: Path, *, half: bool = False) -> None:
    """Convert the bfloat16 llama in `folder`; `half`: to IEEE half precision."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta") or 10000.0)
    writer.add_vocab_size(config["vocab_size"])
    file_type = gguf.LlamaFileType
    writer.add_file_type(file_type.MOSTLY_F16 if half else file_type.MOSTLY_BF16)
    _add_tokenizer(writer, folder, half)
    for name, bits in _tensors(folder):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = _interleaved(bits, heads if "q_proj" in name else kv_heads)
        _add(writer, _name(name), bits, half)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, half: bool) -> None:
    """The pieces as a sentencepiece vocabulary: those learnt first are merged first."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    pieces = sorted(ids, key=ids.__getitem__)
    # OpenVINO knows only this kind, which needs merges; it is given token ids.
    writer.add_tokenizer_model("gpt2" if half else "llama")
    if half:
        merges = tokenizer["model"]["merges"]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
        writer.add_string("tokenizer.ggml.pre", "default")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(token_id) for token_id in range(len(pieces))])
    writer.add_token_types([_type(piece, special) for piece in pieces])
    writer.add_bos_token_id(ids["<s>"])
    writer.add_eos_token_id(ids["</s>"])
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_add_bos_token(True)


def _type(piece: str, special: set[str]) -> int:
    if piece == "<unk>":
        return int(gguf.TokenType.UNKNOWN)
    if piece in special:
        return int(gguf.TokenType.CONTROL)
    is_byte = len(piece) == 6 and piece.startswith("<0x")
    return int(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Every tensor as the 16-bit integers that its numbers are stored in."""
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(path.read_bytes()):
            yield name, np.frombuffer(tensor["data"], np.uint16).reshape(tensor["shape"])


def _interleaved(bits: Any, heads: int) -> Any:
    """Rows in llama.cpp's order: it rotates neighbours, checkpoints rotate halves of a head."""
    rows, columns = bits.shape
    halves = bits.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _add(writer: gguf.GGUFWriter, name: str, bits: Any, half: bool) -> None:
    """Matrices stay in 16 bits; vectors must be float32."""
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    if bits.ndim == 1:
        writer.add_tensor(name, wide)
    elif half:
        writer.add_tensor(name, wide.astype(np.float16))
    else:
        raw = np.ascontiguousarray(bits).view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"

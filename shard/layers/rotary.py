"""Rotary position embeddings: from config.json to a table of cosines and sines.

Source: arXiv 2104.09864; the scaling rules are those of transformers 5.23, `modeling_rope_utils`
(`linear`, `dynamic`, `llama3`, `yarn` = arXiv 2309.00071), operation by operation in float32, so
that the angles are the same numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.shard.errors import CheckpointError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotary embedding a configuration asks for."""

    kind: str
    theta: float  # wavelength base
    original_positions: int  # positions the model was trained on before scaling
    max_positions: int  # positions the scaled model can use
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # cosines and sines are multiplied by it; yarn

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Rotary":
        """Read a text model's configuration.

        The parameters are in `rope_parameters` (transformers 5) or `rope_scaling` (before), the
        base in either or beside them; `type` is an old spelling of `rope_type`.

        Raises:
            CheckpointError: a kind that is not known, a missing or unusable number.
        """
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        values = config.get(key) or {}
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{key}={values!r} in config.json must be an object")
        kind = values.get("rope_type", values.get("type", "default"))
        if kind not in KINDS:
            raise CheckpointError(
                f"rope type {kind!r} is not supported; it can be {', '.join(KINDS)}"
            )
        partial = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise CheckpointError(f"partial_rotary_factor={partial} is not supported, only 1")
        theta = _number(values, "rope_theta", config.get("rope_theta", 10000.0))
        positions = int(_number(config, "max_position_embeddings", None))
        if kind == "default":
            return cls(kind, theta, positions, positions)
        trained = "original_max_position_embeddings"
        # Where both are given, the one beside the rotary parameters counts (transformers 5.23).
        place = config if config.get(trained) is not None else values
        return _SCALED[kind](values, theta, int(_number(place, trained, positions)), positions)


def cos_sin_table(rotary: Rotary, head_size: int) -> Tensor:
    """Cosines and sines of every position's angles.

    Returns:
        float32 [L, H] on the host, L = `rotary.max_positions`; cosines then sines, H/2 each.
    """
    positions_L = torch.arange(rotary.max_positions).float()
    angles_Lh = positions_L[:, None] * _inverse_frequencies(rotary, head_size)
    return torch.cat((angles_Lh.cos(), angles_Lh.sin()), dim=-1) * rotary.attention_factor


def _inverse_frequencies(rotary: Rotary, head_size: int) -> Tensor:
    """float32 [H/2], radians per position."""
    exponents_h = torch.arange(0, head_size, 2).float() / head_size
    if rotary.kind == "yarn":
        return _yarn_frequencies(rotary, head_size, exponents_h)
    frequencies_h = 1.0 / (rotary.theta**exponents_h)
    if rotary.kind == "linear":
        return frequencies_h / rotary.factor
    if rotary.kind == "llama3":
        return _llama3_frequencies(rotary, frequencies_h)
    # "dynamic" changes the base only past max_position_embeddings, which is where the table ends:
    # keys that are already cached could not follow a change of base.
    return frequencies_h


def _llama3_frequencies(rotary: Rotary, frequencies_h: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between mixed."""
    longest = rotary.original_positions / rotary.low_freq_factor
    shortest = rotary.original_positions / rotary.high_freq_factor
    wavelengths_h = 2 * math.pi / frequencies_h
    smooth_h = (rotary.original_positions / wavelengths_h - rotary.low_freq_factor) / (
        rotary.high_freq_factor - rotary.low_freq_factor
    )
    mixed_h = (1 - smooth_h) * frequencies_h / rotary.factor + smooth_h * frequencies_h
    stretched_h = torch.where(wavelengths_h > longest, frequencies_h / rotary.factor, frequencies_h)
    between_h = (wavelengths_h >= shortest) & (wavelengths_h <= longest)
    return torch.where(between_h, mixed_h, stretched_h)


def _yarn_frequencies(rotary: Rotary, head_size: int, exponents_h: Tensor) -> Tensor:
    """Interpolated frequencies for slow dimensions, plain ones for fast, a ramp between."""
    wavelengths_h = rotary.theta**exponents_h
    plain_h, stretched_h = 1.0 / wavelengths_h, 1.0 / (rotary.factor * wavelengths_h)

    def dimension(rotations: float) -> float:
        """The dimension that turns so many times over the original positions."""
        turns = rotary.original_positions / (rotations * 2 * math.pi)
        return head_size * math.log(turns) / (2 * math.log(rotary.theta))

    low, high = dimension(rotary.beta_fast), dimension(rotary.beta_slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    if low == high:
        high += 0.001  # a ramp needs some width
    ramp_h = ((torch.arange(head_size // 2).float() - low) / (high - low)).clamp(0, 1)
    keep_h = 1 - ramp_h
    return stretched_h * (1 - keep_h) + plain_h * keep_h


def _linear(values: Mapping[str, Any], theta: float, original: int, positions: int) -> Rotary:
    factor = _number(values, "factor", None)
    return Rotary("linear", theta, positions, int(positions * max(factor, 1)), factor)


def _dynamic(values: Mapping[str, Any], theta: float, original: int, positions: int) -> Rotary:
    return Rotary("dynamic", theta, positions, positions, _number(values, "factor", None))


def _llama3(values: Mapping[str, Any], theta: float, original: int, positions: int) -> Rotary:
    return Rotary(
        "llama3",
        theta,
        original,
        positions,
        _number(values, "factor", None),
        low_freq_factor=_number(values, "low_freq_factor", None),
        high_freq_factor=_number(values, "high_freq_factor", None),
    )


def _yarn(values: Mapping[str, Any], theta: float, original: int, positions: int) -> Rotary:
    factor = values.get("factor")
    factor = positions / original if factor is None else _number(values, "factor", None)
    attention = _yarn_attention(values, factor)
    return Rotary(
        "yarn",
        theta,
        original,
        max(positions, int(original * factor)),
        factor,
        beta_fast=_number(values, "beta_fast", 32),
        beta_slow=_number(values, "beta_slow", 1),
        truncate=bool(values.get("truncate", True)),
        attention_factor=_number(values, "attention_factor", attention),
    )


def _yarn_attention(values: Mapping[str, Any], factor: float) -> float:
    """The paper's temperature, 0.1 ln(factor) + 1, or the ratio of two scaled ones."""

    def temperature(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    scale, scale_all = values.get("mscale"), values.get("mscale_all_dim")
    if scale and scale_all:
        return temperature(scale) / temperature(scale_all)
    return temperature(1.0)


_SCALED = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}


def _number(values: Mapping[str, Any], key: str, default: float | None) -> float:
    """A positive number of the configuration.

    Raises:
        CheckpointError: it is absent without a default, or no positive number.
    """
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"{key}={value!r} in the rotary embedding must be a positive number")
    return value

"""Normalisation. Small, so every rank computes all of it."""

import torch.nn.functional as F
from torch import Tensor

from tessera.shard.backends.base import Backend
from tessera.shard.layers.base import Layer, Parameter, Source


class RMSNorm(Layer):
    """x / rms(x) * weight (arXiv 1910.07467), fused with the residual addition before it."""

    weight_D: Tensor

    def __init__(self, backend: Backend, name: str, width: int, eps: float) -> None:
        self._backend = backend
        self._eps = eps
        self.parameters = {"weight_D": vector(f"{name}.weight", width)}

    def __call__(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); see `Backend.add_rms_norm`."""
        return self._backend.add_rms_norm(x_TD, residual_TD, self.weight_D, self._eps)


class LayerNorm(Layer):
    """(x - mean) / std * weight + bias (arXiv 1607.06450)."""

    weight_D: Tensor
    bias_D: Tensor

    def __init__(self, name: str, width: int, eps: float) -> None:
        self._eps = eps
        self.parameters = {
            "weight_D": vector(f"{name}.weight", width),
            "bias_D": vector(f"{name}.bias", width),
        }

    def __call__(self, x_TD: Tensor) -> Tensor:
        """[T, D] in the dtype of the input."""
        return F.layer_norm(x_TD, self.weight_D.shape, self.weight_D, self.bias_D, self._eps)


def vector(name: str, width: int) -> Parameter:
    """A one-dimensional parameter that every rank holds whole."""
    return Parameter((width,), (Source(name, (width,)),))

"""Activation functions by the names that config.json files give them.

Source: the names and formulas of transformers 5.23, `activations.ACT2CLS`; its `prelu` and `xielu`
have weights of their own and are not offered.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.shard.errors import CheckpointError

Activation = Callable[[Tensor], Tensor]


def activation(name: object, key: str) -> Activation:
    """The function called `name`; `key` is where the configuration says so.

    Raises:
        CheckpointError: there is none of that name.
    """
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise CheckpointError(f"{key}={name!r} is not known; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _gelu_tanh(x: Tensor) -> Tensor:
    """arXiv 1606.08415, the approximation by tanh."""
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    """arXiv 1606.08415, the approximation by a sigmoid; CLIP's."""
    return x * torch.sigmoid(1.702 * x)


def _clipped_gelu(x: Tensor) -> Tensor:
    """arXiv 2004.09602: gelu between -10 and 10."""
    return F.gelu(x).clip(-10, 10)


def _laplace(x: Tensor) -> Tensor:
    """arXiv 2209.10655, with its constants for the mean and the deviation."""
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": F.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _identity,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}

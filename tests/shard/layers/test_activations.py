import pytest
import torch

from tessera.shard.errors import CheckpointError
from tessera.shard.layers.activations import ACTIVATIONS, activation

WITH_WEIGHTS = {"prelu", "xielu"}


def test_every_name_that_transformers_knows() -> None:
    from transformers.activations import ACT2CLS

    assert set(ACTIVATIONS) == set(ACT2CLS) - WITH_WEIGHTS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_those_of_transformers(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.cat((torch.linspace(-20, 20, 401), torch.tensor([0.0, -0.0])))
    torch.testing.assert_close(activation(name, "hidden_act")(x), ACT2FN[name](x))


@pytest.mark.parametrize("name", ["gelu_tanh", "", None, ["gelu"]])
def test_unknown_names_are_refused_with_the_key(name: object) -> None:
    with pytest.raises(CheckpointError, match=r"projector_hidden_act=.*known are gelu, "):
        activation(name, "projector_hidden_act")

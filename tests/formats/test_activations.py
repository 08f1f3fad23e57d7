"""Oracle: transformers' table."""

import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN

from hf_models import TOLERANCE
from minigpt2.formats.activations import ACTIVATIONS, KEPT

WITH_WEIGHTS = {"prelu", "xielu"}


def test_all_that_transformers_has_without_weights_is_known():
    assert ACTIVATIONS.keys() == ACT2CLS.keys() - WITH_WEIGHTS
    assert KEPT.keys() <= ACTIVATIONS.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_slopes_are_those_of_transformers_in_float64(name):
    x = torch.linspace(-30, 30, 2000, dtype=torch.float64, requires_grad=True)
    found, expected = ACTIVATIONS[name](x), ACT2FN[name](x)
    assert (found - expected).abs().max() <= TOLERANCE
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (found, expected)]
    assert (slopes[0] - slopes[1]).abs().max() <= TOLERANCE

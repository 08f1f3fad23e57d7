"""The optimizer's groups and the learning rate's curve."""

import math

import pytest
import torch

from minigpt2.model import GPT2, PRESETS, GPT2Config
from minigpt2.training.optimizer import lr_at, make_optimizer


def sizes(optimizer):
    return [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]


def test_matrices_decay_and_vectors_do_not_in_the_124m_model():
    with torch.device("meta"):
        model = GPT2(PRESETS["gpt2"])
    optimizer = make_optimizer(model, learning_rate=1.0, weight_decay=0.1)
    # reliability facts of the published shapes: 148 tensors, 124,439,808 parameters
    assert sizes(optimizer) == [124_318_464, 121_344]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group(tied):
    config = GPT2Config(
        vocab_size=23, block_size=7, n_embd=10, n_layer=3, n_head=2, tie_word_embeddings=tied
    )
    model = GPT2(config)
    optimizer = make_optimizer(model, learning_rate=1.0, weight_decay=0.1)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})


def test_frozen_parameters_are_left_out():
    model = GPT2(GPT2Config(vocab_size=23, block_size=7, n_embd=10, n_layer=1, n_head=2))
    model.wpe.weight.requires_grad_(False)
    optimizer = make_optimizer(model, learning_rate=1.0, weight_decay=0.1)
    assert sum(sizes(optimizer)) == sum(p.numel() for p in model.parameters()) - 7 * 10


def curve(**arguments):
    return [lr_at(step, **arguments) for step in range(arguments["max_steps"])]


def test_the_curve_rises_straight_and_falls_as_a_cosine_to_a_tenth():
    rates = curve(peak=2.0, warmup_steps=4, max_steps=104)
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[54] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(
    ("warmup_steps", "max_steps"), [(0, 1), (1, 1), (5, 1), (3, 3), (0, 2), (10, 4)]
)
def test_degenerate_curves_stay_between_0_and_the_peak(warmup_steps, max_steps):
    for rate in curve(peak=1.0, warmup_steps=warmup_steps, max_steps=max_steps):
        assert 0 < rate <= 1 and math.isfinite(rate)


def test_the_rate_beyond_the_end_stays_at_its_floor():
    assert lr_at(999, peak=1.0, warmup_steps=0, max_steps=10) == pytest.approx(0.1)

"""The held-out loss: token-weighted, however batches are cut, and without side effects."""

import math

import pytest
import torch

from minigpt2.evaluation.held_out_loss import bytes_per_target, mean_loss
from minigpt2.evaluation.scorer import Scorer
from minigpt2.model import evaluation_mode
from minigpt2.system.precision import Precision
from scored import plain_sum, ragged_batches, tiny

CPU = Precision(torch.device("cpu"), torch.float32)


def test_the_mean_weighs_tokens_and_not_batches():
    model = tiny().eval()
    batches = list(ragged_batches(torch.Generator().manual_seed(1), [3, 1, 2]))
    total = sum(plain_sum(model, idx, targets).item() for idx, targets in batches)
    count = sum(int((targets != -100).sum()) for _, targets in batches)
    assert mean_loss(Scorer(model), batches, CPU) == pytest.approx(total / count, rel=1e-6)
    rows = [(idx[i : i + 1], t[i : i + 1]) for idx, t in batches for i in range(len(idx))]
    assert mean_loss(Scorer(model), rows, CPU) == pytest.approx(total / count, rel=1e-6)


def test_bytes_are_those_of_scored_targets_however_batches_are_cut():
    batches = list(ragged_batches(torch.Generator().manual_seed(1), [3, 1, 2]))
    n_bytes = torch.randint(0, 9, (300,), generator=torch.Generator().manual_seed(2))
    scored = [id for _, targets in batches for id in targets.flatten().tolist() if id != -100]
    expected = sum(n_bytes.tolist()[id] for id in scored) / len(scored)
    assert bytes_per_target(batches, n_bytes) == expected
    rows = [(idx[i : i + 1], t[i : i + 1]) for idx, t in batches for i in range(len(idx))]
    assert bytes_per_target(rows, n_bytes) == expected


def test_evaluating_twice_gives_the_same_float_and_leaves_everything_as_it_was():
    model = tiny().train()
    scorer = Scorer(model).train()
    batches = list(ragged_batches(torch.Generator().manual_seed(1), [3, 1]))
    before = torch.get_rng_state()
    first, second = mean_loss(scorer, batches, CPU), mean_loss(scorer, batches, CPU)
    assert first == second and math.isfinite(first)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_mode_comes_back_after_an_error():
    model = tiny().train()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not model.training
        raise KeyError
    assert model.training

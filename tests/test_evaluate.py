"""The validation loss: token-weighted, independent of how batches are cut, and without side
effects.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from minigpt2.evaluate import mean_loss, summed_loss
from minigpt2.model import GPT2, GPT2Config, evaluation_mode
from minigpt2.precision import Precision

CPU = Precision(torch.device("cpu"), torch.float32)


def tiny():
    generator = torch.Generator().manual_seed(3)
    config = GPT2Config(vocab_size=29, block_size=7, n_embd=10, n_layer=2, n_head=2)
    return GPT2(config, generator=generator)


def ragged_batches(generator, sizes):
    for n_rows in sizes:
        idx = torch.randint(29, (n_rows, 7), generator=generator)
        targets = torch.randint(29, (n_rows, 7), generator=generator)
        targets[0, n_rows:] = -100
        yield idx, targets


def test_zero_logits_cost_the_logarithm_of_the_vocabulary():
    logits, targets = torch.zeros(1, 3, 50257), torch.tensor([[0, 7, 50256]])
    assert summed_loss(logits, targets).item() / 3 == pytest.approx(10.82490511970208, abs=1e-5)


def test_ignored_targets_cost_exactly_nothing_and_all_ignored_is_0():
    logits = torch.randn(1, 3, 11, generator=torch.Generator().manual_seed(0))
    one = summed_loss(logits[:, :1], torch.tensor([[5]]))
    assert torch.equal(summed_loss(logits, torch.tensor([[5, -100, -100]])), one)
    assert summed_loss(logits, torch.full((1, 3), -100)).item() == 0.0


def test_bfloat16_logits_are_scored_in_float32():
    logits = (20 * torch.randn(2, 5, 31, generator=torch.Generator().manual_seed(0))).bfloat16()
    targets = torch.arange(10).view(2, 5)
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    assert summed_loss(logits, targets).item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_mean_weighs_tokens_and_not_batches():
    model = tiny().eval()
    batches = list(ragged_batches(torch.Generator().manual_seed(1), [3, 1, 2]))
    total = sum(summed_loss(model(idx), targets).item() for idx, targets in batches)
    count = sum(int((targets != -100).sum()) for _, targets in batches)
    assert mean_loss(model, batches, CPU) == pytest.approx(total / count, rel=1e-6)
    rows = [(idx[i : i + 1], t[i : i + 1]) for idx, t in batches for i in range(len(idx))]
    assert mean_loss(model, rows, CPU) == pytest.approx(total / count, rel=1e-6)


def test_evaluating_twice_gives_the_same_float_and_leaves_everything_as_it_was():
    model = tiny().train()
    batches = list(ragged_batches(torch.Generator().manual_seed(1), [3, 1]))
    before = torch.get_rng_state()
    first, second = mean_loss(model, batches, CPU), mean_loss(model, batches, CPU)
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

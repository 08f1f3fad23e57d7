"""The loss that never holds all logits equals the loss that does, gradients and all."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.loss import bits_per_byte, perplexity, summed_loss

C, V = 11, 29


def problem(n_tokens, *, dtype=torch.float64, seed=0, ignored=0.3):
    """x (N, C), weight (V, C) that want gradients, and targets (N,), some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, C, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (n_tokens,), generator=generator)
    targets[torch.rand(n_tokens, generator=generator) < ignored] = -100
    return x, weight, targets


def plain(x, weight, targets, scale=1.0):
    """The oracle: all logits at once, and autograd's own gradients."""
    return scale * F.cross_entropy(x @ weight.T, targets, reduction="sum", ignore_index=-100)


def gradients(loss, *parameters):
    return torch.autograd.grad(loss, parameters)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50 * V), st.integers(0, 99), st.floats(0.01, 100))
def test_loss_and_gradients_are_the_plain_ones_however_it_is_cut(n_tokens, most, seed, scale):
    x, weight, targets = problem(n_tokens, seed=seed)
    ours = summed_loss(x, weight, targets, scale, most=most)
    expected = plain(x, weight, targets, scale)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(ours, x, weight), gradients(expected, x, weight)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_multiplied_by_what_comes_after():
    x, weight, targets = problem(7)
    ours = gradients(3 * summed_loss(x, weight, targets).square(), x, weight)
    expected = gradients(3 * plain(x, weight, targets).square(), x, weight)
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_batches_of_rows_are_flattened():
    x, weight, targets = problem(15)
    flat = summed_loss(x, weight, targets)
    assert torch.equal(summed_loss(x.view(3, 5, C), weight, targets.view(3, 5)), flat)


def test_zero_logits_cost_the_logarithm_of_the_vocabulary():
    loss = summed_loss(torch.zeros(3, 2), torch.zeros(50257, 2), torch.tensor([0, 7, 50256]))
    assert loss.item() / 3 == pytest.approx(10.82490511970208, abs=1e-5)


def test_ignored_targets_cost_exactly_nothing_and_all_ignored_is_0():
    x, weight, _ = problem(3)
    one = summed_loss(x[:1], weight, torch.tensor([5]))
    assert torch.equal(summed_loss(x, weight, torch.tensor([5, -100, -100])), one)
    none = summed_loss(x, weight, torch.full((3,), -100))
    assert none.item() == 0.0
    assert all(not grad.any() for grad in gradients(none, x, weight))


def test_only_wanted_gradients_are_made():
    x, weight, targets = problem(9)
    loss = summed_loss(x, weight.detach(), targets)
    expected = gradients(plain(x, weight, targets), x)
    torch.testing.assert_close(gradients(loss, x), expected)
    with torch.no_grad():
        assert summed_loss(x, weight, targets).item() == pytest.approx(loss.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_only_the_matrix_products_are_rounded(dtype):
    x, weight, targets = problem(40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        ours = summed_loss(x, weight, targets, most=7 * V)
        logits = x @ weight.T
    assert logits.dtype == dtype
    expected = F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=-100)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(gradients(ours, x, weight), gradients(expected, x, weight)):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * b.abs().max().item())


def test_the_scale_lifts_gradients_that_float16_would_lose():
    # gradients near 1e-9 are below float16's smallest number; the loss scaler's 65,536 lifts them
    x, weight, targets = problem(5, dtype=torch.float32, ignored=0)
    with torch.autocast("cpu", dtype=torch.float16):
        lost = gradients(summed_loss(x, weight, targets, 1e-9), x)[0]
        kept = gradients(summed_loss(x, weight, targets, 1e-9 * 65536), x)[0] / 65536
    expected = gradients(plain(x, weight, targets, 1e-9), x)[0]
    assert not lost.any()
    torch.testing.assert_close(kept, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_what_is_not_a_number_is_not_hidden():
    x, weight, targets = problem(9, ignored=0)
    with torch.no_grad():
        x[4, 2] = float("inf")
    loss = summed_loss(x, weight, targets)
    assert not loss.isfinite()
    assert not gradients(loss, weight)[0].isfinite().all()


def test_never_more_logits_than_allowed_exist(monkeypatch):
    x, weight, targets = problem(40)
    sizes = []
    real = torch.Tensor.exp_
    monkeypatch.setattr(torch.Tensor, "exp_", lambda self: sizes.append(self.numel()) or real(self))
    summed_loss(x, weight, targets, most=7 * V)
    assert sizes == [7 * V] * 5 + [5 * V]


def test_a_guess_among_all_bytes_takes_eight_bits_and_longer_tokens_share_theirs():
    assert bits_per_byte(math.log(256), 1) == pytest.approx(8, rel=1e-15)
    assert bits_per_byte(math.log(2**20), 4) == pytest.approx(5, rel=1e-15)


def test_perplexity_is_the_exponential_and_infinite_beyond_floats():
    assert perplexity(math.log(29)) == pytest.approx(29)
    assert perplexity(1e6) == math.inf

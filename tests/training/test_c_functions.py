"""The C functions of a training step compute what torch does, with the masks that were drawn."""

import math

import pytest
import torch
import torch.nn.functional as F

from minigpt2.training.c_functions import (
    Attention,
    Dropout,
    added,
    attend,
    attend_gradient,
    biased_gelu,
    biased_gelu_gradient,
    drawn,
    dropped,
    layer_norm,
    layer_norm_gradient,
    like_tokens,
)
from tiny_training import needs_c

pytestmark = needs_c
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
SHAPES = [(1, 3), (3, 5), (31, 16), (32, 17), (67, 37), (700, 48)]  # (N, C)


def distance(found, expected):
    """The largest difference, as a share of the largest magnitude or of 1."""
    return (found - expected).abs().max() / expected.abs().max().clamp(min=1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)


# dropout


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_numbers_are_dropped_at_the_rate_and_the_rest_grows(p):
    count = 101 * 10_007
    y = dropped(torch.ones(101, 10_007), Dropout(p, 5))
    kept = y[y != 0]
    error = 5 * math.sqrt(p * (1 - p) / count) + 1e-12
    assert abs(len(kept) / count - (1 - p)) <= error
    assert len(kept) == 0 or torch.allclose(kept, torch.tensor(1 / (1 - p)).float(), rtol=1e-5)
    if 0.01 < p < 0.99:
        # neighbours, and the same places of two rows, know nothing of each other
        mask = (y != 0).double().flatten()
        for step in (1, 16, 4096, 10_007):
            both = (mask[step:] * mask[:-step]).mean()
            assert abs(both - (1 - p) ** 2) <= error


def test_masks_come_from_the_seed_and_those_of_neighbouring_seeds_have_nothing_in_common():
    x = torch.ones(400, 1_000)
    one, same, other = (dropped(x, Dropout(0.5, seed)) != 0 for seed in (7, 7, 8))
    assert torch.equal(one, same)
    assert abs((one & other).double().mean() - 0.25) < 0.005


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_is_added_has_its_bias_and_is_dropped_out(shape, p):
    x, beside, bias, dropout = *torch.randn(2, *shape), torch.randn(shape[1]), Dropout(p, 3)
    factors = dropped(torch.ones(shape), dropout)
    found = added(x.clone(), bias, beside, dropout)
    torch.testing.assert_close(found, beside + (x + bias) * factors, **CLOSE)


def test_nothing_is_drawn_where_nothing_is_dropped():
    before = torch.get_rng_state()
    assert drawn(0.0) == Dropout() and torch.equal(torch.get_rng_state(), before)
    assert drawn(0.1) != drawn(0.1)


# layer norm


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("size", "mean"), [(1.0, 0.0), (30.0, 7.0), (1e-3, 1.0)])
def test_a_layer_norm_and_its_gradients_are_torchs(shape, size, mean):
    x, (weight, bias) = mean + size * torch.randn(shape), torch.randn(2, shape[1])
    grad, beside = torch.randn(2, *shape)
    given = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]  # torch's float is
    plain = F.layer_norm(given[0], shape[1:], *given[1:], 1e-5)  # no better than ours
    of_x, *of_weights = torch.autograd.grad(plain, given, grad.double())
    y, moments = layer_norm(x, weight, bias, 1e-5)
    found = y, *layer_norm_gradient(grad.clone(), x, moments, weight, beside)
    rounded = 2e-6 * max(1, mean / size)  # what is lost of a number far from zero
    for a, b in zip(found, (plain, of_x + beside, *of_weights)):
        assert distance(a, b) < rounded


# GELU


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_gelu_and_its_gradients_are_torchs(shape, size):
    u = (size * torch.randn(shape)).requires_grad_()
    bias = (size * torch.randn(shape[1])).requires_grad_()
    grad, plain = torch.randn(shape), F.gelu(u + bias, approximate="tanh")
    expected = torch.autograd.grad(plain, [u, bias], grad)
    biased = u.detach().clone()
    y = biased_gelu(biased, bias.detach())
    assert torch.equal(biased, u + bias)
    *found, again = biased_gelu_gradient(grad.clone(), biased)
    assert torch.equal(again, y)
    for a, b in zip((y, *found), (plain, *expected)):
        scale = 1 + b.detach().abs().max()
        torch.testing.assert_close(a / scale, b / scale, **CLOSE)


@pytest.mark.parametrize("size", [10.0, 21.0, 1e4, 1e14, 1e30])
@pytest.mark.parametrize("width", [1, 16])
def test_the_slope_of_gelu_far_from_zero_is_that_of_a_line(size, width):
    for x, slope in ((size, 1.0), (-size, 0.0)):
        grad, *_ = biased_gelu_gradient(torch.ones(1, width), torch.full((1, width), x))
        assert grad.tolist() == [[pytest.approx(slope, abs=1e-6)] * width]


def test_what_is_no_number_stays_so():
    x, one = torch.randn(3, 23), torch.ones(23)
    x[1, 2] = math.nan
    y = biased_gelu(x.clone(), one)
    assert y[1, 2].isnan() and y.isnan().sum() == 1
    y, _ = layer_norm(x, one, one, 1e-5)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    q, k, v = x.expand(1, 2, 3, 23), *torch.randn(2, 1, 2, 3, 23)
    y, _ = attend(q, k, v, Attention(1.0, Dropout()))
    assert y[:, :, 1].isnan().all() and y[:, :, [0, 2]].isfinite().all()


# attention


def mask_of(shape, dropout):
    """The factors of attention's probabilities, found by values that are unit vectors and scores
    that are all the same.
    """
    n_rows, n_head, n_tokens, _ = shape
    zeros = torch.zeros(n_rows, n_head, n_tokens, n_tokens)
    units = torch.eye(n_tokens).expand_as(zeros)
    n_seen = torch.arange(1, n_tokens + 1).view(-1, 1)
    return attend(zeros, zeros, units, Attention(1.0, dropout))[0] * n_seen


def result_and_gradients(qkv, grad_y, how, bias=None):
    """What C makes of q, k, v and the bias: the result, and the gradients from its."""
    q, k, v = qkv
    y, logs = attend(q, k, v, how, bias)
    grads = [like_tokens(q) for _ in range(3)]
    of_bias = attend_gradient(q, k, v, grad_y, logs, grads, how, bias)
    return y, *grads, of_bias


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 5), (3, 2, 7, 5), (5, 2, 128, 3), (3, 2, 271, 5), (1, 3, 97, 37)], ids=str
)
@pytest.mark.parametrize("p", [0.0, 1e-12, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_and_its_gradients_are_torchs_with_the_masks(shape, p, biased):
    _, n_head, n_tokens, size = shape
    how = Attention(0.3, Dropout(p, 2**62 - 1))
    qkv, grad = torch.randn(3, *shape), torch.randn(shape)
    bias = torch.randn(3, n_head, size) if biased else torch.zeros(3, n_head, size)
    factors = mask_of(shape, how.dropout)
    visible = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    share = (factors[:, :, visible] != 0).double().mean()
    assert abs(share - (1 - p)) < 5 * math.sqrt(p / factors.numel()) + 0.05
    given = [tensor.double().requires_grad_() for tensor in (qkv, bias)]
    q, k, v = given[0] + given[1][:, None, :, None]
    scores = (q * how.scale @ k.transpose(2, 3)).masked_fill(~visible, -math.inf)
    y = scores.softmax(-1) * factors @ v
    of_qkv, of_bias = torch.autograd.grad(y, given, grad.double())
    found = result_and_gradients(qkv, grad, how, bias if biased else None)
    for a, b in zip(found, (y, *of_qkv, of_bias), strict=True):
        assert distance(a, b) < 5e-6  # scores of 30 are rounded by 2e-6, and so are their shares


def test_all_is_the_same_with_any_number_of_threads():
    how, qkv = Attention(0.3, Dropout(0.2, 5)), torch.randn(3, 3, 2, 190, 7)
    grad, bias = torch.randn(3, 2, 190, 7), torch.randn(3, 2, 7)
    x, u, wide = torch.randn(131, 37), torch.randn(131, 37), torch.randn(37)

    def everything():
        y, moments = layer_norm(x, wide, wide, 1e-5)
        yield from (y, moments, *layer_norm_gradient(u.clone(), x, moments, wide, x))
        yield from biased_gelu_gradient(x.clone(), u)
        yield from result_and_gradients(qkv, grad, how, bias)

    before, expected = torch.get_num_threads(), [*everything()]
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            for found, one in zip(everything(), expected, strict=True):
                assert torch.equal(found, one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=str)
def test_tokens_may_lie_in_memory_in_any_order(order):
    how = Attention(0.3, Dropout(0.2, 5))
    qkv, grad = torch.randn(3, 3, 2, 190, 7), torch.randn(3, 2, 190, 7)
    back = [order.index(i) for i in range(4)]
    turned = [x.permute(order).contiguous().permute(back) for x in (*qkv, grad)]
    expected = result_and_gradients(qkv, grad, how)
    for a, b in zip(result_and_gradients(turned[:3], turned[3], how), expected):
        assert torch.equal(a, b)


def test_each_query_of_each_head_has_a_mask_of_its_own():
    factors = mask_of((3, 2, 271, 5), Dropout(0.5, 3))
    rows = factors[:, :, 40:, :40].flatten(0, 2) != 0  # keys that all these queries see
    assert len(rows.unique(dim=0)) == len(rows)

"""Masks of 16 bits drop what they should, and attention in parts is attention with those masks."""

import math

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt2.evaluation.scorer import Scorer
from minigpt2.system.precision import Precision
from minigpt2.training import dropout
from minigpt2.training.blocks import prepare_blocks
from minigpt2.training.dropout import (
    Dropout,
    attention_in_parts,
    kept,
    kept_share,
    parts,
    plain_attention,
    swap_dropout,
)
from minigpt2.training.ways import PLAIN, way_of_step
from tiny_training import FLOAT32, tiny_model

IDX, TARGETS = torch.randint(300, (2, 3, 17), generator=torch.Generator().manual_seed(1))


# masks


@settings(deadline=None)
@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_rate_is_met_within_a_65536th_and_never_rounds_to_nothing_or_all(p):
    share = kept_share(p)
    assert abs(share - (1 - p)) <= 1 / 65536 and 0 < share < 1


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-9])
def test_each_of_the_four_numbers_in_a_word_is_kept_at_the_rate(p):
    torch.manual_seed(3)
    count = 400_000
    mask = kept((count, 4), p)
    assert mask.dtype == torch.bool and mask.shape == (count, 4)
    share = kept_share(p)
    error = math.sqrt(share * (1 - share) / count)
    assert (mask.double().mean(0) - share).abs().max() <= 5 * error
    if 0.01 < p < 0.99:  # two of a word, and neighbours of two words, know nothing of each other
        for one, other in ((mask[:, 0], mask[:, 1]), (mask[:-1, 3], mask[1:, 0])):
            both = (one & other).double().mean()
            assert abs(both - share**2) <= 5 * error


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5, 7), (0, 3)])
def test_masks_have_the_shape_that_was_asked_for_and_come_from_the_seed(shape):
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(kept((101, *shape), 0.4))
    assert masks[0].shape == (101, *shape)
    assert torch.equal(masks[0], masks[1])
    assert math.prod(shape) == 0 or not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_kept_grows_by_what_is_dropped(dtype):
    module, x = Dropout(0.3), torch.randn(31, 7, dtype=dtype).requires_grad_()
    torch.manual_seed(2)
    y = module(x)
    torch.manual_seed(2)
    mask = kept(x.shape, 0.3)
    assert y.dtype == dtype and 0.5 < mask.float().mean() < 0.9
    factor = torch.tensor(1.0, dtype=dtype) / kept_share(0.3)
    assert torch.equal(y, torch.where(mask, x * factor, 0))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.where(mask, factor, 0))


@pytest.mark.parametrize("module", [Dropout(0.0), Dropout(0.3).eval()])
def test_without_a_rate_or_training_nothing_changes_and_nothing_is_drawn(module):
    x, before = torch.randn(3, 5), torch.get_rng_state()
    assert module(x) is x and torch.equal(torch.get_rng_state(), before)


# attention


def apart(n_rows, n_tokens):
    """A mask (B, 1, T, T) of two or three documents a row."""
    documents = torch.arange(n_tokens).expand(n_rows, -1) // (n_tokens // 3 + 1)
    same = documents[:, :, None] == documents[:, None]
    return (same & torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril())[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("at_once", [1, 2000, 2**20])
@pytest.mark.parametrize("shape", [(1, 1, 1, 5), (3, 2, 7, 5), (5, 2, 128, 3), (3, 2, 271, 5)])
def test_attention_in_parts_is_plain_attention_with_its_masks(shape, at_once, masked, monkeypatch):
    monkeypatch.setattr(dropout, "AT_ONCE", at_once)
    p, scale = 0.2, 0.3
    generator = torch.Generator().manual_seed(7)
    q, k, v, grad = torch.randn(4, *shape, dtype=torch.float64, generator=generator)
    given = [x.requires_grad_() for x in (q, k, v)]
    mask = apart(shape[0], shape[2]) if masked else None
    torch.manual_seed(9)
    found = attention_in_parts(*given, mask, scale, p)
    torch.manual_seed(9)
    expected = plain_attention(q, k, v, mask, scale, p)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y, given, grad) for y in (found, expected)]
    for ours, plain in zip(*gradients):
        torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 600))
def test_parts_have_every_score_once_that_a_query_may_see(n_rows, n_head, n_tokens):
    seen = torch.zeros(n_rows, n_tokens, n_tokens, dtype=torch.int64)
    for rows, queries in parts(n_rows, n_head, n_tokens):
        seen[rows, queries, : queries.stop] += 1
    visible = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
    assert (seen[:, visible] == 1).all() and seen.max() == 1


# models


def gradients(model, seed=5):
    torch.manual_seed(seed)
    Scorer(model)(IDX, TARGETS).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def quick(**options):
    model = tiny_model(**options).train()
    swap_dropout(model)
    return model


def test_a_model_drops_out_wherever_it_did():
    model = quick()
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.Dropout)]
    assert kinds == 5 * [Dropout]
    assert way_of_step(model) == "16-bit dropout" and way_of_step(tiny_model()) == PLAIN
    assert not torch.equal(gradients(model), gradients(tiny_model().train()))
    model.set_dropout(0.0)  # reaches all of it
    model.zero_grad()
    assert torch.equal(gradients(model), gradients(tiny_model(dropout=0.0).train()))


@pytest.mark.parametrize("name", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_place_has_its_own_rate(name):
    model = quick(dropout=0.0)
    plain = gradients(model)
    block = model.h[1]
    places = {
        "embd_pdrop": [(model.drop, "p")],
        "resid_pdrop": [(block.mlp.dropout, "p"), (block.attn.resid_dropout, "p")],
        "attn_pdrop": [(block.attn, "attn_pdrop")],
    }
    for module, rate in places[name]:
        setattr(module, rate, 0.3)
    model.zero_grad()
    assert not torch.equal(gradients(model), plain)


def test_blocks_that_are_computed_twice_drop_the_same():
    model, again = quick(), quick()
    prepare_blocks(again, FLOAT32, (3, 17), compiled=False, recomputed=True)
    assert torch.equal(gradients(model), gradients(again))


def test_an_evaluation_is_the_plain_models():
    assert torch.equal(quick().eval()(IDX), tiny_model().eval()(IDX))


def test_products_of_16_bits_take_the_plain_attention(monkeypatch):
    monkeypatch.setattr(dropout, "attention_in_parts", None)  # would fail
    model, precision = quick(), Precision(torch.device("cpu"), torch.bfloat16)
    with precision.autocast():
        model(IDX)
    with pytest.raises(TypeError):
        model(IDX)
